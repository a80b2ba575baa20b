"""Hand: keep the patches that a person names, to see what the answer needs.

hand:patches=3/7-12 keeps patch 3 and the patches 7 to 12 of each image; they count from 0, row by
row (scope=all: on through all images of the prompt). It acts after the projector, before decoder
layer 0; with layer=K on what enters layer K, to repeat the choice of a method that acts there. It
has no paper.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from .base import Context, Keep, Method, Stages, option


@dataclass(frozen=True)
class Hand(Method):
    patches: tuple[int, ...] = option(low=0, help="numbers of patches; 7-12 stands for 7/8/.../12")
    layer: int | None = option(None, help="decoder layer whose input is pruned")

    name, numbering = "hand", "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        for patch, times in Counter(self.patches).most_common(1):
            if times > 1:
                raise ValueError(f"hand: patches names {patch} twice; name each patch once")

    def stages(self) -> Stages:
        return (("embed", 0) if self.layer is None else ("decoder", self.layer),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if (most := max(self.patches, default=0)) >= n_tokens:
            raise ValueError(
                f"hand: patches names {most}, but the patches are 0 to {n_tokens - 1}; name these"
            )

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (len(self.patches),)

    def choose(self, c: Context) -> Keep:
        named = torch.tensor(self.patches, dtype=torch.long)
        return Keep(torch.isin(c.patches, named).nonzero()[:, 0])
