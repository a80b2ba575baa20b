"""Quantise weights to 8 or 4 bits: pure functions on tensors, without layers or files.

Both forms rotate the columns of a weight (N, K) first, and both are integers from -127 to 127 with
one float32 scale for each row:

    int8: every value is rounded to the nearest of these integers.
    int4: a group of 32 columns of a row uses only 16 of them, at equal distances: code * step + low
          with a code from 0 to 15. Four bits hold the code; step and low are integers too.

A weight in int4 is therefore a weight in int8 that takes less memory, and the arithmetic of int8
multiplies it (two levels of scales, as in QServe, arXiv 2405.04532).

The rotation multiplies blocks of b columns by a Hadamard matrix H, which is orthogonal, symmetric
and has entries +-1 / sqrt(b). The weights are rotated here and the activations when they are
multiplied: W x = (W H)(H x). In a Llama a few columns carry very large activations; the rotation
spreads them over the block, so that activations can be rounded to integers too. This is the
simplest form of QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATED_COLUMNS = 128  # columns rotated together, at most
CHUNK_ROWS = 512  # rows quantised at a time; rows are independent, so this only limits memory
FEW_ROWS = 16  # BLAS sums in another order below this many rows; pad to it for identical bits
GROUP_COLUMNS = 32  # columns of an int4 weight that share a step and a low, at most
SHIFTS = (0.0, -0.3, 0.3)  # of the levels of an int4 group from the middle of its range, in steps
REFITS = 2  # times that low of an int4 group is fitted to its codes


def block_size(K: int, limit: int) -> int:
    """The largest power of two that divides K, at most `limit`."""
    return min(K & -K, limit)


@functools.cache
def hadamard(
    b: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The Hadamard matrix (b, b) for a power of two b, scaled to be orthogonal. It is made once
    for each device, so that a token copies nothing there."""
    signs = torch.ones(1, 1)
    while len(signs) < b:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return (signs / b**0.5).to(device, dtype)


