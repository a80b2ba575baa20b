"""The 4-bit weights of bitsandbytes, nf4 and fp4: pure functions on tensors.

A weight (N, K) is read row by row as one list of values, which is divided into blocks of 64. Of a
block are stored its largest absolute value, absmax, and for each value the nearest of 16 levels in
-1..1, times absmax. nf4's levels are quantiles of the normal distribution (QLoRA, arXiv
2305.14314, section 3), fp4's are the values of a float with two exponent bits and one mantissa bit.

Double quantisation stores the absmax in 8 bits too: their mean over the whole weight is subtracted,
and blocks of 256 of them have a float32 scale and 256 levels (create_dynamic_map there).

The codes, the absmax and the 8-bit absmax are bit-equal to those of bitsandbytes 0.50 on a CPU, for
every finite weight in float32, float16 or bfloat16. Its details that decide about single bits:

- A value on the border of two levels gets the lower one.
- Values are multiplied by the float32 reciprocal of absmax, but those of an incomplete last block
  are divided by it, and such a block's absmax is at least SMALLEST.
- An absmax in 8 bits is first rounded to one of 65,536 equal steps (_to_8_bits); on GPUs, and
  before version 0.50, it is not.
- The mean is torch's, whose last bit can depend on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # values that share an absmax
NESTED_BLOCK = 256  # absmax that share a scale
SMALLEST = 1e-38  # values are divided by this at least
CHUNK_BLOCKS = 2**15  # blocks quantised at a time; blocks are independent, this only limits memory
STEPS = 65535  # from -1 to 1, for an absmax in 8 bits

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by exponent and mantissa, times 12

# The level of each code, 0..15.
LEVELS: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*(x / 12 for x in _FP4), *(-x / 12 for x in _FP4)),
}


@dataclass(frozen=True)
class Nested:
    """The absmax of all blocks, in 8 bits: levels[codes] * scale + offset."""

    codes: Tensor  # (blocks,) uint8
    scale: Tensor  # (ceil(blocks / 256),) float32
    levels: Tensor  # (256,) float32
    offset: Tensor  # () float32


@dataclass(frozen=True)
class Nf4:
    """A weight in 4 bits, as made by to_nf4."""

    codes: Tensor  # (ceil(N K / 2),) uint8; the first of two values is in the high four bits
    absmax: Tensor | Nested  # (blocks,) float32
    shape: tuple[int, int]  # N, K
    kind: str = "nf4"  # or "fp4"
    block: int = BLOCK
    compute: torch.dtype | None = None  # what a GPU multiplies in; None: the dtype of the input


def levels_of(kind: str) -> Tensor:
    """The level of each code, (16,) float32."""
    return torch.tensor(LEVELS[kind], dtype=torch.float32)


@functools.cache
def dynamic_levels(device: torch.device | str = "cpu") -> Tensor:
    """The levels of an absmax in 8 bits, ascending: (256,) float32. All weights share them.

    They are 0 and 1, and for each e = 0..6 the middles of 2**e equal parts of 0.1..1, times
    10**(e - 6), with both signs.
    """
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for e in range(7):
        ends = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32)
        middles = (ends[:-1] + ends[1:]) / 2 * 10 ** (e - 6)  # (2**e,)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values.to(device)


def to_nf4(weight: Tensor, kind: str = "nf4", nested: bool = True, block: int = BLOCK) -> Nf4:
    """Quantise a finite weight (N, K) in float32, float16 or bfloat16.

    kind: "nf4" or "fp4". nested: whether absmax is stored in 8 bits. NaN or infinity in the weight
    makes absmax, or its offset, NaN or infinite.
    """
    N, K = weight.shape
    values = weight.reshape(-1)  # (N K,)
    whole = len(values) // block * block
    chunks = values[:whole].view(-1, block).split(CHUNK_BLOCKS) if whole else ()
    done = [_quantise_blocks(chunk.float(), kind) for chunk in chunks]
    if whole < len(values):
        done.append(_quantise_rest(values[whole:].float(), kind))
    codes, absmax = (torch.cat(parts) for parts in zip(*done, strict=True))
    return Nf4(codes, to_nested(absmax) if nested else absmax, (N, K), kind, block)


def _quantise_blocks(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Complete blocks (n, B) float32 -> packed codes (n B / 2,), absmax (n,)."""
    absmax = blocks.abs().amax(-1)  # (n,)
    scaled = blocks * (1.0 / absmax.clamp_min(SMALLEST))[:, None]
    return _pack(_nearest_codes(scaled.flatten(), kind)), absmax


