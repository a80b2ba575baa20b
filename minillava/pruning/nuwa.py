"""Nuwa: keep patches from every part of the image, and let them gather their surroundings.

"Nuwa: Mending the Spatial Integrity Torn by VLM Token Pruning", ICLR 2026. Released code:
Man-PaperRejected/Nuwa 175b7d5, nuwa/clip_encoder.py, CLIPVisionTower_Nuwa, and modeling_llama.py.
1. Between vision tower and projector, the best `cell` patches of every 2 x 2 cell of the grid are
   candidates, and of these the best `keep` stay, by the attention from the class token in the
   second-last block, summed over heads. The last row and column of an odd grid are left out.
2. A kept patch becomes w @ features. w(i, j) is the cosine of the mean of the last third of hidden
   states (16 to 24 of 24, also the last, which LLaVA does not read), at least 0, times
   1 - dist(i, j) / sqrt(distance) on the grid, at least 0. The rows of w are divided by their sum;
   after that the own weight is set to 1, so rows sum to more than 1. Those kept patches whose
   attention is at the 0.55 quantile or above gather nothing: their features stay.
3. At the input of layer 16 the `final` tokens stay to which the last row attends most in the layer
   before, mean over heads. Without `final` a seventh of `keep` stays, as in the published settings.
Positions are the original ones throughout.

Deviations: any number of images, each with its own `keep`. The paper's saliency (attention times
norms of keys) and its second choice (by the cosine with the text) are not in the released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import on_device
from .base import Context, Keep, amount, count, option, top
from .margins import TINY, lead, least
from .order import need_all_patches
from .shared import TwoStages, check_whole_grid, second_last_block, window_patches

CELL = 2  # patches along a side of a cell
ALONE = 0.55  # quantile of attention from which on a patch gathers nothing


def best_of_cells(score: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """The `each` patches with the highest score (N,) of each cell of the grid: (cells * each,); and
    the least lead() of these choices."""
    cells = on_device(window_patches(round(len(score) ** 0.5), CELL), score)  # (cells, 4)
    ordered, order = score[cells].sort(dim=1, descending=True, stable=True)  # (cells, 4)
    closest = score.new_full((), torch.inf)
    if each < CELL**2:
        closest = (1 - ordered[:, each] / ordered[:, each - 1].clamp(min=TINY)).amin()
    return cells.gather(1, order[:, :each]).flatten(), closest


def gathering_weights(states: Tensor, score: Tensor, kept: Tensor, distance: float) -> Tensor:
    """w (K, N) of the patches `kept` (K,), from hidden states (N, C) and attention (N,)."""
    g = round(len(score) ** 0.5)
    places = torch.arange(len(score), device=score.device)
    places = torch.stack((places // g, places % g), 1).float()  # (N, 2)
    near = 1 - (torch.cdist(places[kept], places) / distance**0.5).clamp(max=1)  # (K, N)
    z, alone = F.normalize(states.float(), dim=1), score[kept] >= score[kept].quantile(ALONE)
    w = (z[kept] @ z.T).clamp(min=0) * near
    w = torch.where(alone[:, None], 0.0, w / (w.sum(1, keepdim=True) + 1e-8))
    return w.scatter(1, kept[:, None], 1.0)


def last_third(n_layers: int) -> range:
    """Numbers of the tower's hidden states in its last third: 16 to 24 of 24 blocks."""
    return range(round(n_layers * 2 / 3), n_layers + 1)


@dataclass(frozen=True)
class Nuwa(TwoStages):
    keep: float = amount(112, help="number or share kept before the decoder")
    layer: int = option(16, low=1, help="decoder layer of the second stage")
    cell: int = option(1, low=1, high=4, help="patches of a 2 x 2 cell that can be kept")
    distance: float = option(280, low=1, help="square of the distance from which nothing comes")

    name, drops_only, newest_row = "nuwa", False, True
    check_order = need_all_patches
    share: ClassVar[float] = 1 / 7

    def first_left(self, n_tokens: int) -> int:
        cells = (round(n_tokens**0.5) // CELL) ** 2
        return min(count(self.keep, n_tokens), cells * self.cell)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last_block(self.name, n_layers), *last_third(n_layers))

    def choose(self, c: Context) -> Keep:
        k = self.left(c.n_tokens)[c.stage_index]
        if c.stage_index == 1:
            score = c.attention(c.newest).mean(0)  # (H, n) -> (n,)
            return Keep(top(score, k, c.where), scores=score)
        check_whole_grid(c, self.name)
        if not k:
            return Keep(torch.arange(0))
        score, depth = c.vision_attention(-2).sum(0), len(c.model.vision.blocks)  # (N,)
        candidates, closest = best_of_cells(score, self.cell)
        kept = candidates[top(score[candidates], k, c.where)].sort().values  # (K,)
        states = [c.vision_state(i)[0, 1:] for i in last_third(depth)]  # (N, C) each
        features = c.features()
        weights = gathering_weights(torch.stack(states).mean(0), score, kept, self.distance)
        return Keep(
            kept,
            merged=weights.to(features.dtype) @ features,
            scores=score,
            closest=least(closest, lead(score[candidates], k)),
        )
