"""VisPruner: half by the class token's attention, half by not resembling each other.

Zhang et al., ICCV 2025, arXiv 2412.01818 v2. Released code: Theia-4869/VisPruner aefa01a,
llava/model/llava_arch.py, encode_images. Between vision tower and projector:

important: the int(T * important) patches with the largest mean over heads of the class token's
attention in the second last block. diverse: the others as a list, by falling attention; while it
is too long, halve it into even and odd places, and drop the min(8, surplus) even ones with the
largest cosine (features before the projector) to an odd one. The next list is what is left of the
even ones, in the order of falling cosine, then the odd ones: that order decides the next round, so
that two cosines that are equal in float32 can change much of the choice.
All that stay are in reading order and numbered anew.

Deviations: most lists of odd length break the released code (a few leave one token too few), and so
do short ones; here the even half is the longer one, and is dropped whole if it has fewer than 8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, top
from .shared import RELEASED_TOO, Budget, attention, cosines, second_last

AT_ONCE = 8


def distinct(likeness: Tensor, order: Tensor, keep: int) -> Tensor:
    """Thin out a list of rows (R,) to `keep` of them; likeness (n, n) of all rows."""
    if keep == 0:
        return order[:0]
    while len(order) > keep:
        even, odd = order[::2], order[1::2]
        q = min(AT_ONCE, len(order) - keep)  # more than there are even ones: all of them
        closest = likeness[even[:, None], odd].amax(1)
        rank = closest.sort(descending=True, stable=True).indices
        order = torch.cat((even[rank[q:]], odd))
    return order


@dataclass(frozen=True)
class VisPruner(Budget):
    important: float = field(default=0.5, metadata={"help": "share of them kept by attention"})

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "VisPruner, ICCV 2025, arXiv 2412.01818 v2"
    source: ClassVar[str] = "Theia-4869/VisPruner aefa01a, llava_arch.py"
    acts: ClassVar[str] = "after the vision tower, before the projector"
    checked: ClassVar[str] = RELEASED_TOO

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"vispruner: important={self.important} must be from 0 to 1")

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last(self.name, n_layers),)

    def choose(self, c: Context) -> Keep:
        features, n = c.features(), len(c.patches)
        keep = min(self.amount(c.total), n)
        order = top(attention(c, -2), n, c.what)
        first = int(keep * self.important)
        rest = distinct(cosines(features, features, c.what), order[first:], keep - first)
        return Keep(torch.cat((order[:first], rest)))
