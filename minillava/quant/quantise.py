"""Weights as small integers: the numbers alone, as pure functions.

int8: one scale a row, round to nearest, after a rotation of the input columns. int4: one scale and
one lowest level for each group of columns of a row. The rotation is by an orthogonal matrix with
entries of +-1 / sqrt(b) on blocks of b columns (Hadamard), on weights here and on activations when
they are multiplied: W x = (W H)(H x). It spreads the few columns that carry very large activations
in a Llama, so that activations can be integers too: QuaRot (arXiv 2404.00456) in its plainest form.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATED = 128  # columns turned together, at most
PIECE = 512  # rows that are worked on at one time: a row does not depend on others, memory does
FEW = 16  # rows below which a matrix product may add in another order
GROUP = 64  # columns of an int4 weight that share a scale, at most
CUT = 0.05  # of a group's range, that an int4 weight may leave out at either end


def block(K: int, most: int) -> int:
    """The largest power of two up to `most` that divides K."""
    return min(K & -K, most)


@functools.cache
def hadamard(b: int) -> Tensor:
    """Orthogonal and symmetric (b, b), all entries +-1 / sqrt(b); b is a power of two."""
    signs = torch.ones(1, 1)
    while len(signs) < b:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs / b**0.5


def rotated(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn the columns of (R, K) in blocks; doing it twice gives x again."""
    b = block(x.shape[-1], ROTATED)
    H = hadamard(b).to(x.device, x.dtype)
    out = torch.empty_like(x) if out is None else out
    blocks, turned = x.reshape(-1, b), out.view(-1, b)
    if len(blocks) < FEW:  # as many as it takes for the bits that they have among others
        return turned.copy_((F.pad(blocks, (0, 0, 0, FEW)) @ H)[: len(blocks)]).view(x.shape)
    torch.mm(blocks, H, out=turned)
    return out


def largest(x: Tensor) -> Tensor:
    """The largest absolute value of each row of (R, K), (R, 1); NaN if there is one."""
    # on a CPU a tenth of the time of aminmax at 620 rows, and no copy as abs would make
    return torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (N, K) -> codes (N, K) int8 in +-127 of the rotated weight, scale (N,) float32."""
    codes, scale = zip(*map(_to_int8, weight.split(PIECE)), strict=True)
    return torch.cat(codes), torch.cat(scale)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    turned = rotated(weight.float())
    scale = largest(turned)[:, 0] / 127  # (N,)
    codes = turned.div_(scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    return codes.to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight (N, K) that codes and scale stand for."""
    return rotated(codes.float() * scale[:, None])


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (N, K) -> codes (N, K / 2) uint8, scale and low (N, K / G) bfloat16.

    The value of a column is code * scale + low of its group. Of two columns in one byte the left
    one is in the low four bits. The codes are chosen for the scales as rounded. The sixteen levels
    span a group's values, or, where that gives a smaller squared error, all but a CUT of their
    range at one end or at both: a twentieth less of error on Gaussian weights.
    """
    codes, scale, low = zip(*map(_to_int4, weight.split(PIECE // 8)), strict=True)
    return torch.cat(codes), torch.cat(scale), torch.cat(low)


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, K = weight.shape
    groups = weight.float().view(N, -1, block(K, GROUP))  # (N, K / G, G)
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # (N, K / G, 1)
    span = highest - lowest
    scale, low = (span / 15).bfloat16(), lowest.bfloat16()
    least = _error(groups, scale, low)
    for left, right in ((CUT, 0.0), (0.0, CUT), (CUT, CUT)):
        other = (span * ((1 - left - right) / 15)).bfloat16(), (lowest + span * left).bfloat16()
        error = _error(groups, *other)
        better = error < least
        least = torch.where(better, error, least)
        scale, low = torch.where(better, other[0], scale), torch.where(better, other[1], low)
    codes = _nearest(groups, scale, low).to(torch.uint8).view(N, K)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale[..., 0], low[..., 0]


def _nearest(groups: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Codes as floats."""
    step = scale.float().clamp_min(torch.finfo(torch.bfloat16).tiny)
    return ((groups - low.float()) / step).round_().clamp_(0, 15)


def _error(groups: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Sum of squares over each group, (N, K / G, 1)."""
    values = _nearest(groups, scale, low).mul_(scale.float()).add_(low.float())
    return values.sub_(groups).square_().sum(-1, keepdim=True)


def codes_of(packed: Tensor) -> Tensor:
    """(N, K / 2) uint8 as stored -> codes (N, K) uint8 in 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def from_int4(packed: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The float32 weight (N, K) that codes, scale and low stand for."""
    groups = codes_of(packed).float().view(*scale.shape, -1)  # (N, K / G, G)
    return groups.mul_(scale.float()[..., None]).add_(low.float()[..., None]).flatten(1)


def stored_parts(shape: tuple[int, ...], bits: int) -> list[tuple[str, tuple[int, ...], str]]:
    """What a weight (N, K) is in a file: suffix of the name, shape and safetensors' word for it."""
    N, K = shape
    if bits == 8:
        return [("", (N, K), "I8"), ("_scale", (N,), "F32")]
    groups = (N, K // block(K, GROUP))
    return [("", (N, K // 2), "U8"), ("_scale", groups, "BF16"), ("_low", groups, "BF16")]
