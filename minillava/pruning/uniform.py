"""Uniform: keep evenly spaced image tokens in reading order, a baseline.

It acts after the projector, before layer 0. Token i of k is candidate floor((i + 0.5) n / k) of n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Context, Keep
from .shared import BeforeDecoder


@dataclass(frozen=True)
class Uniform(BeforeDecoder):
    name, numbering = "uniform", "original"
    stage = "embed"

    def choose(self, c: Context) -> Keep:
        n = len(c.candidates)
        k = min(self.left(c.n_tokens)[0], n)
        i = torch.arange(k)
        return Keep((2 * i + 1) * n // (2 * max(k, 1)))
