"""Linear layers whose weights are stored in fewer bits than the arithmetic uses.

load() replaces each nn.Linear by one of them; the code of the model does not change. Inputs and
outputs have the model's dtype. "Widened" means that a block of the weight is converted to that
dtype, multiplied, and overwritten by the next block.

    form          on a CPU with torch's kernels                               anywhere else
    float16       float16 weights, float32 activations and sums               widened
    bfloat16      widened (see below)                                         widened
    int8          int8 weights, activations as two digits, exact sums         widened
    int8-dynamic  int8 weights, activations as one digit, exact sums          widened
    int4          4-bit codes of int8 weights, one digit, exact sums          widened
    nf4, fp4      widened: the 4-bit weights of bitsandbytes (nf4.py)         widened
    LLM.int8      widened: the 8-bit weights of bitsandbytes                  widened

A digit is an integer of 8 bits where the CPU multiplies them exactly (AVX-512 VNNI, AMX), of 7 bits
on other CPUs, whose instructions for 8 bits saturate: digit_limit() finds out by trying.

A CPU that multiplies bfloat16 in hardware (AVX-512 BF16, AMX, Arm's BF16) does so at twice the rate
of float32 or more. There a model in bfloat16 keeps its nn.Linear layers and computes in bfloat16,
as on a GPU: multiplies_bfloat16() says whether this is such a CPU.

A row's result does not depend on the other rows of the input: bit-exact in float32 for the forms
with exact sums, up to summation order otherwise. NaN in a row gives NaN in its result.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nf4 import Nested, Nf4, from_nf4, level_pairs
from .quantise import rotate_columns, row_abs_max, to_int4, to_int8, unpack_codes, widen_codes

WIDENED_ROWS = 512  # rows of a weight that are widened at a time
INPUT_ROWS = 1024  # rows of an input that are multiplied at a time
PACKED_GROUPS, PACKED_ROWS = (32, 64, 128, 256), 64  # sizes that the int4 kernel supports
PACKED_INPUT_ROWS = 16  # the int4 kernel is faster than widening up to this many input rows
SPREAD_ROWS = 1024  # rows of an int4 weight that are widened to int8 at a time
NIBBLES = 0x0F0F0F0F0F0F0F0F  # the low four bits of eight bytes
TINY = torch.finfo(torch.float32).tiny
ONEDNN_ROWS = 6  # for fewer rows oneDNN reads a weight at three quarters of the rate
PACKED_COLUMNS = 512  # fbgemm pads the columns of a weight to a multiple of this
INT8_ROUNDING, INT4_ROUNDING = 0.4, 0.7  # see StoredLinear.rounding


@dataclass(frozen=True)
class Int8:
    """A weight in 8 bits, as made by quantise.to_int8."""

    codes: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32


@dataclass(frozen=True)
class Int4:
    """A weight in 4 bits, as made by quantise.to_int4."""

    codes: Tensor  # (N, K / 2) uint8
    step: Tensor  # (N, K / G) uint8
    low: Tensor  # (N, K / G) int8
    scale: Tensor  # (N,) float32


@dataclass(frozen=True)
class RowInt8:
    """A weight in 8 bits as LLM.int8() of bitsandbytes stores it: codes * scale / 127."""

    codes: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32, the largest absolute value of a row


Weight = Tensor | Int8 | Int4 | RowInt8 | Nf4


@dataclass(frozen=True)
class Digits:
    """Activations (..., K) = (R, K) as integers times a step for each row, as made by to_digits."""

    codes: Tensor  # (R, K), (2 R, K) if there are two digits: first all first ones
    step: Tensor  # (R, 1) float32
    shape: torch.Size  # of the activations
    dtype: torch.dtype  # of the activations


class StoredLinear(nn.Module):
    """y = x W^T + bias. Subclasses store W (N, K) in their own form and multiply by it."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.nbytes = 0  # memory of the weight in its stored form

    @property
    def arithmetic(self) -> str:
        """What is multiplied with what, in words for reports."""
        raise NotImplementedError

    @property
    def rounding(self) -> float:
        """By which share of itself rounding may move an attention weight, against float32.

        Measured on the demo: the largest share at which one of 17 methods, on one of 40 scenes,
        kept another set was 0.26 for int8, with digits of 7 bits, and 0.46 for int4, with groups of
        64 columns. The report compares margins with it.
        """
        return INT4_ROUNDING

    def prepare(self, x: Tensor) -> Tensor | Digits:
        """What several layers of one form that are given the same x can share: here x itself."""
        return x

    def forward(self, x: Tensor | Digits) -> Tensor:
        """x (..., K), or what prepare() made of it -> (..., N) in the dtype of x."""
        if isinstance(x, Digits):
            y = self.multiply_digits(x)
        else:
            y = self._multiply_in_parts(x.flatten(0, -2))
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiply_in_parts(self, x: Tensor) -> Tensor:
        if len(x) <= INPUT_ROWS:
            return self.multiply(x) if len(x) else x.new_empty(0, self.out_features)
        y = x.new_empty(len(x), self.out_features)
        for at in range(0, len(x), INPUT_ROWS):
            y[at : at + INPUT_ROWS] = self.multiply(x[at : at + INPUT_ROWS])
        return y

    def multiply(self, x: Tensor) -> Tensor:
        """x (R, K) with R > 0 -> x W^T (R, N), in new memory."""
        raise NotImplementedError

    def multiply_digits(self, digits: Digits) -> Tensor:
        """The same from the digits of x, of layers whose prepare() makes them."""
        raise NotImplementedError


