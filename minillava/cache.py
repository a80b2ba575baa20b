"""The KV cache: keys and values of the rows that each decoder layer has seen.

A new token attends to all earlier rows of its sample, so each layer keeps their keys and values
instead of computing them again. After pruning, layers hold different numbers of rows and samples
differ within a layer. Keys are stored rotated, so a row's position is never derived from a length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import TextConfig
from .rows import on_device

Held = tuple[Tensor, Tensor]  # keys and values of a layer, each (B, Hkv, S, Dh)


class KVCache:
    """Per layer two tensors (B, Hkv, longest prompt + room, Dh), allocated by reserve().

    `room` is the number of tokens that can be added, for example max_new_tokens - 1. A shorter
    sample is followed by zeros, which its new tokens overwrite.
    """

    def __init__(
        self, config: TextConfig, room: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.heads, self.head_dim, self.room = config.num_key_value_heads, config.head_dim, room
        self.keys = [torch.empty(0, dtype=dtype, device=device)] * config.num_hidden_layers
        self.values = list(self.keys)
        self.lengths: list[list[int]] = [[] for _ in self.keys]  # [layer][b]

    def reserve(self, layers: Sequence[int], lengths: Sequence[int]) -> None:
        """Allocate layers whose prompts have these numbers of rows, all in one go.

        Allocated one by one between the layers' forwards, they would fragment the free memory.
        """
        shape = (len(lengths), self.heads, max(lengths) + self.room, self.head_dim)
        for layer in layers:
            self.lengths[layer] = list(lengths)
            for held in (self.keys, self.values):
                held[layer] = held[layer].new_empty(shape)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the packed rows of the prompts, k and v (R, Hkv, Dh)."""
        lengths = self.lengths[layer]
        for held, rows in ((self.keys[layer], k), (self.values[layer], v)):
            for b, part in enumerate(rows.split(lengths)):
                held[b, :, : lengths[b]] = part.transpose(0, 1)
                # attention multiplies masked rows by 0, and 0 x garbage may be NaN
                held[b, :, lengths[b] : max(lengths)] = 0.0

    def cut(self, layers: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Keep only the rows numbered rows[b] (s,) of each sample b in these layers."""
        for layer in layers:
            k, v = (
                torch.cat([x[b][:, on_device(s, x)] for b, s in enumerate(rows)], 1).transpose(0, 1)
                for x in (self.keys[layer], self.values[layer])
            )  # (R, Hkv, Dh)
            self.reserve([layer], [len(s) for s in rows])
            self.store(layer, k, v)

    def append(self, layer: int, k: Tensor, v: Tensor, end: int, at: Tensor | None) -> Held:
        """Write one row per sample, k and v (B, Hkv, Dh), as write_rows does; return the first
        `end` rows of all samples. Those of a shorter sample beyond its own length are zeros."""
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        write_rows(keys, k, at)
        write_rows(values, v, at)
        self.lengths[layer] = [n + 1 for n in self.lengths[layer]]
        return keys, values

    def keys_of(self, layer: int, b: int) -> Tensor:
        """Rotated keys of one sample (S, Hkv, Dh)."""
        return self.keys[layer][b, :, : self.lengths[layer][b]].transpose(0, 1)


def write_rows(held: Tensor, rows: Tensor, at: Tensor | None) -> None:
    """Write a row per sample (B, Hkv, Dh) into held (B, Hkv, S, Dh), at at[b]; None: at the end."""
    held[:, :, -1] = rows if at is None else 0.0  # as in store(): masked rows must not be NaN
    if at is not None:
        rows = rows[:, :, None].to(held.dtype)  # under autocast values have another one
        held.scatter_(2, at[:, None, None, None].expand_as(rows), rows)
