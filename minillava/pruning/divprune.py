"""DivPrune: keep the image tokens that lie farthest apart.

Alvar et al., CVPR 2025, arXiv 2503.02175. Released code: vbdi/divprune 799e2d9,
LLaVA/llava/model/llava_arch.py, DivPrune. After the projector, before layer 0, the distance of two
tokens is 1 - cosine of their projected features. The first token chosen is the one whose nearest
neighbour is farthest away; each further one is the token whose nearest chosen token is farthest
away (max-min). round(keep * N) tokens stay, in reading order, and are renumbered.

Deviations: a chosen token is never chosen again (the released code relies on its distance to itself
being the smallest, which fails once only duplicates are left). Distances are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Keep
from .margins import COSINE, Picks
from .shared import BeforeDecoder, cosines


def choose_farthest(distance: Tensor, keep: int) -> Picks:
    """Greedy max-min choice by distances (n, n)."""
    picks = Picks(len(distance), min(keep, len(distance)), distance.device)
    two = min(2, len(distance))
    gap = distance.topk(two, dim=0, largest=False).values[-1]  # (n,) to the nearest neighbour
    for i in range(len(picks.order)):
        pick = picks.take(i, gap)
        row = distance[pick][0]
        gap = row if i == 0 else torch.minimum(gap, row)
        gap = gap.index_fill(0, picks.order[: i + 1], -torch.inf)
    return picks


@dataclass(frozen=True)
class DivPrune(BeforeDecoder):
    name = "divprune"
    stage = "embed"

    def choose(self, c: Context) -> Keep:
        (keep,) = self.left(c.n_tokens)
        features = c.features()
        return choose_farthest(1 - cosines(features, features, c.where), keep).keep(scale=COSINE)
