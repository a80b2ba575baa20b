"""MustDrop: merge alike windows in the tower, drop what no text looks at, and cut the caches.

Liu et al., arXiv 2411.10803. Released code: liuting20/MustDrop 909afa5, multimodal_encoder/
clip_encoder.py, local_merge.py, language_model/modelling_sparse_llama.py. How many tokens stay
depends on the image, so there is no budget to set.
1. Behind block 0 of the vision tower, windows of 3 x 3 patches whose mean pairwise cosine is at
   least `merge` become one mean each. These come first in the sequence, the most alike first, then
   the other patches in reading order. A window has the number of its top left patch.
2. The ceil(key * n) of the n rows with the most attention from the class token in the last block,
   mean over heads, are the key set. It is never dropped. (LLaVA reads the state before that block.)
3. At the input of the layers 3, 7, 11 and 15 (the released code names the layers before) a row is
   dropped if its attention from the text after the image in the layer before, mean over heads and
   sum over the text, is less than `global` times the sum over all rows, and its largest from one
   text token is less than `individual`.
Positions are renumbered. After the prefill the caches from the layer before the first stage on (2)
are cut to the rows that the last stage left, and those before it stay whole. A new token's position
in a layer is the number of rows that its cache holds. With cache=drop nothing is cut, with
cache=all every layer. The released 192, 128 and 64 tokens are outcomes of global/individual =
.001/.001, .0012/.001 and .011/.01.

Deviations: each image counts its own windows; the released code takes the smallest number of a
batch. Where MustDrop is the only method, the normal tower is not run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention_received
from ..llava import LLaVA
from ..rows import on_device
from .base import Context, Keep, Method, Stages, option, top
from .margins import distance_to, lead, least
from .order import need_all_patches
from .shared import check_ascending, check_whole_grid, other_numbers, refuse_nan, window_patches

SIDE = 3  # patches along a side of a window


def likeness(windows: Tensor) -> Tensor:
    """Mean cosine of different patches in each of windows (w, 9, C): (w,)."""
    z, n = F.normalize(windows.float(), dim=2), windows.shape[1]
    cosine = z @ z.transpose(1, 2)  # (w, 9, 9)
    return (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))


def merge_windows(x: Tensor, limit: float, where: str) -> tuple[Tensor, Keep]:
    """Patches x (N, C) with alike windows merged, (n, C); and a Keep without them, on the CPU."""
    windows = window_patches(round(len(x) ** 0.5), SIDE)
    rows = x[on_device(windows, x)]  # (w, 9, C)
    alike = likeness(rows).cpu()  # (w,)
    merged = top(alike, int((alike >= limit).sum()), where)  # (m,)
    others = other_numbers(len(x), windows[merged].flatten())
    means = rows[on_device(merged, x)].mean(1)
    into = torch.full((len(x),), -1)
    into[windows[merged, 1:]] = torch.arange(len(merged))[:, None]
    numbers = torch.cat((windows[merged, 0], others))
    keep = Keep(numbers, ordered=True, merged_into=into, closest=(alike - limit).abs().amin())
    return torch.cat((means, x[on_device(others, x)])), keep


@dataclass(frozen=True)
class MustDrop(Method):
    merge: float = option(0.8, low=-1, high=1, help="least mean cosine of a merged window")
    key: float = option(0.08, low=0, high=1, help="share of rows that are never dropped")
    layers: tuple[int, ...] = option((3, 7, 11, 15), low=1, help="layers whose input is pruned")
    total: float = option(0.001, low=0, alias="global", help="share of all attention")
    individual: float = option(0.001, low=0, help="attention from a single text token")
    cache: str | None = option(
        None, choices=("drop", "all"), help="unset: the released cut, from the first stage on"
    )

    name, drops_only, numbering, adaptive = "mustdrop", False, "compact", True
    strength = "total"
    check_order = need_all_patches

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ascending(self.name, self.layers)

    def stages(self) -> Stages:
        return (("vision", 0), *(("decoder", layer) for layer in self.layers))

    @property
    def cut_from(self) -> int | None:
        return self.layers[0] - 1 if self.cache is None else super().cut_from

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if (grid := round(n_tokens**0.5)) % SIDE:
            raise ValueError(
                f"mustdrop cuts the image into windows of {SIDE} x {SIDE} patches, but there are "
                f"{grid} x {grid}; use another method"
            )

    def check_model(self, model: LLaVA) -> None:
        if min(model.feature_layer, len(model.vision.blocks) - 1) < 1:
            raise ValueError("mustdrop needs a vision tower that goes on after its block 0")

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (0,)

    def own_features(self, n_tokens: int) -> bool:
        return True

    def choose(self, c: Context) -> Keep:
        return self.drop(c) if c.stage_index else self.encode(c)

    def encode(self, c: Context) -> Keep:
        """The tower on merged windows; the numbers of the key set are kept for later stages."""
        check_whole_grid(c, self.name)
        tower, last = c.model.vision, len(c.model.vision.blocks) - 1
        x = tower.blocks[0](c.vision_state(0))[0]  # (1 + N, C)
        merged, keep = merge_windows(x[1:], self.merge, c.where)
        states = [torch.cat((x[:1], merged))[None]]  # hidden states 1, 2, ... (1, 1 + n, C)
        for i in range(1, max(last, c.model.feature_layer)):
            states.append(tower.blocks[i](states[-1]))
        q, k = tower.heads(last, states[last - 1])  # (1, 1 + n, H, Dh) each
        score = attention_received(q[0, :1], k[0]).mean(0)[1:]  # (n,)
        score, n_keys = score.cpu(), ceil(self.key * len(score))
        c.shared["key"] = keep.index[top(score, n_keys, c.where)]
        features = states[c.model.feature_layer - 1][0, 1:]  # (n, C)
        assert keep.closest is not None
        closest = least(keep.closest, lead(score, n_keys))
        return replace(keep, merged=features, closest=closest)

    def drop(self, c: Context) -> Keep:
        total = torch.zeros(len(c.candidates), device=c.model.device)  # (n,)
        most = total.clone()
        for weights in c.attention_by_row(c.text_rows):  # (H, b, n)
            mean = weights.mean(0)
            total, most = total + mean.sum(0), torch.maximum(most, mean.amax(0))
        total, most = torch.stack((total, most)).cpu()
        refuse_nan(total, c.where)
        limit, each = total.sum() * self.total, torch.tensor(self.individual)
        stays = (total >= limit) | (most >= each) | torch.isin(c.patches, c.shared["key"])
        closest = least(distance_to(limit, total), distance_to(each, most))
        return Keep(stays.nonzero()[:, 0], closest=closest)
