"""Random: keep image tokens drawn at random, the baseline that every method has to beat.

It acts after the projector, before layer 0. `keep` of the N image tokens are drawn without
replacement from the sample's generator, once per generation; FastV's released K=0 draws again in
every forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep
from .shared import BeforeDecoder


@dataclass(frozen=True)
class Random(BeforeDecoder):
    name, numbering = "random", "original"
    stage = "embed"

    def choose(self, c: Context) -> Keep:
        (k,) = self.left(c.n_tokens)
        return Keep(c.shuffled()[:k])
