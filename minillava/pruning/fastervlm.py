"""FasterVLM: keep the patches that the vision tower's class token attends to; also VTC-CLS.

Zhang et al., arXiv 2412.01818 v1. Released code: Theia-4869/FasterVLM f5d5f12,
llava/model/llava_arch.py, encode_images. After the vision tower, before the projector, patches are
ranked by the attention that they receive from the class token in the second-last block (whose
output LLaVA reads), mean over heads. The best `keep` stay, in reading order, and are renumbered.

blocks=16-22 sums this attention over the blocks 16 to 22, counted from 0, as VTC-CLS does (Wang et
al., arXiv 2412.05819; THU-MIG/VTC-CLS e41ac9b, clip_encoder.py, cls_token_only, from its
start_layer to the second-last block). A list is written 14/16-22.

Deviations: scores are float32, and ties go to the lower index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .base import Context, Keep, option, top
from .order import need_patches
from .shared import BeforeDecoder, second_last_block


@dataclass(frozen=True)
class FasterVLM(BeforeDecoder):
    blocks: str | None = option(None, help="blocks whose attention is summed, such as 16-22")

    name = "fastervlm"
    check_order = need_patches

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and not self.block_numbers(0):
            raise ValueError(
                f"fastervlm: blocks={self.blocks} must be numbers and ranges, such as 14/16-22"
            )

    def block_numbers(self, n_blocks: int) -> list[int]:
        """The numbers that `blocks` names, ascending; without it that of the second-last block."""
        if self.blocks is None:
            return [second_last_block(self.name, n_blocks)]
        numbers: set[int] = set()
        for part in self.blocks.split("/"):
            found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part, re.ASCII)
            if found is None:
                return []
            numbers |= {*range(int(found[1]), int(found[2] or found[1]) + 1)}
        return sorted(numbers)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        numbers = self.block_numbers(n_layers)
        if numbers[-1] >= n_layers:
            raise ValueError(
                f"fastervlm: blocks={self.blocks}, but the vision tower has blocks 0 to "
                f"{n_layers - 1}; give some of these"
            )
        return tuple(numbers)

    def choose(self, c: Context) -> Keep:
        (keep,) = self.left(c.n_tokens)
        blocks = self.block_numbers(len(c.model.vision.blocks))
        each = torch.stack([c.vision_attention(block).mean(0) for block in blocks])  # (b, n)
        score = each.sum(0)  # (n,)
        return Keep(top(score, keep, c.where), scores=score)
