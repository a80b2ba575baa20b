"""HiPrune: keep what a middle block of the vision tower attends to, and what a late block does.

Liu et al., ACL 2026 Findings, arXiv 2508.00553; Danielement321/HiPrune, llava_arch.py. Patches are
ranked by the attention that they receive, mean over heads and all queries. Of T = keep, the
round(T * alpha / 5) best in `block` (from 0: the paper's object layer 9 is 8) are anchors, which
bring their four neighbours by number: these wrap around rows. The best of the others in the
second-last block are registers. All stay in reading order and are renumbered.

Deviation: a `keep` too small for the anchors is refused, where the released code breaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Context, Keep, option, top
from .margins import lead, least
from .order import need_patches
from .shared import BeforeDecoder, block_number, second_last_block, with_neighbours


@dataclass(frozen=True)
class HiPrune(BeforeDecoder):
    alpha: float = option(0.1, low=0, high=1, help="share of anchors and buffers")
    block: int | None = option(None, help="block of the anchors, from 0; 8 of 24")

    name, check_order = "hiprune", need_patches

    def n_anchors(self, keep: int) -> int:
        return round(keep * self.alpha / 5)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        (keep,) = self.left(n_tokens)
        if 5 * (n := self.n_anchors(keep)) > keep:
            raise ValueError(
                f"hiprune: alpha={self.alpha} takes {n} anchors with 4 neighbours each, more than "
                f"keep={keep}; use a smaller alpha, for example 0.1"
            )

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        middle = block_number(self.name, self.block, n_layers, released=8)
        return middle, second_last_block(self.name, n_layers)

    def choose(self, c: Context) -> Keep:
        (keep,), patches = self.left(c.n_tokens), c.whole_patches()
        blocks = self.vision_layers(len(c.model.vision.blocks))
        received = [c.vision_attention(block, "mean").mean(0) for block in blocks]
        score, late = torch.stack(received).cpu()  # (n,) each
        anchors = patches[top(score, self.n_anchors(keep), c.where)]
        near = torch.isin(patches, with_neighbours(anchors, c.grid)).nonzero()[:, 0]
        others, n = late.index_fill(0, near, -torch.inf), max(0, min(keep, len(late)) - len(near))
        registers, leads = top(others, n, c.where), (lead(score, len(anchors)), lead(others, n))
        return Keep(torch.cat((near, registers)), scores=late, closest=least(*leads))
