"""Keys and values of one generation: one tensor pair a layer, each layer with its own length.

After pruning, layers hold different numbers of rows and samples differ within a layer, so a length
says nothing about positions: those travel with the rows (keys are stored rotated).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Preallocated at a layer's first store: its longest sample plus `room` rows to come."""

    def __init__(self, n_layers: int, room: int) -> None:
        self.room = room
        self.keys: list[Tensor] = [torch.empty(0)] * n_layers  # (B, Hkv, capacity, Dh) each
        self.values: list[Tensor] = [torch.empty(0)] * n_layers
        self.lengths: list[list[int]] = [[] for _ in range(n_layers)]  # [layer][b]

    def store(self, layer: int, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
        """Take the prompt's packed rows, k and v (R, Hkv, Dh), `lengths[b]` of them per sample."""
        B, (_, Hkv, Dh) = len(lengths), k.shape
        shape = (B, Hkv, max(lengths) + self.room, Dh)
        for held, rows in ((self.keys, k), (self.values, v)):
            # zeros: attention multiplies masked rows by 0, and 0 x garbage may be NaN
            held[layer] = rows.new_zeros(shape)
            for b, sample in enumerate(rows.split(list(lengths))):
                held[layer][b, :, : lengths[b]] = sample.transpose(0, 1)
        self.lengths[layer] = list(lengths)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one row per sample, k and v (B, Hkv, Dh); returns all rows (B, Hkv, S, Dh).

        S is the longest sample's length; rows of a shorter one beyond its own length are zeros.
        """
        lengths = self.lengths[layer]
        if len(set(lengths)) == 1:
            self.keys[layer][:, :, lengths[0]] = k
            self.values[layer][:, :, lengths[0]] = v
        else:
            for b, at in enumerate(lengths):
                self.keys[layer][b, :, at] = k[b]
                self.values[layer][b, :, at] = v[b]
        self.lengths[layer] = [n + 1 for n in lengths]
        S = max(self.lengths[layer])
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S]

    def used_bytes(self) -> int:
        """Bytes of the rows that are held; what is allocated for rows to come is not counted."""
        return sum(
            2 * sum(lengths) * keys.shape[1] * keys.shape[3] * keys.element_size()
            for keys, lengths in zip(self.keys, self.lengths, strict=True)
            if lengths
        )
