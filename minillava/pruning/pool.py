"""Pool: a baseline that replaces each cell of a grid by the mean of its image tokens.

It acts after the projector, before layer 0, and has no paper. The cells are those of Grid. Each
cell's mean of the projected features stands in the place of the patch that Grid keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows import on_device
from .base import Context, Keep
from .grid import Grid, locate_cells, middle_patches
from .shared import check_whole_grid


def covered(place: Tensor, parts: Tensor, grid: int) -> Tensor:
    """Which of `grid` patches along one side part number `place` of `parts` covers: (K, grid)."""
    at = torch.arange(grid)
    start, stop = place * grid // parts, -(-(place + 1) * grid // parts)
    return (start[:, None] <= at) & (at < stop[:, None])


def patches_of_cells(widths: list[int], grid: int) -> Tensor:
    """Which patches each cell covers: (K, grid * grid) bool. Cells overlap by a patch where their
    number does not divide `grid`, as in adaptive pooling."""
    i, j, w = locate_cells(widths)
    h = torch.full_like(i, max(1, len(widths)))
    return (covered(i, h, grid)[:, :, None] & covered(j, w, grid)[:, None]).flatten(1)


@dataclass(frozen=True)
class Pool(Grid):
    name, drops_only = "pool", False

    def choose(self, c: Context) -> Keep:
        check_whole_grid(c, self.name)
        features, (widths,) = c.features(), self.widths(c)
        inside = patches_of_cells(widths, c.grid)  # (K, N)
        weights = on_device(inside, features).to(features.dtype)
        mean = (weights @ features) / weights.sum(1, keepdim=True)
        index = middle_patches(widths, c.grid)
        # where cells overlap, a patch is shown in the first of them
        into = inside.int().argmax(0).index_fill(0, index, -1) if len(index) else None
        return Keep(index, merged=mean, ordered=True, merged_into=into)
