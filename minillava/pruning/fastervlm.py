"""FasterVLM: keep the patches that the vision tower's class token attends to.

Zhang et al., arXiv 2412.01818 v1. Released code: Theia-4869/FasterVLM f5d5f12,
llava/model/llava_arch.py, encode_images. After the vision tower, before the projector, patches are
ranked by the attention that they receive from the class token in the second-last block (whose
output LLaVA reads), mean over heads. The best `keep` stay, in reading order, and are renumbered.

Deviations: scores are float32, and ties go to the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep, top
from .shared import BeforeDecoder, second_last_block


@dataclass(frozen=True)
class FasterVLM(BeforeDecoder):
    name = "fastervlm"

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last_block(self.name, n_layers),)

    def choose(self, c: Context) -> Keep:
        (keep,) = self.left(c.n_tokens)
        score = c.vision_attention(-2).mean(0)  # (H, n) -> (n,)
        return Keep(top(score, keep, c.where), scores=score)
