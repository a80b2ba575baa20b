"""Choices that look at nothing: what every method has to beat.

`random`: T of N without replacement, drawn once per generation and sample from its seed (FastV's
released K=0 draws anew at every forward). `uniform`: evenly spaced in reading order. `grid`: evenly
spaced in both directions, h rows of w patches, the nearest to the middle of each of h x w cells;
`pool`: the mean of each cell's projected features instead. `keep` for these two is cut into about
as many rows as columns, rows of one length as far as the number allows. `text-only`: no image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, Method, Stage, check_amount, count
from .shared import Budget, whole_grid


@dataclass(frozen=True)
class _Baseline(Budget):
    paper: ClassVar[str] = "baseline"
    acts: ClassVar[str] = "after the projector, before layer 0"
    checked: ClassVar[str] = "properties"
    numbering: ClassVar[str] = "original"
    stage: ClassVar[Stage] = "embed"


@dataclass(frozen=True)
class Random(_Baseline):
    name: ClassVar[str] = "random"

    def choose(self, c: Context) -> Keep:
        order = torch.randperm(len(c.patches), generator=c.generator)
        return Keep(order[: self.amount(c.total)].to(c.patches.device))


@dataclass(frozen=True)
class Uniform(_Baseline):
    name: ClassVar[str] = "uniform"

    def choose(self, c: Context) -> Keep:
        n = len(c.patches)
        k = min(self.amount(c.total), n)
        steps = torch.arange(k, device=c.patches.device)
        return Keep((2 * steps + 1) * n // (2 * max(k, 1)))  # floor((i + 0.5) n / k)


def layout(widths: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A square in bands, band i in widths[i] cells: of each cell (K,) its band, its place in the
    band, and how many the band has."""
    n = torch.tensor(widths, dtype=torch.long, device=device)
    i = torch.arange(len(n), device=device).repeat_interleave(n)
    j = torch.arange(len(i), device=device) - (n.cumsum(0) - n)[i]
    return i, j, n[i]


def middles(widths: list[int], grid: int, device: torch.device) -> Tensor:
    """The patch (K,) at the middle of each cell: row floor((i + 0.5) grid / h), and so across."""
    (i, j, w), h = layout(widths, device), max(1, len(widths))
    return (2 * i + 1) * grid // (2 * h) * grid + (2 * j + 1) * grid // (2 * w)


def insides(widths: list[int], grid: int, device: torch.device) -> Tensor:
    """Which patches each cell covers: (K, grid * grid) bool. Cells overlap by a patch where the
    grid cannot be divided, as in adaptive pooling."""
    (i, j, w), h = layout(widths, device), max(1, len(widths))
    at = torch.arange(grid, device=device)

    def band(place: Tensor, parts: Tensor) -> Tensor:  # (K, grid)
        start, stop = place * grid // parts, -(-(place + 1) * grid // parts)
        return (start[:, None] <= at) & (at < stop[:, None])

    return (band(i, torch.full_like(i, h))[:, :, None] & band(j, w)[:, None]).flatten(1)


def bands(keep: int, grid: int) -> list[int]:
    """`keep` cells in rows whose number comes near to their length."""
    if not keep:
        return []
    even = [h for h in range(1, grid + 1) if not keep % h and h <= keep // h <= min(2 * h, grid)]
    h = max(even, default=min(grid, max(round(keep**0.5), -(-keep // grid))))
    return [(i + 1) * keep // h - i * keep // h for i in range(h)]


@dataclass(frozen=True)
class Grid(Method):
    keep: float | None = field(default=None, metadata={"help": "number or share kept"})
    h: int | None = field(default=None, metadata={"help": "rows, with w= instead of keep"})
    w: int | None = field(default=None, metadata={"help": "patches in a row"})

    name: ClassVar[str] = "grid"
    paper: ClassVar[str] = "baseline"
    acts: ClassVar[str] = "after the projector, before layer 0"
    checked: ClassVar[str] = "an independent reference"
    identity: ClassVar[str | None] = "keep=1.0"
    numbering: ClassVar[str] = "compact"
    either: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset(("keep", "h")),
        frozenset(("keep", "w")),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.h is None) != (self.w is None) or (self.keep is None) == (self.h is None):
            raise ValueError(
                f"{self.name} needs keep=, or h= and w=, for example {self.name}:h=8,w=8"
            )
        if self.keep is not None:
            check_amount(self.name, self.keep)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("embed", 0),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        side = round((n_tokens / (len(starts) if self.scope == "all" else 1)) ** 0.5)
        for key, value in (("h", self.h), ("w", self.w)):
            if value is not None and not 1 <= value <= side:
                raise ValueError(f"{self.name}: {key}={value} must be from 1 to {side}")

    def most(self, n_tokens: int) -> int:
        if self.keep is not None:
            return count(self.keep, n_tokens)
        assert self.h is not None
        assert self.w is not None
        return n_tokens if self.scope == "all" else self.h * self.w

    def widths(self, c: Context) -> list[list[int]]:
        """Cells in each band, for each image; a budget over several images is shared out."""
        images = c.total // c.grid**2
        if self.keep is None:
            assert self.h is not None
            assert self.w is not None
            return [[self.w] * self.h] * images
        keep = count(self.keep, c.total)
        each = [(i + 1) * keep // images - i * keep // images for i in range(images)]
        return [bands(k, c.grid) for k in each]

    def choose(self, c: Context) -> Keep:
        whole_grid(c, self.name)
        N = c.grid**2
        device = c.patches.device
        parts = [middles(widths, c.grid, device) for widths in self.widths(c)]
        return Keep(torch.cat([part + i * N for i, part in enumerate(parts)]))


@dataclass(frozen=True)
class Pool(Grid):
    name: ClassVar[str] = "pool"
    drops_only: ClassVar[bool] = False

    def choose(self, c: Context) -> Keep:
        whole_grid(c, self.name)
        features, (widths,) = c.features(), self.widths(c)
        inside = insides(widths, c.grid, features.device).to(features.dtype)  # (K, N)
        mean = (inside @ features) / inside.sum(1, keepdim=True)
        return Keep(middles(widths, c.grid, features.device), rows=mean, ordered=True)


@dataclass(frozen=True)
class TextOnly(Method):
    name: ClassVar[str] = "text-only"
    paper: ClassVar[str] = "baseline"
    acts: ClassVar[str] = "after the projector, before layer 0"
    checked: ClassVar[str] = "properties"
    numbering: ClassVar[str] = "compact"

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("embed", 0),)

    def most(self, n_tokens: int) -> int:
        return 0

    def choose(self, c: Context) -> Keep:
        return Keep(c.patches[:0])