class WidenedLinear(StoredLinear):
    """Any form of weight; blocks of it are converted to the dtype of the input before use."""

    step: Tensor
    low: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor | Int8 | Int4 | RowInt8, bias: Tensor | None) -> None:
        parts = {"codes": weight} if isinstance(weight, Tensor) else dict(vars(weight))
        codes = parts.pop("codes")
        N, K = codes.shape
        super().__init__(2 * K if isinstance(weight, Int4) else K, N, bias)
        self.form = type(weight)
        self.weight = nn.Parameter(codes, requires_grad=False)  # a tied head shares this tensor
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.nbytes = codes.nbytes + sum(part.nbytes for part in parts.values())

    @property
    def arithmetic(self) -> str:
        names = {Int8: "int8", Int4: "int4", RowInt8: "LLM.int8"}
        return f"weights widened from {names.get(self.form, str(self.weight.dtype)[6:])}"

    @property
    def rounding(self) -> float:
        if self.form in (Int8, RowInt8):
            return INT8_ROUNDING
        if self.form is Int4:
            return INT4_ROUNDING
        return 2 * torch.finfo(self.weight.dtype).eps ** 0.5

    def multiply(self, x: Tensor) -> Tensor:
        integers = self.form in (Int8, Int4)
        if integers:
            x = rotate_columns(x)
        y = x.new_empty(len(x), self.out_features)
        # A block that stays in a CPU's cache; a GPU converts the whole weight.
        rows = min(WIDENED_ROWS, self.out_features) if x.device.type == "cpu" else self.out_features
        scratch = x.new_empty(rows, self.in_features)
        for at in range(0, self.out_features, rows):
            block = slice(at, min(at + rows, self.out_features))
            wide = scratch[: block.stop - at]  # (rows, K)
            if self.form is Int4:
                wide.copy_(widen_codes(self.weight[block], self.step[block], self.low[block]))
            else:
                wide.copy_(self.weight[block])
            if self.form is RowInt8:
                wide.mul_(self.scale[block, None] / 127)
            torch.mm(x, wide.T, out=y[:, block])
        return y.mul_(self.scale.to(y.dtype)) if integers else y


