"""Baselines that look at neither image nor text, for every method to beat.

They act after the projector, before layer 0, and have no paper. `random` keeps `keep` of the N
image tokens, drawn without replacement from the generator of the sample, once per generation
(FastV's released K=0 draws anew in every forward pass). `uniform` keeps evenly spaced tokens in
reading order. `text-only` keeps no image token. Two more baselines are in grid.py and pool.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Context, Keep, Method, Stages
from .shared import BeforeDecoder


@dataclass(frozen=True)
class Random(BeforeDecoder):
    name, numbering = "random", "original"
    stage = "embed"

    def choose(self, c: Context) -> Keep:
        (k,) = self.left(c.n_tokens)
        return Keep(c.shuffled()[:k])


@dataclass(frozen=True)
class Uniform(BeforeDecoder):
    name, numbering = "uniform", "original"
    stage = "embed"

    def choose(self, c: Context) -> Keep:
        n = len(c.candidates)
        k = min(self.left(c.n_tokens)[0], n)
        i = torch.arange(k, device=c.candidates.device)
        return Keep((2 * i + 1) * n // (2 * max(k, 1)))  # floor((i + 0.5) n / k)


@dataclass(frozen=True)
class TextOnly(Method):
    name, numbering = "text-only", "compact"

    def stages(self) -> Stages:
        return (("embed", 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (0,)

    def choose(self, c: Context) -> Keep:
        return Keep(c.candidates[:0])
