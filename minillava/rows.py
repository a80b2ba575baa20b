"""Which tokens a sequence holds: a table with one entry per row, and pruning as indexing it.

A row is one token on its way through the decoder: a text token, an image token, or a row that a
pruning method added. LLaVA-1.5 cuts an image of 336 x 336 pixels into patches of 14 x 14, so an
image is N = 24 x 24 = 576 rows. Pruning removes rows, and does so at different layers and for every
sample in its own way. Therefore the number of rows says nothing about a token's position: whatever
has to be known about a row is a column of the table. It is on the CPU: reading it needs no waiting.

    prompt              5 text | 576 image       | 39 text    620 rows    positions 0..619
    layers 0 and 1      5 text | 576 image       | 39 text    620 rows    positions 0..619
    FastV at layer 2    5 text | 144 image       | 39 text    188 rows    positions with gaps
    next token                                     1 row                  position 620

Positions are what RoPE rotates queries and keys by. Attention only sees differences of positions,
so rows that keep their numbers (`positions=original`) stay as far apart as they were in the prompt;
`positions=compact` closes the gaps instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TEXT, GENERATED = -1, -2  # values of Rows.image for rows that belong to no image
NO_PATCH = -1  # value of Rows.patch for text and for added rows
COLUMNS = ("id", "position", "image", "patch")  # of Rows, one entry per row each


@dataclass(frozen=True)
class Rows:
    """The S rows of one sample that are present, in order."""

    id: Tensor  # (S,) index in the unpruned sequence; added rows are numbered from its length on
    position: Tensor  # (S,) number that RoPE rotates the row by
    image: Tensor  # (S,) index of the row's image in the prompt, or TEXT, or GENERATED
    patch: Tensor  # (S,) index of the row's patch in that image, 0..N-1, or NO_PATCH
    next_position: int  # position of the next generated token
    first_position: tuple[int, ...]  # of each image's first patch; added rows take it as theirs
    n_ids: int  # ids given out so far

    def __len__(self) -> int:
        return len(self.id)

    def select(self, index: Tensor) -> Rows:
        """The table of the rows at index (s,), in that order."""
        return replace(self, **{name: getattr(self, name)[index] for name in COLUMNS})

    def of_image(self, image: int) -> Tensor:
        """Row numbers (n,) of an image, ascending. TEXT selects the text rows."""
        return (self.image == image).nonzero()[:, 0]

    def insert(self, at: int, n: int, image: int) -> Rows:
        """The table with n added rows of an image before row `at`."""
        numbers = torch.arange(n) + self.n_ids
        same = (torch.full_like(numbers, x) for x in (self.first_position[image], image, NO_PATCH))
        columns = zip(COLUMNS, (getattr(self, c) for c in COLUMNS), (numbers, *same), strict=True)
        longer: dict[str, Any] = {c: torch.cat((x[:at], new, x[at:])) for c, x, new in columns}
        return replace(self, **longer, n_ids=self.n_ids + n)

    def renumber(self) -> Rows:
        """Positions 0..S-1 without gaps; the next token's position is then S."""
        numbers, images = torch.arange(len(self)), torch.arange(len(self.first_position))
        first = (self.image == images[:, None]).int().argmax(1).tolist() if len(images) else []
        return replace(self, position=numbers, first_position=tuple(first), next_position=len(self))


@dataclass(frozen=True)
class Keep:
    """What a pruning method returns: its choice among n candidates.

    index (K,) int64: the candidates that stay, numbers 0..n-1, each at most once. The sequence
    keeps its order whatever the order of `index` is, unless `ordered` is set.
    merged (K, C | D): hidden states that replace those of the kept rows, in the order of `index`.
    extra (M, C | D): hidden states of M added rows that belong to no patch (a class token, the mean
    of what was dropped). They follow the image's rows, or precede them if `extra_first` is set.
    C is the width before the projector (1024), D the width after it (4096).
    The last four explain the choice in reports and pictures, and change nothing.
    """

    index: Tensor
    merged: Tensor | None = None
    extra: Tensor | None = None
    extra_first: bool = False
    ordered: bool = False
    scores: Tensor | None = None  # (n,) what the candidates were ranked by, higher is better
    order: Tensor | None = None  # (k,) candidates that were picked one after the other
    merged_into: Tensor | None = None  # (n,) number in `index`, K + m: row m of `extra`, -1: none
    closest: Tensor | None = None  # () or (k,) how near its decisions were to others: margins.py


@dataclass(frozen=True)
class Choice:
    """A method's Keep for one image of a sample (scope=all: for all its images at once)."""

    window: Tensor  # (w,) rows the choice is about: those of them that are not kept are dropped
    candidates: Tensor  # (n,) rows of the window that are visible; Keep.index counts these
    keep: Keep  # with its index on the CPU


def drop_rows(x: Tensor, rows: Rows, choice: Choice) -> tuple[Tensor, Rows]:
    """Drop from x (S, C | D) and from its table the rows of the window that were not kept."""
    keep = choice.keep
    kept = choice.candidates[keep.index]  # (K,) row numbers, in the order of keep.index
    if keep.merged is not None:
        x = x.index_copy(0, on_device(kept, x), keep.merged.to(x.dtype))
    places = kept.sort().values  # (K,) where the kept rows may stand
    order = torch.arange(len(x))
    order[places] = kept if keep.ordered else places
    stays = torch.ones_like(order, dtype=torch.bool)
    stays[choice.window] = False
    stays[places] = True
    remaining = order[stays]  # (s,)
    left, x_left = rows.select(remaining), take_rows(x, remaining)
    if keep.extra is not None:
        image = int(rows.image[choice.window[0]])
        at = int(choice.window[0]) + (0 if keep.extra_first else len(kept))  # earlier rows stay
        left = left.insert(at, len(keep.extra), image)
        x_left = torch.cat((x_left[:at], keep.extra.to(x.dtype), x_left[at:]))
    return x_left, left


def take_rows(x: Tensor, numbers: Tensor) -> Tensor:
    """The rows of x (S, ...) with these numbers (s,), which are on the CPU: (s, ...)."""
    return x[on_device(numbers, x)]


def on_device(numbers: Tensor, x: Tensor) -> Tensor:
    """Row numbers, or another small tensor, on the device of x. The host does not wait for it."""
    return numbers.to(x.device, non_blocking=True)
