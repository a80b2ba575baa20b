"""One prompt on its way through the model, and how its rows attend in a decoder layer.

Samples of a batch are packed: their rows stand one after another in one (R, D) tensor without
padding. Every layer but attention works on single rows, and attention runs within a sample, so a
batch gives what each of its prompts gives alone, whatever was dropped from which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import causal_attention, token_attention
from .cache import KVCache
from .rows import GENERATED, NO_PATCH, TEXT, Rows


@dataclass(frozen=True)
class Batch:
    """Prompts and their images, made by the processor or by hand with from_padded().

    ids (B, T) int64, left-padded, each image as N placeholders (576). mask (B, T) bool: ids under
    False are padding. pixels (images, 3, S, S) float32 or None, in the order of the placeholders.
    focus: None, or for each sample None or the ids (t,) that text-guided methods look at. sizes:
    for each image its width, height and aspect ("pad", "crop"); None: no letterbox is known.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor | None = None
    focus: Sequence[Tensor | None] | None = None
    sizes: Sequence[tuple[int, int, str]] | None = None

    @classmethod
    def from_padded(
        cls,
        ids: Tensor,
        mask: Tensor | None = None,
        pixels: Tensor | None = None,
        focus: Sequence[Tensor | None] | None = None,
        sizes: Sequence[tuple[int, int, str]] | None = None,
    ) -> Batch:
        """A batch from what Hugging Face's LlavaProcessor returns: input_ids, attention_mask (0 and
        1, or bool; None: no padding) and pixel_values. It is checked when it is used."""
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return cls(ids, mask, pixels, focus, sizes)