def _quantise_rest(rest: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The incomplete last block (n,) float32 -> packed codes (ceil(n / 2),), absmax (1,)."""
    absmax = rest.abs().amax().clamp_min(SMALLEST)
    scaled = F.pad(rest / absmax, (0, len(rest) % 2))
    return _pack(_nearest_codes(scaled, kind)), absmax[None]


def _nearest_codes(scaled: Tensor, kind: str) -> Tensor:
    """The codes (n,) uint8 of the levels nearest to values (n,); the lower level of two."""
    levels = levels_of(kind).to(scaled.device)
    order = levels.argsort(stable=True)  # fp4's codes do not ascend with their levels
    ascending = levels[order]
    borders = (ascending[:-1] + ascending[1:]) / 2  # (15,)
    place = torch.bucketize(scaled.clamp_(-1, 1), borders, out_int32=True)
    return order.to(torch.uint8)[place]


def _pack(codes: Tensor) -> Tensor:
    """Two codes per byte, the first in the high four bits: (2 n,) uint8 -> (n,) uint8."""
    return codes[0::2] << 4 | codes[1::2]


def to_nested(absmax: Tensor) -> Nested:
    """Quantise absmax (blocks,) float32 to 8 bits."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = F.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = padded.abs().amax(-1)  # (ceil(blocks / 256),)
    levels = dynamic_levels(absmax.device)
    codes = _to_8_bits(padded * (1.0 / scale)[:, None], levels).flatten()
    return Nested(codes[: len(absmax)], scale, levels, offset)


def _to_8_bits(scaled: Tensor, levels: Tensor) -> Tensor:
    """Values in -1..1 -> codes uint8 of the levels (256,) nearest to the nearest of the STEPS.

    On a CPU bitsandbytes finds the step with one fused multiplication and addition in float32.
    Float64 represents the product exactly, so that one rounding remains here too.
    """
    positive = (scaled.clamp(-1, 1) + 1.0).double() * (STEPS / 2) + 0.5
    step = positive.float().nan_to_num(0.0).int().float()  # step 0 if all are 0
    borders = 0.5 * (levels[:-1] + levels[1:])  # (255,)
    return torch.bucketize(2.0 * step / STEPS - 1.0, borders, out_int32=True).to(torch.uint8)


def absmax_of(weight: Nf4, first: int = 0, last: int | None = None) -> Tensor:
    """The absmax (last - first,) float32 of blocks first..last."""
    if isinstance(weight.absmax, Tensor):
        return weight.absmax[first:last]
    nested = weight.absmax
    last = len(nested.codes) if last is None else last
    scales = nested.scale[first // NESTED_BLOCK : -(-last // NESTED_BLOCK)]
    scales = scales.repeat_interleave(NESTED_BLOCK)[first % NESTED_BLOCK :][: last - first]
    levels = nested.levels.index_select(0, nested.codes[first:last].int())  # (last - first,)
    return levels.mul_(scales).add_(nested.offset)


def from_nf4(
    weight: Nf4, first: int = 0, last: int | None = None, pairs: Tensor | None = None
) -> Tensor:
    """Rows first..last of the weight that codes and absmax represent: (rows, K) float32.

    pairs: level_pairs of the weight's kind, if the caller holds them.
    """
    N, K = weight.shape
    B, stop = weight.block, (N if last is None else last) * K
    a, b = first * K // B, -(-stop // B)  # the blocks that contain these values
    packed = weight.codes[a * B // 2 : b * B // 2]
    pairs = level_pairs(weight.kind, packed.device) if pairs is None else pairs
    values = pairs.index_select(0, packed.int()).view(torch.float32)
    if len(values) < (b - a) * B:  # the last block is incomplete
        values = F.pad(values, (0, (b - a) * B - len(values)))
    values = values.view(b - a, B).mul_(absmax_of(weight, a, b)[:, None]).flatten()
    return values[first * K - a * B : stop - a * B].view(-1, K)


@functools.cache
def level_pairs(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """The levels of the two codes in each byte, (256,): two float32 in the bits of a float64.

    One lookup of eight bytes takes a third of the time of two lookups of four.
    """
    levels, byte = levels_of(kind), torch.arange(256)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 15]), -1)  # (256, 2)
    return pairs.view(torch.float64)[:, 0].to(device)
