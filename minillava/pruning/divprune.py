"""DivPrune: keep the tokens that lie farthest apart.

Alvar et al., CVPR 2025, arXiv 2503.02175. Released code: vbdi/divprune 799e2d9,
LLaVA/llava/model/llava_arch.py, DivPrune. After the projector, before layer 0: distance = 1 -
cosine of the projected features. First the token whose nearest neighbour is farthest away, then
always the one whose nearest chosen one is (max-min). T = round(share * N); those kept are in
reading order and numbered anew.

Deviations: a chosen token is never chosen again (the released code relies on its distance to itself
being the smallest, which fails once all that are left are duplicates); float32 distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, Stage
from .shared import Budget, cosines


def farthest(distance: Tensor, keep: int) -> Tensor:
    """Greedy choice by distances (n, n), in the order in which it is made: (keep,)."""
    chosen = torch.empty(min(keep, len(distance)), dtype=torch.long, device=distance.device)
    two = min(2, len(distance))
    gap = distance.topk(two, dim=0, largest=False).values[-1]  # (n,) to the nearest neighbour
    for i in range(len(chosen)):
        chosen[i] = pick = gap.argmax()
        gap = distance[pick] if i == 0 else torch.minimum(gap, distance[pick])
        gap = gap.index_fill(0, chosen[: i + 1], -torch.inf)
    return chosen


@dataclass(frozen=True)
class DivPrune(Budget):
    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, CVPR 2025, arXiv 2503.02175"
    source: ClassVar[str] = "vbdi/divprune 799e2d9, llava_arch.py"
    acts: ClassVar[str] = "after the projector, before layer 0"
    checked: ClassVar[str] = "outputs of the released code (tests/goldens/divprune)"
    stage: ClassVar[Stage] = "embed"

    def choose(self, c: Context) -> Keep:
        features = c.features()
        return Keep(farthest(1 - cosines(features, features, c.what), self.amount(c.total)))
