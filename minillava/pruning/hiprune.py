"""HiPrune: patches the middle of the vision tower looks at, their neighbours, and the end's choice.

Liu et al., ACL 2026 Findings, arXiv 2508.00553. Released code: Danielement321/HiPrune,
LLaVA/llava/model/llava_arch.py, encode_images. Between vision tower and projector, from the
attention each patch receives, mean over heads and over all queries (no class token is needed):
anchors: the round(T * alpha / 5) best in a middle block; buffers: the four neighbours of each, by
number (the left one of a row's first patch is the last of the row above; beyond the picture's ends
the end is taken); registers: the best others in the second last block, up to T in all. Kept in
reading order, numbered anew.

`block` counts from 0: 8 of 24 is the paper's object layer 9; a tower of another depth has it at the
same share unless told otherwise. Deviation: a budget too small for the anchors' neighbours is
refused where the released code breaks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, top
from .shared import RELEASED_TOO, Budget, attention, block_number, depth, patches, second_last


def neighbourhood(anchors: Tensor, grid: int) -> Tensor:
    """Anchors (a,) and their neighbours, (5 * a,), with repetitions; each in its own picture."""
    N = grid * grid
    steps = torch.tensor([0, -1, 1, -grid, grid], device=anchors.device)
    return (anchors // N * N + (anchors % N + steps[:, None]).clamp(0, N - 1)).flatten()


@dataclass(frozen=True)
class HiPrune(Budget):
    alpha: float = field(default=0.1, metadata={"help": "share of anchors and buffers"})
    block: int | None = field(
        default=None, metadata={"help": "block of the anchors, from 0; 8 of 24"}
    )

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "HiPrune, ACL 2026 Findings, arXiv 2508.00553"
    source: ClassVar[str] = "Danielement321/HiPrune, llava_arch.py (read in a fork, 78324f3)"
    acts: ClassVar[str] = "after the vision tower, before the projector"
    checked: ClassVar[str] = RELEASED_TOO

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"hiprune: alpha={self.alpha} must be from 0 to 1")

    def anchors(self, keep: int) -> int:
        return round(keep * self.alpha / 5)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        keep = self.amount(n_tokens)
        if 5 * self.anchors(keep) > keep:
            raise ValueError(
                f"hiprune: alpha={self.alpha} takes {self.anchors(keep)} anchors with 4 neighbours "
                f"each, more than keep={keep}; use a smaller alpha, for example 0.1"
            )

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        last = second_last(self.name, n_layers)
        return (self.middle(n_layers), last)

    def middle(self, n_layers: int) -> int:
        return block_number(self.name, self.block, n_layers, released=8)

    def choose(self, c: Context) -> Keep:
        keep, here = self.amount(c.total), patches(c)
        objects = attention(c, self.middle(depth(c)), "mean")  # (n,)
        end = attention(c, -2, "mean")
        near = neighbourhood(here[top(objects, self.anchors(keep), c.what)], c.grid)
        chosen = torch.isin(here, near).nonzero()[:, 0]
        others = end.index_fill(0, chosen, -torch.inf)
        more = min(keep, len(here)) - len(chosen)
        return Keep(torch.cat((chosen, top(others, max(0, more), c.what))))