@dataclass(frozen=True)
class Prompt:
    """One sample of a batch without its padding. Its ids are on the CPU, like its rows' table."""

    ids: Tensor  # (T,), each image as N placeholders
    images: tuple[int, ...]  # index of each of its images in the batch
    starts: tuple[int, ...]  # index of each image's first placeholder
    focus: Tensor | None  # ids (t,) that text-guided methods compare image tokens with
    length: int  # T without generated tokens
    sizes: tuple[tuple[int, int, str], ...] = ()  # of its images (Batch), if they are known

    def rows(self, per_image: int) -> Rows:
        """The table of all rows, before anything is pruned."""
        numbers = torch.arange(len(self.ids))
        image, patch = torch.full_like(numbers, TEXT), torch.full_like(numbers, NO_PATCH)
        image[self.length :] = GENERATED
        for i, start in enumerate(self.starts):
            image[start : start + per_image] = i
            patch[start : start + per_image] = numbers[:per_image]
        return Rows(numbers, numbers, image, patch, len(numbers), self.starts, len(numbers))

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The prompt followed by generated tokens."""
        return replace(self, ids=torch.cat((self.ids, self.ids.new_tensor(tokens))))


@dataclass(frozen=True)
class Mask:
    """Rows that one step of a plan hides in the layers [layer, until)."""

    layer: int
    until: int | None  # None: to the last layer
    hidden: Tensor  # (ids,) bool on the CPU, by Rows.id; ids given out later are visible


@dataclass(frozen=True)
class LastAttention:
    """One sample in the layer that ran last: what a method may compute attention weights from."""

    q: Tensor  # (T, H, Dh): T = S in the prefill, T = 1 while decoding
    k: Tensor  # (S, Hkv, Dh)
    x: Tensor  # (T, D) rows as they entered the layer
    hidden: Tensor | None  # (rows,) bool, on the CPU
    rows: Rows  # the prompt's rows in that layer; generated rows follow them


@dataclass
class Sample:
    """One prompt on its way through the model."""

    prompt: Prompt
    rows: Rows  # as they enter what runs next
    x: Tensor  # (S, C | D) hidden states; (0, D) while packed; the new token's (1, D) in decode()
    vision: Mapping[int, Tensor]  # hidden states of the vision tower, (images, 1 + N, C) by number
    generator: torch.Generator
    memory: dict[tuple[int, ...], dict[str, Any]]  # what methods keep between tokens, by step
    generated: int = 0  # tokens generated so far
    masks: dict[int, Mask] = field(default_factory=dict)  # by number of the step
    embedded: tuple[Tensor, Rows] | None = None  # x (S, D) and rows as they entered layer 0
    last: LastAttention | None = None
    cached_keys: Tensor | None = None  # while decoding: (S, Hkv, Dh) that the next layer holds
    position: Tensor = field(init=False)  # (1,) while decoding: that of the new token

    def hidden(self, layer: int, before: int | None = None) -> Tensor | None:
        """Rows (S,) that steps before number `before` (None: all) hide in a layer; None: no row."""
        result = None
        for number, mask in self.masks.items():
            ended = mask.until is not None and layer >= mask.until
            if mask.layer <= layer and not ended and (before is None or number < before):
                rows = F.pad(mask.hidden, (0, self.rows.n_ids - len(mask.hidden)))[self.rows.id]
                result = rows if result is None else result | rows
        return result

    def visible_images(self, layer: int) -> Rows:
        """The image rows that are present and not hidden in a layer."""
        hidden, is_image = self.hidden(layer), self.rows.image >= 0
        return self.rows.select(is_image if hidden is None else is_image & ~hidden)


@dataclass(frozen=True)
class Segment:
    """Consecutive decoder layers that see the same rows (Plan.segments)."""

    layers: range
    rows: list[Rows]  # [b] of the prompt
    n_image_rows: list[int]  # [b] image rows that the prefill left visible
    held: list[Rows]  # [b] those in the KV cache: fewer if later steps cut it (cache=all)
    hidden: list[Tensor | None]  # [b] (S,) bool, which of those the prefill left masked


@dataclass(frozen=True)
class CacheView:
    """What the new tokens of a batch see of a segment's layers in the KV cache."""

    end: int  # rows of the longest sample, the new one included
    at: Tensor | None  # (B,) where each new row goes; None: all at end - 1
    visible: Tensor | None  # (B, 1, 1, end) bool; None: everything


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one decoder layer: the block calls it with its queries, keys and values."""

    layer: int
    samples: list[Sample]
    cache: KVCache | None
    hidden: list[Tensor | None]  # [b] (S,) bool, on the CPU
    seen: list[Tensor | None]  # [b] prompts: numbers (s,) of rows that are not hidden; None: all
    view: CacheView | None  # of new tokens; None: these are the rows of the prompts
    x: Tensor | None  # (R, D) rows as they enter it, if a method looks back at this layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, H, Dh), k, v (R, Hkv, Dh) of all samples -> (R, H, Dh)."""
        return self._prompts(q, k, v) if self.view is None else self._tokens(q, k, v, self.view)

    def _prompts(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            self.cache.store(self.layer, k, v)
        lengths = [len(s.rows) for s in self.samples]
        parts = list(zip(*(t.split(lengths) for t in (q, k, v)), self.seen, strict=True))
        if self.x is not None:
            each = zip(parts, self.x.split(lengths), self.hidden, strict=True)
            for s, ((q_, k_, *_), x, hidden) in zip(self.samples, each, strict=True):
                s.last = LastAttention(q_, k_, x, hidden, s.rows)
        outputs = [causal_attention(*part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _tokens(self, q: Tensor, k: Tensor, v: Tensor, view: CacheView) -> Tensor:
        assert self.cache is not None
        keys, values = self.cache.append(self.layer, k, v, view.end, view.at)
        if self.x is not None:
            for b, s in enumerate(self.samples):
                k, mine = self.cache.keys_of(self.layer, b), slice(b, b + 1)
                s.last = LastAttention(q[mine], k, self.x[mine], self.hidden[b], s.rows)
        return token_attention(q, keys, values, view.visible)
