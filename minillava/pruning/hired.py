"""HiRED on LLaVA-1.5: FasterVLM's rule, with a share cut to a whole number of tokens.

Arif et al., AAAI 2025, arXiv 2408.10945. Released code: hasanar1f/HiRED 502d6dd,
modeling_llava.py, HiRED_token_selection. HiRED's own idea, a budget for each crop of a large image,
needs LLaVA-NeXT. On LLaVA-1.5 it ranks the patches by the class token's attention in the
second-last block, as FasterVLM does; it sums over heads where FasterVLM takes the mean, which gives
the same order. int(N * keep) tokens stay: keep=0.23 of 16 tokens is 3, where FasterVLM keeps 4.

Deviations: scores are float32, and ties go to the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep, top
from .shared import ByClassToken, count_down


@dataclass(frozen=True)
class HiRED(ByClassToken):
    name = "hired"

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count_down(self.keep, n_tokens),)

    def choose(self, c: Context) -> Keep:
        score = c.vision_attention(-2).sum(0)  # (H, n) -> (n,)
        return Keep(top(score, self.left(c.n_tokens)[0], c.where), scores=score)
