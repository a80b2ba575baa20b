"""Choices that look at nothing: what every method has to beat.

`random`: T of N without replacement, drawn once per generation and sample from its seed (FastV's
released K=0 draws anew at every forward). `uniform`: evenly spaced in reading order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .base import Context, Keep, Method, Stage, check_amount, check_keep, count


@dataclass(frozen=True)
class _Baseline(Method):
    keep: float = field(metadata={"help": "number or share kept"})

    acts: ClassVar[str] = "after the projector, before layer 0"
    identity: ClassVar[str | None] = "keep=1.0"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.name, self.keep)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("embed", 0),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        check_keep(self.name, self.keep, n_tokens)

    def most(self, n_tokens: int) -> int:
        return count(self.keep, n_tokens)


@dataclass(frozen=True)
class Random(_Baseline):
    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"
    checked: ClassVar[str] = "properties"

    def choose(self, c: Context) -> Keep:
        order = torch.randperm(len(c.patches), generator=c.generator)
        return Keep(order[: count(self.keep, c.total)].to(c.patches.device))


@dataclass(frozen=True)
class Uniform(_Baseline):
    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"
    checked: ClassVar[str] = "properties"

    def choose(self, c: Context) -> Keep:
        n = len(c.patches)
        k = min(count(self.keep, c.total), n)
        steps = torch.arange(k, device=c.patches.device)
        return Keep((2 * steps + 1) * n // (2 * max(k, 1)))  # floor((i + 0.5) n / k)
