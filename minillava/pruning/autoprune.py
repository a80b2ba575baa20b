"""AutoPrune: drop image tokens in every layer, along a curve that depends on image and question.

Wang et al., NeurIPS 2025, arXiv 2509.23931. Released code: AutoLab-SAI-SJTU/AutoPrune e4a9918,
llava/model/language_model/modelling_sparse_llama.py, score.py; llava_arch.py. Behind layers 0, 1,
2, ... (which is the input of the layers 1, 2, 3, ...) image tokens are dropped by the attention
that they receive in that layer from the text after the image, mean over heads and text rows. T
is `target`, the image tokens that leave a layer, mean over layers.
1. Behind layer 0, int(2.5 T) stay: the largest 0.3 * I / (text rows) * this attention + that from
   the class token in the tower's second-last block, mean over heads. The latter counts as 0 for
   patches of the letterbox that are more than about a patch away from the image. I is the mutual
   information of text rows and image tokens (bits, summed over heads) in that layer's attention.
2. With I of layer 1 and n tokens, after layer i the best ceil((n - 1) * s * share) stay, where
   share = 0.75 / (1 + exp(k (i - x0 - k))) and k = max(k0 - gamma * I, 0). The factor s is bisected
   to meet T, the means of step 3 included.
3. As in SparseVLM, the best 30 % of the dropped are clustered and their means added.
Positions are renumbered after every drop, and the position of a new token in a layer is the number
of rows that this layer's cache holds. The counts differ from image to image, their mean does not.
What the released code drops after the last layer has no effect.

Deviations: any number of images, each with its own curve. Attention is float32, and SparseVLM's
noise on densities is zero. The released settings of 7B and 13B are the same, except
that 13B needs depth=40.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import VisionConfig
from ..rows import on_device
from .base import Context, Keep, Method, Stages, amount, count, option, top
from .order import need_patches
from .shared import border_patches, refuse_nan, second_last_block
from .sparsevlm import count_clusters, count_merged, merge_best_dropped

FIRST, TOP, EPS = 2.5, 0.75, 1e-6


def mutual_information(c: Context, rows: Tensor, seen: Tensor) -> Tensor:
    """Mutual information () of `rows` (t,), all equally likely, and the candidates that they attend
    to in the layer before: bits, summed over heads. seen (H, n): their mean attention."""
    t, total = max(1, len(rows)), seen.new_zeros(())
    for weights in c.attention_by_row(rows):  # (H, b, n)
        ratio = (weights / t) / (seen[:, None] / t + EPS)
        total = total + (weights / t * ratio.clamp(min=EPS).log2()).sum()
    return total


def far_border_lines(width: int, height: int, config: VisionConfig) -> tuple[int, int]:
    """Rows (or columns) of patches before and after an image on a square whose first pixel is
    further from it than a patch, rounded up: 2 and 1 of 24 for 400 x 300 pixels."""
    longer, shorter, g = max(width, height), min(width, height), config.grid
    margin = (longer + g - 1) // g
    outside = torch.ones(1, 1, longer)
    outside[..., max(0, (longer - shorter) // 2 - margin) : (longer + shorter) // 2 + margin] = 0
    lines = F.interpolate(outside, g)[0, 0]  # each line's first pixel
    return int(lines[: g // 2].sum()), int(lines[g // 2 :].sum())


def count_left(shares: list[float], scale: float, n: int, cap: int) -> list[int]:
    """Tokens that leave the layers 0, 1, ..., the means among them: n and then by share."""
    left = [n]
    for share in shares:
        kept = min(ceil((n - 1) * min(1.0, scale * share)), cap)
        dropped = left[-1] - kept
        left.append(kept + (count_clusters(count_merged(dropped)) if dropped else 0))
    return left


def curve(slope: float, x0: float, n: int, target: int, cap: int, depth: int) -> list[float]:
    """Share of n - 1 that stays after each of the layers 1 to depth - 1, scaled to the target."""
    steps = (slope * (i - x0 - slope) for i in range(1, depth))
    shares = [TOP / (1 + exp(min(step, 700.0))) for step in steps]  # e ** 710 is no float
    wanted, plain = depth * target, [int(n * share) for share in shares]
    if abs(sum(plain) + plain[-1] - wanted) < 1:
        return shares
    low, high, best = 0.0, 20.0, (float("inf"), 1.0)
    for _ in range(200):
        scale = (low + high) / 2
        if scale in (low, high):  # no float lies between them: every further step is this one
            break
        total = sum(count_left(shares, scale, n, cap))
        if abs(total - wanted) < best[0]:
            best = abs(total - wanted), scale
            if total == wanted:
                break
        low, high = (scale, high) if total < wanted else (low, scale)
    return [best[1] * share for share in shares]


@dataclass(frozen=True)
class AutoPrune(Method):
    target: float = amount(64, help="image tokens that leave a layer, mean over layers")
    depth: int = option(32, low=2, help="layers of the decoder")
    x0: float = option(14.9, help="layer in the middle of the curve")
    k0: float = option(0.4, help="slope of the curve without mutual information")
    gamma: float = option(0.2, help="how much mutual information flattens it")

    name, drops_only, numbering = "autoprune", False, "compact"
    strength, adaptive, adds_rows = "target", True, True
    check_order = need_patches

    def stages(self) -> Stages:
        return tuple(("decoder", layer) for layer in range(1, self.depth))

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        if self.depth != n_layers:
            raise ValueError(
                f"autoprune: depth={self.depth}, but the decoder has {n_layers} layers; "
                f"give depth={n_layers}"
            )
        super().check(n_layers, n_tokens, starts)

    def most(self, n_tokens: int) -> int:
        """Tokens left after layer 0."""
        return min(int(FIRST * count(self.target, n_tokens)), n_tokens)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (self.most(n_tokens),) * (self.depth - 1)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last_block(self.name, n_layers),)

    def choose(self, c: Context) -> Keep:
        rows, n, most = c.text_rows, len(c.candidates), self.most(c.n_tokens)
        seen = c.attention(rows)  # (H, n)
        score = seen.mean(0)  # (n,)
        if c.stage_index == 0:
            by_class = c.vision_attention(-2).mean(0)
            far = on_device(border_patches(c, far_border_lines), by_class)
            information = mutual_information(c, rows, seen) / max(1, len(rows))
            score = 0.3 * information * score + by_class.masked_fill(far, 0.0)
            return Keep(top(score, most, c.where), scores=score)
        if c.stage_index == 1 or "curve" not in c.shared:
            information = mutual_information(c, rows, seen).cpu()
            refuse_nan(information, c.where)
            slope = max(self.k0 - self.gamma * float(information), 0.0)
            target = count(self.target, c.n_tokens)
            shares = curve(slope, self.x0, n, target, most, self.depth)
            c.shared["curve"] = [(n - 1) * share for share in shares]
        k = ceil(c.shared["curve"][c.stage_index - 1])
        if k >= n:
            return Keep(torch.arange(n), scores=score)
        return merge_best_dropped(c, score, k, score.new_full((), torch.inf))
