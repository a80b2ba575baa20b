"""VisPruner: keep half by the class token's attention, and half by unlikeness to each other.

Zhang et al., ICCV 2025, arXiv 2412.01818 v2; Theia-4869/VisPruner aefa01a, llava_arch.py. Before
the projector int(T * important) of T = keep patches are those with most attention from the class
token in the second-last block, mean over heads. The others form a list by descending attention.
While it is too long, it is split into its even and odd places, and the min(8, surplus) even ones
with the largest cosine (of features) to any odd one are dropped. The next list is the rest of the
even ones, by descending cosine, then the odd ones. All are in reading order and are renumbered.

Deviation: the released code breaks on short lists and on most lists of odd length. Here the even
half of an odd list is the longer one, and a half of fewer than 8 can be dropped whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Keep, option, top
from .margins import COSINE, lead, least, least_gap
from .shared import ByClassToken, mark_nan, unchecked_cosines

DROPPED_PER_ROUND = 8


def thin_out(similarity: Tensor, order: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Shorten a list of rows (R,) to `keep` rows (keep,), by the similarity (n, n) of all rows; and
    the least_gap() of what a round ranked."""
    gap = similarity.new_full((), torch.inf)
    if keep == 0:
        return order[:0], gap
    while len(order) > keep:
        even, odd = order[::2], order[1::2]
        n_dropped = min(DROPPED_PER_ROUND, len(order) - keep)
        closest = similarity[even[:, None], odd].amax(1)
        rank = closest.sort(descending=True, stable=True).indices
        order = torch.cat((even[rank[n_dropped:]], odd))
        gap = torch.minimum(gap, least_gap(closest, scale=COSINE))
    return order, gap


@dataclass(frozen=True)
class VisPruner(ByClassToken):
    important: float = option(0.5, low=0, high=1, help="share of them kept by attention")

    name = "vispruner"

    def choose(self, c: Context) -> Keep:
        features, n = c.features(), len(c.candidates)
        keep = min(self.left(c.n_tokens)[0], n)
        score = mark_nan(c.vision_attention(-2).mean(0), features)  # (H, n) -> (n,)
        order = top(score, n, c.where)
        n_important = int(keep * self.important)
        similarity = unchecked_cosines(features, features)  # (n, n)
        diverse, gap = thin_out(similarity, order[n_important:], keep - n_important)
        closest = lead(score, n_important)
        if 0 < len(diverse) < n - n_important:  # the whole order of the others decided
            closest = least(closest, least_gap(score[order[n_important:]]), gap)
        return Keep(torch.cat((order[:n_important], diverse)), scores=score, closest=closest)
