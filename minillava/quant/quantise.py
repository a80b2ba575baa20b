"""Quantise weights to 8 or 4 bits: pure functions on tensors, without layers or files.

int8 has one scale per row of the weight (N, K) and rounds to nearest, after the columns have been
rotated. int4 has one scale and one lowest value for each group of 64 columns of a row.

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
GROUP_COLUMNS = 64  # columns of an int4 weight that share a scale, at most
CLIPPED = 1 / 32  # share of a group's range that an int4 weight may clip at either end: half a step
REFITS = 2  # times that scale and lowest value of an int4 group are fitted to their codes


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
    # On a CPU this takes a tenth of the time of aminmax at 620 rows, and abs would make a copy.
    return torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))


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


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (N, K) -> codes (N, K / 2) uint8, scale and low (N, K / G) bfloat16.

    A column's value is code * scale + low of its group, with a code in 0..15. A byte holds two
    columns, the left one in its low four bits. The 16 levels span the range of a group's values,
    or that range without CLIPPED of it at one end or both, whichever has the smallest squared
    error. Then scale and low are fitted to the codes by least squares, REFITS times, as long as
    this makes the error smaller. On Gaussian weights the mean squared error is 16 % smaller than
    that of the whole range. Codes are rounded for the scale in bfloat16.
    """
    codes, scale, low = zip(*map(_to_int4, weight.split(CHUNK_ROWS // 8)), strict=True)
    return torch.cat(codes), torch.cat(scale), torch.cat(low)


@dataclass(frozen=True)
class _Levels:
    """The 16 levels of each group, with the squared error that they leave; all (N, K / G, 1)."""

    scale: Tensor  # bfloat16
    low: Tensor  # bfloat16
    error: Tensor

    @classmethod
    def of(cls, groups: Tensor, scale: Tensor, low: Tensor) -> _Levels:
        scale, low = scale.bfloat16(), low.bfloat16()
        return cls(scale, low, _squared_error(groups, scale, low))

    def or_better(self, other: _Levels) -> _Levels:
        """The levels with the smaller error, group by group; these ones where they are equal."""
        better = other.error < self.error
        pairs = zip(vars(other).values(), vars(self).values(), strict=True)
        return _Levels(*(torch.where(better, new, old) for new, old in pairs))


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, K = weight.shape
    groups = weight.float().view(N, -1, block_size(K, GROUP_COLUMNS))  # (N, K / G, G)
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # (N, K / G, 1)
    span = highest - lowest
    levels = _Levels.of(groups, span / 15, lowest)
    for left, right in ((CLIPPED, 0.0), (0.0, CLIPPED), (CLIPPED, CLIPPED)):
        scale, low = span * ((1 - left - right) / 15), lowest + span * left
        levels = levels.or_better(_Levels.of(groups, scale, low))
    for _ in range(REFITS):
        levels = levels.or_better(_fit_levels(groups, levels))
    codes = _round_to_codes(groups, levels.scale, levels.low).to(torch.uint8).view(N, K)
    return codes[:, 0::2] | codes[:, 1::2] << 4, levels.scale[..., 0], levels.low[..., 0]


def _fit_levels(groups: Tensor, levels: _Levels) -> _Levels:
    """The scale and lowest value with the least squared error for the codes of these levels."""
    codes = _round_to_codes(groups, levels.scale, levels.low)  # (N, K / G, G)
    mean_code, mean = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    codes.sub_(mean_code)
    variance = codes.square().sum(-1, keepdim=True)  # 0 if a group's codes are all equal
    scale = (codes * groups).sum(-1, keepdim=True) / variance.clamp_min(0.5)
    return _Levels.of(groups, scale, mean - scale * mean_code)


def _round_to_codes(groups: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The nearest codes, as floats."""
    step = scale.float().clamp_min(torch.finfo(torch.bfloat16).tiny)
    return ((groups - low.float()) / step).round_().clamp_(0, 15)


def _squared_error(groups: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Sum of squared errors of each group: (N, K / G, G) -> (N, K / G, 1)."""
    values = _round_to_codes(groups, scale, low).mul_(scale.float()).add_(low.float())
    return values.sub_(groups).square_().sum(-1, keepdim=True)


def unpack_codes(packed: Tensor) -> Tensor:
    """Two codes per byte (N, K / 2) uint8 -> codes (N, K) uint8 in 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def from_int4(packed: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The float32 weight (N, K) that codes, scale and low represent."""
    groups = unpack_codes(packed).float().view(*scale.shape, -1)  # (N, K / G, G)
    return groups.mul_(scale.float()[..., None]).add_(low.float()[..., None]).flatten(1)


def stored_parts(shape: tuple[int, ...], bits: int) -> list[tuple[str, tuple[int, ...], str]]:
    """The tensors of a quantised weight (N, K) in a file: suffix of the name, shape, dtype."""
    N, K = shape
    if bits == 8:
        return [("", (N, K), "I8"), ("_scale", (N,), "F32")]
    groups = (N, K // block_size(K, GROUP_COLUMNS))
    return [("", (N, K // 2), "U8"), ("_scale", groups, "BF16"), ("_low", groups, "BF16")]