def rotate_columns(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply each block of columns of x (R, K) by H. Doing it twice gives x again."""
    b = block_size(x.shape[-1], ROTATED_COLUMNS)
    H = hadamard(b, x.device, x.dtype)
    out = torch.empty_like(x) if out is None else out
    blocks, result = x.reshape(-1, b), out.view(-1, b)  # (R K / b, b)
    if len(blocks) < FEW_ROWS:
        padded = F.pad(blocks, (0, 0, 0, FEW_ROWS))
        return result.copy_((padded @ H)[: len(blocks)]).view(x.shape)
    torch.mm(blocks, H, out=result)
    return out


def row_abs_max(x: Tensor) -> Tensor:
    """The largest absolute value of each row: (R, K) -> (R, 1). NaN if the row contains one."""
    # on a CPU this takes a tenth of the time of aminmax at 620 rows
    return x.abs().amax(1, keepdim=True)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (N, K) -> codes (N, K) int8, scale (N,) float32, for the weight after rotation.

    Codes are in -127..127; a weight is about code * scale, rotated back.
    """
    codes, scale = zip(*map(_to_int8, weight.split(CHUNK_ROWS)), strict=True)
    return torch.cat(codes), torch.cat(scale)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rotated = rotate_columns(weight.float())
    scale = row_abs_max(rotated)[:, 0] / 127  # (N,)
    codes = rotated.div_(scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    return codes.to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight (N, K) that codes and scale represent."""
    return rotate_columns(codes.float() * scale[:, None])


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight (N, K) -> codes (N, K / 2), step and low (N, K / G), scale (N,), after rotation.

    A weight is about (code * step + low) * scale, rotated back. A byte of codes, uint8, holds two
    columns, the left one in its low four bits. step is uint8, low int8, scale float32. The step is
    a 15th of the range of a group's values, rounded, or one less, with low at one of SHIFTS,
    whichever has the smallest squared error. Then low is fitted to the codes by least squares,
    REFITS times, as long as this makes the error smaller.
    """
    parts = zip(*map(_to_int4, weight.split(CHUNK_ROWS // 8)), strict=True)
    codes, step, low, scale = map(torch.cat, parts)
    return codes, step, low, scale


@dataclass(frozen=True)
class _Levels:
    """The 16 levels of each group, with the squared error that they leave; all (N, K / G, 1)."""

    step: Tensor  # integers, as floats
    low: Tensor
    error: Tensor

    @classmethod
    def of(cls, groups: Tensor, step: Tensor, low: Tensor) -> _Levels:
        step, low = step.clamp_min(1), low.round().clamp_(-127, 127)
        values = _round_to_codes(groups, step, low).mul_(step).add_(low)
        return cls(step, low, values.sub_(groups).square_().sum(-1, keepdim=True))

    def or_better(self, other: _Levels) -> _Levels:
        """The levels with the smaller error, group by group; these ones where they are equal."""
        better = other.error < self.error
        pairs = zip(vars(other).values(), vars(self).values(), strict=True)
        return _Levels(*(torch.where(better, new, old) for new, old in pairs))


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = weight.shape
    rotated = rotate_columns(weight.float())
    scale = row_abs_max(rotated)[:, 0] / 127  # (N,)
    rotated.div_(scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    groups = rotated.view(N, -1, block_size(K, GROUP_COLUMNS))  # (N, K / G, G) in -127..127
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # (N, K / G, 1)
    middle, step = (lowest + highest) / 2, ((highest - lowest) / 15).round_()
    choices = [
        _Levels.of(groups, steps, middle + (shift - 7.5) * steps)
        for steps in (step, step - 1)
        for shift in SHIFTS
    ]
    levels = functools.reduce(_Levels.or_better, choices)
    for _ in range(REFITS):
        codes = _round_to_codes(groups, levels.step, levels.low)  # (N, K / G, G)
        low = (groups - codes.mul_(levels.step)).mean(-1, keepdim=True)
        levels = levels.or_better(_Levels.of(groups, levels.step, low))
    codes = _round_to_codes(groups, levels.step, levels.low).to(torch.uint8).view(N, K)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed, levels.step[..., 0].to(torch.uint8), levels.low[..., 0].to(torch.int8), scale


def _round_to_codes(groups: Tensor, step: Tensor, low: Tensor) -> Tensor:
    """The nearest codes, as floats, whose values do not exceed 127."""
    highest = ((127 - low) / step).floor_().clamp_max_(15)
    return ((groups - low) / step).round_().clamp_min_(0).minimum(highest)


def unpack_codes(packed: Tensor) -> Tensor:
    """Two codes per byte (N, K / 2) uint8 -> codes (N, K) uint8 in 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def widen_codes(packed: Tensor, step: Tensor, low: Tensor) -> Tensor:
    """4-bit codes (N, K / 2), step and low (N, K / G) -> integers (N, K) int8 in -127..127."""
    groups = unpack_codes(packed).view(torch.int8).view(*step.shape, -1)  # (N, K / G, G)
    return groups.mul_(step.view(torch.int8)[..., None]).add_(low[..., None]).flatten(1)


def from_int4(packed: Tensor, step: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight (N, K) that codes, step, low and scale represent."""
    return from_int8(widen_codes(packed, step, low), scale)


def stored_parts(shape: tuple[int, ...], bits: int) -> list[tuple[str, tuple[int, ...], str]]:
    """The tensors of a quantised weight (N, K) in a file: suffix of the name, shape, dtype."""
    N, K = shape
    if bits == 8:
        return [("", (N, K), "I8"), ("_scale", (N,), "F32")]
    groups = (N, K // block_size(K, GROUP_COLUMNS))
    return [
        ("", (N, K // 2), "U8"),
        ("_step", groups, "U8"),
        ("_low", groups, "I8"),
        ("_scale", (N,), "F32"),
    ]