class Nf4Linear(StoredLinear):
    """A 4-bit weight of bitsandbytes; blocks of rows are converted before use."""

    codes: Tensor
    absmax: Tensor
    scale: Tensor
    levels: Tensor
    offset: Tensor
    pairs: Tensor

    def __init__(self, weight: Nf4, bias: Tensor | None) -> None:
        N, K = weight.shape
        super().__init__(K, N, bias)
        self.kind, self.block, self.compute = weight.kind, weight.block, weight.compute
        self.nested = isinstance(weight.absmax, Nested)
        parts = {"codes": weight.codes}
        if isinstance(weight.absmax, Nested):
            nested = weight.absmax
            parts |= {"absmax": nested.codes, "scale": nested.scale, "offset": nested.offset}
            self.register_buffer("levels", nested.levels)
        else:
            parts["absmax"] = weight.absmax
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.register_buffer("pairs", level_pairs(self.kind, weight.codes.device), persistent=False)
        self.nbytes = sum(part.nbytes for part in parts.values())  # layers share levels and pairs

    @property
    def arithmetic(self) -> str:
        return f"weights widened from {self.kind}"

    @property
    def stored(self) -> Nf4:
        """The weight, from the tensors that this module holds now."""
        absmax: Tensor | Nested = self.absmax
        if self.nested:
            absmax = Nested(self.absmax, self.scale, self.levels, self.offset)
        shape = self.out_features, self.in_features
        return Nf4(self.codes, absmax, shape, self.kind, self.block, self.compute)

    def multiply(self, x: Tensor) -> Tensor:
        on_cpu, stored = x.device.type == "cpu", self.stored
        y = x.new_empty(len(x), self.out_features)
        # A CPU computes in the dtype of the model whatever the checkpoint names, as everywhere.
        wide_x = x if on_cpu or self.compute is None else x.to(self.compute)
        rows = min(WIDENED_ROWS, self.out_features) if on_cpu else self.out_features
        for at in range(0, self.out_features, rows):
            stop = min(at + rows, self.out_features)
            wide = from_nf4(stored, at, stop, self.pairs).to(wide_x.dtype)  # (rows, K)
            y[:, at:stop] = wide_x @ wide.T
        return y


class HalfLinear(StoredLinear):
    """A float16 weight and float32 activations, multiplied by fbgemm."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        self.nbytes = 2 * _packed_values(weight.shape)

    @property
    def arithmetic(self) -> str:
        return "float32 with float16 weights (fbgemm)"

    @property
    def rounding(self) -> float:
        return 2 * torch.finfo(torch.float16).eps ** 0.5

    @property
    def weight(self) -> Tensor:
        """A copy (N, K) in float16."""
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0].half()

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class IntegerLinear(StoredLinear):
    """Integer activations, of one or two digits, times an integer weight."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, digits: int):
        super().__init__(in_features, out_features, bias)
        self.digits = digits

    @property
    def rounding(self) -> float:
        return INT8_ROUNDING

    def prepare(self, x: Tensor) -> Tensor | Digits:
        return x if not 0 < x.numel() <= INPUT_ROWS * self.in_features else self.to_digits(x)

    def multiply(self, x: Tensor) -> Tensor:
        return self.multiply_digits(self.to_digits(x))

    def to_digits(self, x: Tensor) -> Digits:
        return to_digits(x, self.digits, digit_limit())


class OneDnnLinear(IntegerLinear):
    """An int8 weight and integer activations, multiplied by oneDNN with 8-bit dot products."""

    scale: Tensor
    zeros: Tensor

    def __init__(self, weight: Int8, bias: Tensor | None, digits: int) -> None:
        N, K = weight.codes.shape
        super().__init__(K, N, bias, digits)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zeros", torch.zeros(N, dtype=torch.int64), persistent=False)
        self.packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)
        self.nbytes = weight.codes.nbytes

    @property
    def arithmetic(self) -> str:
        return f"int8 weights, activations of {8 * self.digits} bits (oneDNN)"

    def to_digits(self, x: Tensor) -> Digits:
        digits = super().to_digits(x)
        return replace(digits, codes=shift_codes(digits.codes))

    def multiply_digits(self, digits: Digits) -> Tensor:
        R, dtype = len(digits.step), digits.dtype if self.digits == 1 else torch.float32
        y = multiply_integers(digits.codes, self.packed, self.scale, self.zeros, dtype)
        if self.digits == 2:  # y (2 R, N)
            y[:R].add_(y[R : 2 * R], alpha=0.5 / digit_limit())
        return y[:R].mul_(digits.step).to(digits.dtype)


