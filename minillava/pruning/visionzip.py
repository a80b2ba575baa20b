"""VisionZip: keep what the class token attends to, and fold the rest into a few tokens.

Yang et al., CVPR 2025, arXiv 2412.04467. Released code: JIA-Lab-research/VisionZip 3151f6d,
visionzip/clip_encoder.py, CLIPVisionTower_VisionZip.forward. Between vision tower and projector:

dominant: the class token itself, and the dominant - 1 patches with the largest sum over heads of
the class token's attention in the second last block. contextual: of the n others, in reading order,
every max(1, n // contextual)-th is a target, `contextual` at most; the rest goes to the target with
the most similar key (mean over heads, same block, cosine). A target becomes its own feature PLUS
the mean of what was assigned to it: a sum, as released, where the paper speaks of merging.

Order: class token, dominant patches, targets, each in reading order; numbered anew. Deviations:
attention in float32; a fixed order of ties; contextual=0 is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, Method, Stage, top
from .shared import assigned, cosines, patches, second_last


def targets(n: int, contextual: int) -> Tensor:
    """Which of n remaining patches others are folded into."""
    return torch.arange(n)[:: max(1, n // max(1, contextual))][:contextual]


def fold(features: Tensor, likeness: Tensor, at: Tensor) -> Tensor:
    """Targets, rows `at` of features (n, C), with the others folded in: (k, C); likeness (n, k)."""
    into = assigned(likeness.argmax(1), len(at), features.dtype)  # (k, n)
    into[:, at] = 0  # targets are not assigned to anything
    return features[at] + into @ features / into.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class VisionZip(Method):
    dominant: int = field(metadata={"help": "tokens kept, the class token among them"})
    contextual: int = field(metadata={"help": "tokens the others are folded into"})

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, CVPR 2025, arXiv 2412.04467"
    source: ClassVar[str] = "JIA-Lab-research/VisionZip 3151f6d, visionzip/clip_encoder.py"
    acts: ClassVar[str] = "after the vision tower, before the projector"
    checked: ClassVar[str] = "outputs of the released code (tests/goldens/visionzip)"
    drops_only: ClassVar[bool] = False
    numbering: ClassVar[str] = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dominant < 1 or self.contextual < 0:
            raise ValueError(
                f"visionzip: dominant={self.dominant}, contextual={self.contextual}; dominant must "
                "be at least 1 (the class token), contextual at least 0"
            )

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("vision", 0),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if self.dominant - 1 + self.contextual > n_tokens:
            raise ValueError(
                f"visionzip: dominant={self.dominant} (with the class token) and contextual="
                f"{self.contextual} want more than the {n_tokens} image tokens there are"
            )

    def most(self, n_tokens: int) -> int:
        return self.dominant + self.contextual

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last(self.name, n_layers),)

    def choose(self, c: Context) -> Keep:
        vision, features, here = c.vision(), c.features(), patches(c)
        block = len(vision.tower.blocks) - 2
        score = vision.attention(block).sum(0)[here]  # (n,)
        dominant = top(score, self.dominant - 1, c.what).sort().values
        is_rest = torch.ones_like(here, dtype=torch.bool).index_fill(0, dominant, False)
        rest = is_rest.nonzero()[:, 0]
        at = targets(len(rest), self.contextual).to(rest.device)
        kept, merged = features[dominant], features[:0]
        if len(at):
            keys = vision.keys(block).mean(1)[here[rest]]  # (r, Dh)
            merged = fold(features[rest], cosines(keys, keys[at], c.what), at)
        return Keep(
            torch.cat((dominant, rest[at])),
            rows=torch.cat((kept, merged)),
            extra=vision.class_token(),
            extra_first=True,
            ordered=True,
        )
