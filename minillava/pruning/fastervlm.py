"""FasterVLM, and HiRED on LLaVA-1.5: keep the patches that the class token attends to.

FasterVLM: Zhang et al., arXiv 2412.01818 v1. Released code: Theia-4869/FasterVLM f5d5f12,
llava/model/llava_arch.py, encode_images. HiRED: Arif et al., AAAI 2025, arXiv 2408.10945. Released
code: hasanar1f/HiRED 502d6dd, modeling_llava.py, HiRED_token_selection.

After the vision tower, before the projector: the class token's attention in the second last block
(whose output LLaVA reads), mean (FasterVLM) or sum (HiRED) over heads, which ranks the same. The
best T stay in reading order and are numbered anew. HiRED's own idea, a budget over the crops of a
large picture, needs LLaVA-NeXT; on LLaVA-1.5 it is this rule, with T = int(N * share).

Deviations: none but float32 scores, and a fixed order of ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Context, Keep, top
from .shared import RELEASED_TOO, Budget, attention, second_last


@dataclass(frozen=True)
class FasterVLM(Budget):
    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818 v1"
    source: ClassVar[str] = "Theia-4869/FasterVLM f5d5f12, llava_arch.py"
    acts: ClassVar[str] = "after the vision tower, before the projector"
    checked: ClassVar[str] = RELEASED_TOO

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last(self.name, n_layers),)

    def choose(self, c: Context) -> Keep:
        return Keep(top(attention(c, -2), self.amount(c.total), c.what))


@dataclass(frozen=True)
class HiRED(FasterVLM):
    name: ClassVar[str] = "hired"
    paper: ClassVar[str] = "HiRED, AAAI 2025, arXiv 2408.10945"
    source: ClassVar[str] = "hasanar1f/HiRED 502d6dd, modeling_llava.py"

    def amount(self, total: int) -> int:
        """A share is cut to a whole number, as released."""
        cut = self.keep if isinstance(self.keep, int) else int(total * self.keep)
        return cut if self.keep == 0 else max(1, cut)