class Int8Linear(IntegerLinear):
    """An int8 weight and integer activations of 7 bits, multiplied by fbgemm.

    fbgemm quantises its input by itself, with a step from the smallest and the largest value in all
    of it. One extra row that contains -64 and 63 makes that step exactly 1 and the zero point
    exactly 64, whatever the other rows contain.
    """

    range_row: Tensor

    def __init__(self, weight: Int8, bias: Tensor | None, digits: int) -> None:
        N, K = weight.codes.shape
        super().__init__(K, N, bias, digits)
        self.nbytes = _packed_values((N, K)) + weight.scale.nbytes
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
        return f"int8 weights, activations of {7 * self.digits} bits (fbgemm)"

    def to_digits(self, x: Tensor) -> Digits:
        digits = to_digits(x, self.digits, limit=63)
        return replace(digits, codes=torch.cat((digits.codes.float(), self.range_row)))

    def multiply_digits(self, digits: Digits) -> Tensor:
        R = len(digits.step)
        y = torch.ops.quantized.linear_dynamic(digits.codes, self.packed, True)
        if self.digits == 2:  # y (2 R + 1, N)
            y[:R].add_(y[R:-1], alpha=0.5 / 63)
        return y[:R].mul_(digits.step).to(digits.dtype)


class Int4Linear(IntegerLinear):
    """A 4-bit weight and activations of one digit.

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
        super().__init__(2 * weight.codes.shape[1], N, bias, digits=1)
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
        bits = digit_limit().bit_length() + 1
        return f"int4 weights, activations of {bits} bits (torch and oneDNN)"

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
        sums = torch.empty(R * SPREAD_ROWS, dtype=torch.int32)
        exact = digit_limit() == 127
        shifted = codes if exact else shift_codes(codes)
        one, zeros = torch.ones(SPREAD_ROWS), torch.zeros(SPREAD_ROWS, dtype=torch.int64)
        for at in range(0, padded, SPREAD_ROWS):
            wide = self.widen(slice(at, at + SPREAD_ROWS), scratch)  # (K, n)
            n = wide.shape[1]
            if exact:
                product = torch._int_mm(codes, wide, out=sums[: R * n].view(R, n))
            else:  # torch._int_mm would not use oneDNN
                product = multiply_integers(
                    shifted, wide.to_mkldnn(), one[:n], zeros[:n], torch.bfloat16
                )
            y[:, at : at + n] = product
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
    rows = x.flatten(0, -2)  # (R, K)
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


def shift_codes(codes: Tensor) -> Tensor:
    """codes (R, K) int8 as uint8, which oneDNN multiplies: 0 becomes digit_limit() + 1."""
    if len(codes) == 1:
        codes = codes.expand(ONEDNN_ROWS, -1)
    elif len(codes) < ONEDNN_ROWS:
        codes = F.pad(codes, (0, 0, 0, ONEDNN_ROWS - len(codes)))
    return codes.view(torch.uint8).add(digit_limit() + 1)


def multiply_integers(
    shifted: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, dtype: torch.dtype
) -> Tensor:
    """Codes of shift_codes (R, K) times a weight in oneDNN's form (K, N), times scale (N,).

    zeros (N,) int64: the codes that mean 0 in each row of the weight, which are 0.
    """
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, digit_limit() + 1, packed, scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )


def choose_linear(weight: Weight, bias: Tensor | None, digits: int = 2) -> StoredLinear:
    """Make the layer that the table at the top of this file lists for a weight on its device.

    digits: how many digits activations get if they become integers (1 for int8-dynamic).
    """
    if isinstance(weight, Nf4):
        return Nf4Linear(weight, bias)
    if isinstance(weight, RowInt8):
        return WidenedLinear(weight, bias)
    if isinstance(weight, Int8):
        if weight.codes.device.type == "cpu" and kernel_works("onednn"):
            return OneDnnLinear(weight, bias, digits)
        if weight.codes.device.type == "cpu" and kernel_works("int8"):
            return Int8Linear(weight, bias, digits)
    elif isinstance(weight, Int4):
        K, groups = 2 * weight.codes.shape[1], weight.step.shape[1]
        supported = weight.codes.device.type == "cpu" and K // groups in PACKED_GROUPS
        if supported and kernel_works("int4"):
            return Int4Linear(weight, bias)
    elif weight.dtype == torch.float16 and kernel_works("float16") and _is_finite(weight):
        return HalfLinear(weight, bias)
    return WidenedLinear(weight, bias)


def _packed_values(shape: Sequence[int]) -> int:
    """The number of values that fbgemm stores for a weight (N, K), with its padding."""
    N, K = shape
    return N * (K + -K % PACKED_COLUMNS)


def _is_finite(weight: Tensor) -> bool:
    """For float16: finite values have a finite float32 sum. fbgemm turns infinity into 65504."""
    return bool(weight.sum(dtype=torch.float32).isfinite())


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 matrices, and torch uses them.

    Without them torch computes bfloat16 in float32 with conversions, at a seventh of the rate.
    oneDNN, which multiplies, can be told to leave them alone (ONEDNN_MAX_CPU_ISA=AVX2); x86 CPUs
    with AVX-512 but without its BF16 extension pass oneDNN's own test, hence the second one.
    """
    try:
        used = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (RuntimeError, AttributeError):  # a torch without oneDNN
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        extensions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return used and any(getattr(torch.cpu, name, bool)() for name in extensions)
    return used


