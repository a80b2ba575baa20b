"""Layers whose activations become integers of one or two digits, times an integer weight.

A digit is an integer of 8 bits where the CPU sums products of 8 bits exactly (AVX-512 VNNI, AMX),
of 7 bits on other CPUs. Sums are exact, so a row's result does not depend on the other rows.
native.c does the rounding, the scaling, and the products of a few rows where it could be compiled,
with AVX2 alone also those of many rows; torch's operations do the rest.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import (
    PACKED_ROWS,
    digit_limit,
    multiplies_bfloat16,
    multiply_unsigned,
    packed_block_rows,
)
from .native import FEW_ROWS, LANES, TINY, Stored, kernels, multiplies_many
from .quantise import (
    GROUP_COLUMNS,
    ROTATED_COLUMNS,
    block_size,
    rotate_columns,
    row_abs_max,
    unpack_codes,
)
from .stored import (
    INPUT_ROWS,
    INT4_ROUNDING,
    INT8_ROUNDING,
    WIDENED_ROWS,
    Digits,
    Int4,
    Int8,
    StoredLinear,
    packed_values,
)

PACKED_INPUT_ROWS = 16  # torch's int4 kernel is faster than widening up to this many input rows
SPREAD_ROWS = 1024  # rows of an int4 weight that are widened to int8 at a time
SINGLE_ROWS = 4  # up to this many rows oneDNN is faster with one row at a time
NIBBLES = 0x0F0F0F0F0F0F0F0F  # the low four bits of eight bytes


class IntegerLinear(StoredLinear):
    """Integer activations, of one or two digits, times an integer weight."""

    def __init__(
        self, shape: tuple[int, int], bias: Tensor | None, digits: int = 1, limit: int = 127
    ) -> None:
        """shape: (N, K) of the weight. limit: the largest value of a digit, 127 or 63."""
        N, K = shape
        super().__init__(K, N, bias)
        self.digits, self.limit = digits, limit

    @property
    def activations(self) -> str:
        return f"activations of {(self.limit.bit_length() + 1) * self.digits} bits"

    @property
    def rounding(self) -> float:
        return INT8_ROUNDING

    def prepare(self, x: Tensor) -> Tensor | Digits:
        return x if not 0 < x.numel() <= INPUT_ROWS * self.in_features else self.to_digits(x)

    def multiply(self, x: Tensor) -> Tensor:
        return self.multiply_digits(self.to_digits(x))

    def to_digits(self, x: Tensor) -> Digits:
        return to_digits(x, self.digits, self.limit)

    @property
    def multiplier(self) -> str:
        """What multiplies many rows of digits by a weight row by row, for reports."""
        return "native.c" if multiplies_many(self.limit) else "oneDNN"


class Int8Linear(IntegerLinear):
    """An int8 weight and digits, multiplied by oneDNN or native.c."""

    scale: Tensor

    def __init__(self, weight: Int8, bias: Tensor | None, digits: int) -> None:
        N, K = weight.codes.shape
        super().__init__((N, K), bias, digits, digit_limit())
        self.weight = nn.Parameter(weight.codes, requires_grad=False)
        self.register_buffer("scale", weight.scale)
        self.nbytes = weight.codes.nbytes + weight.scale.nbytes

    @property
    def arithmetic(self) -> str:
        return f"int8 weights, {self.activations} ({self.multiplier})"

    @property
    def stored(self) -> Stored:
        return self.weight, None, None, self.scale

    def multiply_digits(self, digits: Digits) -> Tensor:
        compiled, share = kernels(), 0.5 / self.limit if self.digits == 2 else 0.0
        if compiled and (digits.step.shape[0] <= FEW_ROWS or multiplies_many(self.limit)):
            y = compiled.multiply(digits.codes, digits.step, self.stored, self.limit, share)
        else:
            sums = multiply_integers(digits.codes, self.weight, self.limit)
            y = scale_sums(sums, self.scale, digits.step, share)
        return y.to(digits.dtype)


class FbgemmLinear(IntegerLinear):
    """An int8 weight and integer activations of 7 bits, multiplied by fbgemm.

    fbgemm quantises its input by itself, with a step from the smallest and the largest value in all
    of it. One extra row that contains -64 and 63 makes that step exactly 1 and the zero point
    exactly 64, whatever the other rows contain.
    """

    range_row: Tensor

    def __init__(self, weight: Int8, bias: Tensor | None, digits: int) -> None:
        N, K = weight.codes.shape
        super().__init__((N, K), bias, digits, limit=63)
        self.nbytes = packed_values((N, K)) + weight.scale.nbytes
        with warnings.catch_warnings():  # torch will remove this type one day, see kernel_works()
            warnings.filterwarnings("ignore", ".*quantized tensor creation functions.*")
            integers = torch._make_per_channel_quantized_tensor(
                weight.codes, weight.scale.double(), torch.zeros(N, dtype=torch.long), 0
            )
        self.packed = torch.ops.quantized.linear_prepack(integers, None)
        range_row = torch.zeros(1, K)
        range_row[0, 0], range_row[0, -1] = -64, 63
        self.register_buffer("range_row", range_row, persistent=False)

    @property
    def arithmetic(self) -> str:
        return f"int8 weights, {self.activations} (fbgemm)"

    def to_digits(self, x: Tensor) -> Digits:
        digits = super().to_digits(x)
        return replace(digits, codes=torch.cat((digits.codes.float(), self.range_row)))

    def multiply_digits(self, digits: Digits) -> Tensor:
        R = len(digits.step)
        y = torch.ops.quantized.linear_dynamic(digits.codes, self.packed, True)
        if self.digits == 2:  # y (2 R + 1, N)
            y[:R].add_(y[R:-1], alpha=0.5 / self.limit)
        return y[:R].mul_(digits.step).to(digits.dtype)


class Int4Linear(IntegerLinear):
    """A 4-bit weight and activations of one digit, by native.c.

    For oneDNN, which multiplies more than a few rows on most CPUs, the whole weight is widened to
    int8 first, which takes a fiftieth of the time of the product.
    """

    codes: Tensor
    step: Tensor
    low: Tensor
    scale: Tensor

    def __init__(self, weight: Int4, bias: Tensor | None) -> None:
        N, K = len(weight.codes), 2 * weight.codes.shape[1]
        super().__init__((N, K), bias, limit=digit_limit())
        # native.c wants the 32 columns of a group in the same bits of 32 bytes
        pairs = unpack_codes(weight.codes).view(N, -1, 2, GROUP_COLUMNS)
        codes = (pairs[:, :, 0] | pairs[:, :, 1] << 4).view(N, K // 2)
        parts = {"codes": codes, "step": weight.step, "low": weight.low, "scale": weight.scale}
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)
        self.nbytes = sum(part.nbytes for part in parts.values())

    @staticmethod
    def takes(weight: Int4) -> bool:
        """Whether its columns are pairs of whole groups."""
        K = 2 * weight.codes.shape[1]
        return K % (2 * GROUP_COLUMNS) == 0 and K // weight.step.shape[1] == GROUP_COLUMNS

    @property
    def arithmetic(self) -> str:
        names = dict.fromkeys(("native.c", self.multiplier))
        return f"int4 weights, {self.activations} ({' and '.join(names)})"

    @property
    def stored(self) -> Stored:
        return self.codes, self.step, self.low, self.scale

    @property
    def rounding(self) -> float:
        return INT4_ROUNDING

    def multiply_digits(self, digits: Digits) -> Tensor:
        compiled = kernels()
        assert compiled, "this layer is made only where native.c was compiled"
        if digits.step.shape[0] <= FEW_ROWS or multiplies_many(self.limit):
            y = compiled.multiply(digits.codes, digits.step, self.stored, self.limit)
        else:
            wide = torch.empty(self.out_features, self.in_features, dtype=torch.int8)
            compiled.widen_int4(self.codes, self.step, self.low, wide)
            sums = multiply_integers(digits.codes, wide, self.limit)
            y = scale_sums(sums, self.scale, digits.step)
        return y.to(digits.dtype)


class PackedInt4Linear(IntegerLinear):
    """A 4-bit weight and activations of one digit, where native.c is not there.

    For a few rows of input torch's kernel reads the packed codes. It takes bfloat16, which holds
    the digits and the integers code * step + low exactly. For more rows, blocks of the weight are
    widened to int8 and multiplied by oneDNN. Both sum integers exactly and round the sums to
    bfloat16, so a row's result does not depend on the number of rows.
    """

    packed: Tensor
    pairs: Tensor
    scale: Tensor

    def __init__(self, weight: Int4, bias: Tensor | None) -> None:
        N, G = len(weight.codes), 2 * weight.codes.shape[1] // weight.step.shape[1]
        super().__init__((N, 2 * weight.codes.shape[1]), bias, limit=digit_limit())
        self.group = G
        self.register_buffer("scale", weight.scale, persistent=False)
        step, low = weight.step.bfloat16(), weight.low.bfloat16()
        pairs = torch.stack((step, low + 8 * step), -1).transpose(0, 1)  # (K / G, N, 2)
        pairs = F.pad(pairs, (0, 0, 0, -N % PACKED_ROWS)).contiguous()  # the second is code 8's
        self.register_buffer("pairs", pairs, persistent=False)
        packed = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                F.pad(unpack_codes(part), (0, 0, 0, -len(part) % PACKED_ROWS)).int(), 1
            )
            for part in weight.codes.split(WIDENED_ROWS)
        ]
        self.register_buffer("packed", torch.cat(packed), persistent=False)
        self.nbytes = self.packed.nbytes + self.pairs.nbytes + self.scale.nbytes

    @property
    def arithmetic(self) -> str:
        return f"int4 weights, {self.activations} (torch and oneDNN)"

    @property
    def rounding(self) -> float:
        return INT4_ROUNDING

    def to_digits(self, x: Tensor) -> Digits:
        digits = super().to_digits(x)
        few = len(digits.codes) <= PACKED_INPUT_ROWS
        return replace(digits, codes=digits.codes.bfloat16()) if few else digits

    def multiply_digits(self, digits: Digits) -> Tensor:
        codes, dtype = digits.codes, digits.dtype
        if codes.dtype == torch.bfloat16:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                codes, self.packed, self.group, self.pairs
            )
        else:
            y = self._multiply_widened(codes)
        y = y[:, : self.out_features].to(dtype)  # the sums (R, N)
        return y.mul_(self.scale.to(dtype)).mul_(digits.step)

    def _multiply_widened(self, codes: Tensor) -> Tensor:
        """Exact sums (R, N + padding), rounded to bfloat16, of codes (R, K)."""
        R, padded = len(codes), len(self.packed)
        y = torch.empty(R, padded, dtype=torch.bfloat16)
        scratch = torch.empty(self.in_features * min(SPREAD_ROWS, padded) // 8, dtype=torch.int64)
        for at in range(0, padded, SPREAD_ROWS):
            wide = self.widen(slice(at, at + SPREAD_ROWS), scratch)  # (K, n)
            y[:, at : at + SPREAD_ROWS] = multiply_integers(codes, wide.T, self.limit)
        return y

    def widen(self, rows: slice, scratch: Tensor) -> Tensor:
        """The integers (K, n) int8 of n rows, whole blocks of the kernel, in the memory of scratch.

        The kernel's layout is (N / b, K, b / 2) bytes for blocks of b rows: the low four bits of a
        byte belong to the first half of a block, the high four bits to the second half.
        """
        K, b = self.in_features, packed_block_rows()
        packed = self.packed[rows].view(torch.int64).view(-1, K, b // 16).transpose(0, 1)
        wide = scratch[: 2 * packed.numel()].view(K, -1, b // 8)  # (K, n / b, b / 8) of 8 bytes
        first, second = wide.chunk(2, dim=-1)
        first.copy_(packed)
        torch.bitwise_right_shift(packed, 4, out=second)
        wide.bitwise_and_(NIBBLES)
        step, middle = self.pairs[:, rows].unbind(-1)  # (K / G, n)
        values = wide.view(torch.int8).view(len(step), self.group, -1)  # (K / G, G, n)
        values.mul_(step.to(torch.int8)[:, None]).add_((middle - 8 * step).to(torch.int8)[:, None])
        return values.view(K, -1)


def to_digits(x: Tensor, digits: int, limit: int) -> Digits:
    """Activations (..., K) as integers.

    Each row is rotated like the weight, divided by a step that makes its largest value `limit`, and
    rounded: that is its first digit. The remainder times 2 * limit gives the second digit. A row
    with NaN or infinity has a step that is not finite.
    """
    rows, compiled = x.flatten(0, -2), kernels()  # (R, K)
    large_enough = block_size(x.shape[-1], ROTATED_COLUMNS) >= LANES
    if compiled and large_enough and x.dtype == torch.float32:
        return Digits(*compiled.to_digits(rows, digits, limit), x.shape, x.dtype)
    if digits == 1 and multiplies_bfloat16():
        rows = rows.bfloat16()  # the rotation takes a third of the time, at the digits' precision
    rotated = rotate_columns(rows)
    step = row_abs_max(rotated).float().div_(limit).clamp_min_(TINY)
    value = rotated * step.reciprocal()  # (R, K) float32
    if digits == 1:
        codes = value.round_()
    else:
        first = value.round()
        codes = torch.cat((first, value.sub_(first).mul_(2 * limit).round_()))
    return Digits(codes.to(torch.int8), step, x.shape, x.dtype)


def multiply_integers(codes: Tensor, weight: Tensor, limit: int) -> Tensor:
    """Sums (R, N) of products of digits (R, K) and a weight (N, K), both int8, by oneDNN.

    int32 with digits of 8 bits. With 7 bits they are exact in the instructions that add two
    products in 16 bits only if oneDNN gets them as unsigned numbers, and they come in float32.
    """
    if limit == 127:
        if 1 < len(codes) <= SINGLE_ROWS:
            return torch.cat([torch._int_mm(row, weight.T) for row in codes.split(1)])
        return torch._int_mm(codes, weight.T)
    return multiply_unsigned(codes.view(torch.uint8) + (limit + 1), limit + 1, weight)


def scale_sums(sums: Tensor, scale: Tensor, step: Tensor, share: float = 0.0) -> Tensor:
    """Sums (R, N), of two digits (2 R, N), -> results (R, N) float32, perhaps in their memory.

    scale (N,) of the weight, step (R, 1) of the activations. share: what the sums of the second
    digit are multiplied by before they are added to those of the first.
    """
    R, compiled = len(step), kernels()
    if compiled and sums.dtype == torch.int32:
        return compiled.scale_sums(sums, scale, step, share)
    y = sums[:R].float()
    if share:
        y.add_(sums[R:].float().mul_(share))
    return y.mul_(scale).mul_(step)
