"""Grid: a baseline that keeps patches at even distances across and down the image.

It acts after the projector, before layer 0, and has no paper. The image is divided into h rows of w
cells, and the patch nearest to the middle of each cell stays: h=8, w=8 keep 64 tokens, every third
of 24 x 24 patches in both directions. `keep=T` chooses about as many rows as columns: all rows have
the same number of cells if T has two suitable factors (128 = 8 x 16), else they differ by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Keep, Method, Stages, amount, count, option
from .order import need_all_patches
from .shared import check_whole_grid


def row_widths(keep: int, grid: int) -> list[int]:
    """Number of cells in each row, if `keep` cells form about as many rows as columns."""
    if not keep:
        return []
    even = [h for h in range(1, grid + 1) if not keep % h and h <= keep // h <= min(2 * h, grid)]
    h = max(even, default=min(grid, max(round(keep**0.5), -(-keep // grid))))
    return [(i + 1) * keep // h - i * keep // h for i in range(h)]


def locate_cells(widths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Row i of each cell, its column j and the number of cells in that row, (K,) each; row i has
    widths[i] cells."""
    n = torch.tensor(widths, dtype=torch.long)
    i = torch.arange(len(n)).repeat_interleave(n)
    j = torch.arange(len(i)) - (n.cumsum(0) - n)[i]
    return i, j, n[i]


def middle_patches(widths: list[int], grid: int) -> Tensor:
    """The patch (K,) at the middle of each cell: row floor((i + 0.5) grid / h), column likewise."""
    (i, j, w), h = locate_cells(widths), max(1, len(widths))
    return (2 * i + 1) * grid // (2 * h) * grid + (2 * j + 1) * grid // (2 * w)


@dataclass(frozen=True)
class Grid(Method):
    keep: float | None = amount(None)
    h: int | None = option(None, instead_of=("keep",), help="rows, with w= instead of keep")
    w: int | None = option(None, instead_of=("keep",), help="patches in a row")

    name, identity, numbering = "grid", "keep=1.0", "compact"
    check_order = need_all_patches

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.h is None) != (self.w is None) or (self.keep is None) == (self.h is None):
            raise ValueError(
                f"{self.name} needs keep=, or h= and w=, for example {self.name}:h=8,w=8"
            )

    def stages(self) -> Stages:
        return (("embed", 0),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        side = round((n_tokens / (len(starts) if self.scope == "all" else 1)) ** 0.5)
        for key, value in (("h", self.h), ("w", self.w)):
            if value is not None and not 1 <= value <= side:
                raise ValueError(f"{self.name}: {key}={value} must be from 1 to {side}")

    def left(self, n_tokens: int) -> tuple[int, ...]:
        if self.keep is not None:
            return (count(self.keep, n_tokens),)
        # scope=all: h and w hold for each of an unknown number of images
        return (n_tokens if self.scope == "all" else (self.h or 0) * (self.w or 0),)

    def widths(self, c: Context) -> list[list[int]]:
        """Number of cells in each row, for each image; scope=all divides `keep` among them."""
        images = c.n_tokens // c.grid**2
        if self.h is not None and self.w is not None:
            return [[self.w] * self.h] * images
        (keep,) = self.left(c.n_tokens)
        each = [(i + 1) * keep // images - i * keep // images for i in range(images)]
        return [row_widths(k, c.grid) for k in each]

    def choose(self, c: Context) -> Keep:
        check_whole_grid(c, self.name)
        middles = [middle_patches(widths, c.grid) for widths in self.widths(c)]
        return Keep(torch.cat([patches + i * c.grid**2 for i, patches in enumerate(middles)]))