@functools.cache
def digit_limit() -> int:
    """The largest activation, 127 or 63, whose products with int8 weights oneDNN sums exactly.

    Instructions older than VNNI add two products of 8 bits in 16 bits, which saturate.
    """
    inputs = torch.full((ONEDNN_ROWS, 256), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((64, 256), 127, dtype=torch.int8), None)
    y = torch.ops.onednn.qlinear_pointwise(
        inputs, 1.0, 0, packed, torch.ones(64), torch.zeros(64, dtype=torch.int64), None, 1.0, 0,
        torch.float32, "none", [], "",
    )  # fmt: skip
    return 127 if (y == 255 * 127 * 256).all() else 63


@functools.cache
def packed_block_rows() -> int:
    """Rows of a block in the layout of torch's int4 kernel: 64 with AVX-512, 32 with AVX2."""
    codes = torch.zeros(PACKED_ROWS, 32, dtype=torch.int32)
    codes[32:] = 1
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return 64 if (packed == 16).all() else 32


@functools.cache
def kernel_works(kind: str) -> bool:
    """Whether this torch on this CPU has the kernel for a form, and it computes correctly.

    "onednn" is int8 by oneDNN where its products of 8 bits are exact; "int8" is int8 by fbgemm.
    """
    works = {
        "float16": _half_works, "onednn": _onednn_works, "int8": _int8_works, "int4": _int4_works,
    }  # fmt: skip
    try:
        return works[kind]()
    except (RuntimeError, AttributeError):  # raised by torch for a missing kernel
        return False


def _examples() -> tuple[Tensor, Tensor]:
    """Inputs (20, 64) and a weight (70, 64) of small integers."""
    x = (torch.arange(1280) % 13 - 6.0).view(20, 64)
    return x, (torch.arange(4480) % 11 - 5.0).view(70, 64)


def _half_works() -> bool:
    x, weight = _examples()
    weight = weight * 2.0**-20  # below the normal range of float16
    return torch.equal(HalfLinear(weight, None).multiply(x), x @ weight.T)


def _onednn_works() -> bool:
    x, weight = _examples()
    kernel = OneDnnLinear(Int8(*to_int8(weight)), None, digits=2)
    return digit_limit() == 127 and _multiplies_like_widened(kernel, Int8(*to_int8(weight)), x)


def _int8_works() -> bool:
    x, weight = _examples()
    stored = Int8(*to_int8(weight))
    return _multiplies_like_widened(Int8Linear(stored, None, digits=2), stored, x)


def _int4_works() -> bool:
    x, weight = _examples()
    stored = Int4(*to_int4(weight))
    kernel = Int4Linear(stored, None)
    few, many = torch.cat([kernel.multiply(rows) for rows in x.split(5)]), kernel.multiply(x)
    expected = WidenedLinear(stored, None).multiply(x)
    return torch.equal(few, many) and torch.allclose(many, expected, rtol=3e-2, atol=4.0)


def _multiplies_like_widened(kernel: StoredLinear, weight: Int8, x: Tensor) -> bool:
    expected = WidenedLinear(weight, None).multiply(x)
    return torch.allclose(kernel.multiply(x), expected, rtol=1e-3, atol=1e-2)


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights in their stored form; tied ones count once."""
    stored = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    packed = [m for m in model.modules() if isinstance(m, HalfLinear | Int8Linear | OneDnnLinear)]
    return sum(stored.values()) + sum(module.nbytes for module in packed)
