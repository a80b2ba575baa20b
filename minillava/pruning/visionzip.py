"""VisionZip: keep what the class token attends to, and merge the rest into a few tokens.

Yang et al., CVPR 2025, arXiv 2412.04467. Released code: JIA-Lab-research/VisionZip 3151f6d,
visionzip/clip_encoder.py, CLIPVisionTower_VisionZip.forward. Between vision tower and projector:
- dominant: the class token itself, and the dominant - 1 patches that receive most attention from
  it in the second-last block, summed over heads;
- contextual: of the n other patches, in reading order, every max(1, n // contextual)-th is a
  target, up to `contextual` targets. Each of the rest is assigned to the target with the most
  similar key (mean over heads, same block, cosine). A target becomes its own feature PLUS the mean
  of those assigned to it: a sum, as released, where the paper speaks of merging.
The order is class token, dominant patches, targets, each in reading order, and rows are renumbered.

Deviations: attention is float32, ties go to the lower index, and contextual=0 is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rows import on_device
from .base import Context, Keep, Method, Stages, option, top
from .margins import lead
from .order import need_patches
from .shared import assignment, mark_nan, other_numbers, second_last_block, unchecked_cosines


def target_indices(n: int, contextual: int) -> Tensor:
    """Which of n remaining patches are targets, at most `contextual` of them."""
    return torch.arange(n)[:: max(1, n // max(1, contextual))][:contextual]


def merge_into_targets(features: Tensor, nearest: Tensor, targets: Tensor) -> Tensor:
    """Rows `targets` (k,) of features (n, C) plus the mean of the others that are nearest to each,
    by the number nearest (n,) of a target: (k, C)."""
    into = assignment(nearest, len(targets), features.dtype)  # (k, n)
    into[:, targets] = 0  # targets are not assigned to anything
    return features[targets] + into @ features / into.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class VisionZip(Method):
    dominant: int = option(low=1, help="tokens kept, the class token among them")
    contextual: int = option(low=0, help="tokens the others are merged into")

    name, drops_only, numbering, adds_rows = "visionzip", False, "compact", True
    check_order = need_patches

    def stages(self) -> Stages:
        return (("vision", 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (self.dominant + self.contextual,)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[VisionZip]:
        # the two in the same proportion, as in the paper: 54 + 10, 108 + 20, 162 + 30
        share = self.contextual / (self.dominant + self.contextual)
        for k in range(1, n_tokens + 2):  # with the class token
            contextual = min(round(k * share), k - 1)
            yield replace(self, dominant=k - contextual, contextual=contextual)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if self.dominant - 1 + self.contextual > n_tokens:
            raise ValueError(
                f"visionzip: dominant={self.dominant} (with the class token) and contextual="
                f"{self.contextual} want more than the {n_tokens} image tokens there are"
            )

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last_block(self.name, n_layers),)

    def choose(self, c: Context) -> Keep:
        features, keys = c.features(), c.vision_keys(-2).mean(1)  # (n, C), (n, Dh)
        score = mark_nan(c.vision_attention(-2).sum(0), keys).cpu()  # (n,)
        dominant = top(score, self.dominant - 1, c.where).sort().values
        rest = other_numbers(len(score), dominant)
        targets = target_indices(len(rest), self.contextual)
        index = torch.cat((dominant, rest[targets]))
        first, rest, targets, kept = (
            on_device(i, features) for i in (dominant, rest, targets, index)
        )
        merged, into = features[:0], None
        if len(targets):
            keys = keys[rest]  # (r, Dh)
            nearest = unchecked_cosines(keys, keys[targets]).argmax(1)  # (r,)
            merged = merge_into_targets(features[rest], nearest, targets)
            into = rest.new_full((len(features),), -1).index_copy(0, rest, len(first) + nearest)
            into = into.index_fill(0, kept, -1)
        return Keep(
            index,
            merged=torch.cat((features[first], merged)),
            extra=c.vision_state()[:, 0],  # the class token
            extra_first=True,
            ordered=True,
            scores=score,
            merged_into=into,
            closest=lead(score, len(dominant)),  # the others are taken by their place
        )
