"""FasterVLM: keep the patches that the vision tower's class token attends to; also VTC-CLS.

Zhang et al., arXiv 2412.01818 v1; Theia-4869/FasterVLM f5d5f12, llava_arch.py. Before the projector
the `keep` patches stay that receive most attention from the class token in the second-last block,
mean over heads, in reading order, and are renumbered. blocks=16-22 (or 14/16-22) sums it over the
blocks 16 to 22, counted from 0, as VTC-CLS does (Wang et al., arXiv 2412.05819; THU-MIG/VTC-CLS
e41ac9b, clip_encoder.py, from its start_layer to the second-last block).

Deviations: scores are float32, and ties go to the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Context, Keep, option, top
from .shared import ByClassToken, second_last_block


@dataclass(frozen=True)
class FasterVLM(ByClassToken):
    blocks: tuple[int, ...] | None = option(
        None, low=0, help="blocks whose attention is summed, such as 16-22"
    )

    name = "fastervlm"

    def block_numbers(self, n_blocks: int) -> list[int]:
        """Those of `blocks`, ascending; without it that of the second-last block."""
        return sorted({*(self.blocks or [second_last_block(self.name, n_blocks)])})

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        numbers = self.block_numbers(n_layers)
        if numbers[-1] >= n_layers:
            raise ValueError(
                f"fastervlm: blocks names {numbers[-1]}, but the vision tower has blocks 0 to "
                f"{n_layers - 1}; give some of these"
            )
        return tuple(numbers)

    def choose(self, c: Context) -> Keep:
        (keep,) = self.left(c.n_tokens)
        blocks = self.block_numbers(len(c.model.vision.blocks))
        each = torch.stack([c.vision_attention(block).mean(0) for block in blocks])  # (b, n)
        score = each.sum(0)  # (n,)
        return Keep(top(score, keep, c.where), scores=score)
