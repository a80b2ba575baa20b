"""What one generation carries: the rows of each sample, and their keys and values.

After pruning, layers hold different numbers of rows and samples differ within a layer, so a length
says nothing about positions: those travel with the rows, and keys are stored rotated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import TextConfig
from .pruning.base import Keep

Spans = tuple[tuple[int, int], ...]  # [start, stop) in rows, one for each image


@dataclass(frozen=True)
class Mask:
    """Rows hidden by one step of a plan: a table over row identities, and where it ends."""

    step: int
    until: int | None
    hidden: Tensor  # (identities,) bool


@dataclass(frozen=True)
class Rows:
    """The rows of one sample as they stand, without padding.

    identity (S,): the row's place in the unpruned prompt; rows without a patch are numbered on
    behind it. position (S,): the number RoPE uses; next_position: that of the next token.
    """

    identity: Tensor
    position: Tensor
    next_position: int
    prompt: int  # length of the unpruned prompt
    total: int  # the same with tokens generated since, where there is no cache to hold them
    starts: tuple[int, ...]  # place of each image's first patch in the unpruned prompt
    spans: Spans  # rows of each image
    firsts: tuple[int, ...]  # position of each image's first patch, for rows without one
    identities: int  # identities given out so far
    masks: tuple[Mask, ...] = ()

    def __len__(self) -> int:
        return len(self.identity)

    def hidden(self, layer: int, before: int | None = None) -> Tensor | None:
        """Which rows (S,) this layer hides, by steps before the given one; None: none."""
        result = None
        for mask in self.masks:
            if (mask.until is None or layer < mask.until) and (
                before is None or mask.step < before
            ):
                table = F.pad(mask.hidden, (0, self.identities - len(mask.hidden)))
                rows = table[self.identity]
                result = rows if result is None else result | rows
        return result

    def masked(self, mask: Mask) -> Rows:
        return replace(self, masks=(*self.masks, mask))

    def with_masks(self, b: int, renewed: Mapping[tuple[int, int], Mask]) -> Rows:
        """The same with the masks of sample b that were renewed, by step and sample."""
        if not (self.masks and renewed):
            return self
        return replace(self, masks=tuple(renewed.get((m.step, b), m) for m in self.masks))

    def candidates(
        self, layer: int, before: int | None = None, shift: int = 0
    ) -> tuple[Tensor, ...]:
        """Rows of each image that are present and visible, ascending; spans moved by `shift`."""
        hidden = self.hidden(layer, before)
        device, S = self.identity.device, len(self)
        rows = [torch.arange(a + shift, min(b + shift, S), device=device) for a, b in self.spans]
        return tuple(rows if hidden is None else [r[~hidden[r]] for r in rows])

    def text_rows(self) -> Tensor:
        """Prompt rows behind the last image; where there are none, all text rows but the first (the
        beginning of the text); where there is no other, that one."""
        device = self.identity.device
        stop = len(self) - (self.total - self.prompt)
        start = self.spans[-1][1] if self.spans else stop
        if start < stop:
            return torch.arange(start, stop, device=device)
        is_text = torch.ones(stop, dtype=torch.bool, device=device)
        for a, b in self.spans:
            is_text[a:b] = False
        rows = is_text.nonzero()[:, 0]
        return rows[1:] if len(rows) > 1 and is_text[0] else rows

    def patches(self, image: int, rows: Tensor, per_image: int) -> Tensor:
        """Number 0..N-1 of the patch behind each row (n,) of an image; -1 for rows without one."""
        number = self.identity[rows] - self.starts[image]
        return torch.where((number >= 0) & (number < per_image), number, -1)

    def image_positions(self, layer: int) -> tuple[list[int], int]:
        """Original positions of the image rows present and visible, ascending; number of others."""
        rows = torch.cat([*self.candidates(layer), self.identity.new_empty(0)])
        ids = self.identity[rows].tolist()
        found = sorted(i for i in ids if i < self.total)
        return found, len(ids) - len(found)


def splice(rows: Tensor, spans: Spans, pieces: Sequence[Tensor]) -> Tensor:
    """Replace the spans of (S, ...) by the pieces, one for each."""
    parts, at = [], 0
    for (start, stop), piece in zip(spans, pieces, strict=True):
        parts += [rows[at:start], piece]
        at = stop
    return torch.cat([*parts, rows[at:]])


def place(kept: Tensor, extra: Tensor | None, first: bool) -> Tensor:
    """Kept rows (K, ...) with the extra ones (M, ...) behind them, or before."""
    if extra is None:
        return kept
    return torch.cat((extra, kept) if first else (kept, extra))


def drop(
    rows: Rows, spans: Spans, chosen: Sequence[tuple[Tensor, Keep]], compact: bool
) -> tuple[Rows, list[tuple[Tensor, Keep]]]:
    """Shorten each span to what was chosen among its candidates (row numbers of the sequence).

    Returns the rows that are left, and for each span the row numbers kept and the Keep, both in
    the order in which they now stand.
    """
    identity, position, ends, result = [], [], [], []
    identities, shift = rows.identities, 0
    for (start, stop), first, (candidates, keep) in zip(spans, rows.firsts, chosen, strict=True):
        if not keep.ordered:
            order = keep.index.argsort()
            merged = None if keep.rows is None else keep.rows[order]
            keep = replace(keep, index=keep.index[order], rows=merged)
        kept = candidates[keep.index]
        fresh = number = None
        if keep.extra is not None:
            M = len(keep.extra)
            fresh = torch.arange(identities, identities + M, device=kept.device)
            number = rows.position.new_full((M,), first)
            identities += M
        identity.append(place(rows.identity[kept], fresh, keep.extra_first))
        position.append(place(rows.position[kept], number, keep.extra_first))
        ends.append((start + shift, start + shift + len(identity[-1])))
        shift += len(identity[-1]) - (stop - start)
        result.append((kept, keep))
    left = replace(
        rows,
        identity=splice(rows.identity, spans, identity),
        position=splice(rows.position, spans, position),
        spans=tuple(ends),
        identities=identities,
    )
    if compact:
        numbers = torch.arange(len(left), device=left.position.device)
        firsts = tuple(start for start, _ in left.spans)
        left = replace(left, position=numbers, firsts=firsts, next_position=len(left))
    return left, result


def hide(rows: Rows, step: int, until: int | None, chosen: Sequence[tuple[Tensor, Keep]]) -> Mask:
    """The mask that hides the candidates that were not chosen."""
    hidden = torch.zeros(rows.identities, dtype=torch.bool, device=rows.identity.device)
    for candidates, keep in chosen:
        ids = rows.identity[candidates]
        hidden[ids] = True
        hidden[ids[keep.index]] = False
    return Mask(step, until, hidden)


class KVCache:
    """Each layer has memory for its longest sample and `room` rows to come: see reserve()."""

    def __init__(
        self, config: TextConfig, room: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        n_layers = config.num_hidden_layers
        self.heads, self.head_dim, self.room = config.num_key_value_heads, config.head_dim, room
        self.keys = [torch.empty(0, dtype=dtype, device=device)] * n_layers
        self.values = list(self.keys)  # as keys: (B, Hkv, capacity, Dh) each
        self.lengths: list[list[int]] = [[] for _ in range(n_layers)]  # [layer][b]

    def reserve(self, layers: Sequence[int], lengths: Sequence[int]) -> None:
        """Take memory for layers with so many rows per sample, all at once: taken layer by layer it
        would lie between activations, and leave gaps there that the next layer's do not fit in."""
        shape = (len(lengths), self.heads, max(lengths) + self.room, self.head_dim)
        for layer in layers:
            self.lengths[layer] = list(lengths)
            for held in (self.keys, self.values):
                held[layer] = held[layer].new_empty(shape)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take the prompt's packed rows, k and v (R, Hkv, Dh)."""
        lengths = self.lengths[layer]
        for held, rows in ((self.keys[layer], k), (self.values[layer], v)):
            for b, sample in enumerate(rows.split(lengths)):
                held[b, :, : lengths[b]] = sample.transpose(0, 1)
                # attention multiplies masked rows by 0, and 0 x garbage may be NaN
                held[b, :, lengths[b] : max(lengths)] = 0.0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one row per sample, k and v (B, Hkv, Dh); returns all rows (B, Hkv, S, Dh).

        S is the longest sample's length; rows of a shorter one beyond its own length are zeros.
        """
        lengths = self.lengths[layer]
        S = max(lengths) + 1
        for held, row in ((self.keys[layer], k), (self.values[layer], v)):
            if len(set(lengths)) == 1:
                held[:, :, S - 1] = row
                continue
            held[:, :, S - 1] = 0.0
            for b, at in enumerate(lengths):
                held[b, :, at] = row[b]
        self.lengths[layer] = [n + 1 for n in lengths]
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S]

    def held(self, layer: int, b: int) -> Tensor:
        """Keys of one sample (S, Hkv, Dh)."""
        return self.keys[layer][b, :, : self.lengths[layer][b]].transpose(0, 1)

    def used_bytes(self) -> int:
        """Bytes of the rows that are held; what is allocated for rows to come is not counted."""
        return sum(
            2 * sum(lengths) * keys.shape[1] * keys.shape[3] * keys.element_size()
            for keys, lengths in zip(self.keys, self.lengths, strict=True)
            if lengths
        )
