"""Linear layers whose weights are stored in fewer bits than the arithmetic uses.

load() replaces each nn.Linear by one of them; the code of the model does not change. Inputs and
outputs have the model's dtype, float32 on a CPU. "Widened" means that a block of the weight is
converted to that dtype, multiplied, and overwritten by the next block.

    form          on a CPU with torch's fbgemm kernels                        anywhere else
    float16       float16 weights, float32 activations and sums               widened
    bfloat16      widened (see below)                                         widened
    int8          int8 weights, activations as two 7-bit digits, exact sums   widened
    int8-dynamic  int8 weights, activations as one 7-bit digit                widened
    int4          4-bit weights, bfloat16 activations, float32 sums           widened

A CPU that multiplies bfloat16 in hardware (AVX-512 BF16, AMX, Arm's BF16) does so at twice the rate
of float32 or more. There a model in bfloat16 keeps its nn.Linear layers and computes in bfloat16,
as on a GPU: multiplies_bfloat16() says whether this is such a CPU.

A row's result does not depend on the other rows of the input: bit-exact for int8 and int4 with
kernels, up to float32 summation order otherwise. NaN in a row gives NaN in its result.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantise import from_int4, rotate_columns, row_abs_max, to_int4, to_int8, unpack_codes

WIDENED_ROWS = 512  # rows of a weight that are widened at a time
INPUT_ROWS = 1024  # rows of an input that are multiplied at a time
PACKED_GROUPS, PACKED_ROWS = (32, 64, 128, 256), 64  # sizes that the int4 kernel supports
PACKED_COLUMNS = 512  # fbgemm pads the columns of a weight to a multiple of this
MAX_DIGIT = 63  # digits of activations are in -64..63, 7 bits
INT8_ROUNDING = 0.4  # see StoredLinear.rounding


@dataclass(frozen=True)
class Int8:
    """A weight in 8 bits, as made by quantise.to_int8."""

    codes: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32


@dataclass(frozen=True)
class Int4:
    """A weight in 4 bits, as made by quantise.to_int4."""

    codes: Tensor  # (N, K / 2) uint8
    scale: Tensor  # (N, K / G) bfloat16
    low: Tensor  # (N, K / G) bfloat16


Weight = Tensor | Int8 | Int4


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
        kept another set was 0.26 for int8 and 0.46 for int4. The report compares margins with it.
        """
        return 0.7

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the dtype of x."""
        rows = x.flatten(0, -2)  # (R, K)
        if len(rows) <= INPUT_ROWS:
            y = self.multiply(rows) if len(rows) else rows.new_empty(0, self.out_features)
        else:
            y = rows.new_empty(len(rows), self.out_features)
            for at in range(0, len(rows), INPUT_ROWS):
                y[at : at + INPUT_ROWS] = self.multiply(rows[at : at + INPUT_ROWS])
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """x (R, K) with R > 0 -> x W^T (R, N), in new memory."""
        raise NotImplementedError


class WidenedLinear(StoredLinear):
    """Any form of weight; blocks of it are converted to the dtype of the input before use."""

    scale: Tensor
    low: Tensor

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        parts = [weight] if isinstance(weight, Tensor) else list(vars(weight).values())
        N, K = parts[0].shape
        super().__init__(2 * K if isinstance(weight, Int4) else K, N, bias)
        self.form = type(weight)
        self.weight = nn.Parameter(parts[0], requires_grad=False)  # a tied head shares this tensor
        for name, part in zip(("scale", "low"), parts[1:], strict=False):
            self.register_buffer(name, part)
        self.nbytes = sum(part.nbytes for part in parts)

    @property
    def arithmetic(self) -> str:
        names = {Int8: "int8", Int4: "int4"}
        return f"weights widened from {names.get(self.form, str(self.weight.dtype)[6:])}"

    @property
    def rounding(self) -> float:
        if self.form in (Int8, Int4):
            return INT8_ROUNDING if self.form is Int8 else super().rounding
        return 2 * torch.finfo(self.weight.dtype).eps ** 0.5

    def multiply(self, x: Tensor) -> Tensor:
        if self.form is Int8:
            x = rotate_columns(x)
        y = x.new_empty(len(x), self.out_features)
        # A block that stays in a CPU's cache; a GPU converts the whole weight.
        rows = min(WIDENED_ROWS, self.out_features) if x.device.type == "cpu" else self.out_features
        scratch = x.new_empty(rows, self.in_features)
        for at in range(0, self.out_features, rows):
            block = slice(at, min(at + rows, self.out_features))
            wide = scratch[: block.stop - at]  # (rows, K)
            if self.form is Int4:
                wide.copy_(from_int4(self.weight[block], self.scale[block], self.low[block]))
            else:
                wide.copy_(self.weight[block])
            torch.mm(x, wide.T, out=y[:, block])
        return y.mul_(self.scale.to(y.dtype)) if self.form is Int8 else y


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


class Int8Linear(StoredLinear):
    """An int8 weight and integer activations, multiplied by fbgemm.

    Each row of activations is rotated like the weight, divided by a step that makes its largest
    value 63, and rounded: that is its first digit. The remainder times 126 gives a second digit.

    fbgemm quantises its input by itself, with a step from the smallest and the largest value in all
    of it. One extra row that contains -64 and 63 makes that step exactly 1 and the zero point
    exactly 64, whatever the other rows contain.
    """

    range_row: Tensor

    def __init__(self, weight: Int8, bias: Tensor | None, digits: int) -> None:
        N, K = weight.codes.shape
        super().__init__(K, N, bias)
        self.digits = digits
        self.nbytes = _packed_values((N, K)) + weight.scale.nbytes
        with warnings.catch_warnings():  # torch will remove this type one day, see kernel_works()
            warnings.filterwarnings("ignore", ".*quantized tensor creation functions.*")
            integers = torch._make_per_channel_quantized_tensor(
                weight.codes, weight.scale.double(), torch.zeros(N, dtype=torch.long), 0
            )
        self.packed = torch.ops.quantized.linear_prepack(integers, None)
        range_row = torch.zeros(K)
        range_row[0], range_row[-1] = -MAX_DIGIT - 1, MAX_DIGIT
        self.register_buffer("range_row", range_row, persistent=False)

    @property
    def arithmetic(self) -> str:
        return f"int8 weights, activations of {7 * self.digits} bits (fbgemm)"

    @property
    def rounding(self) -> float:
        return INT8_ROUNDING

    def multiply(self, x: Tensor) -> Tensor:
        R, K = x.shape
        digits = x.new_empty(self.digits * R + 1, K)
        first = rotate_columns(x, out=digits[:R])
        step = row_abs_max(first).div_(MAX_DIGIT)  # (R, 1); NaN or inf if the row has one
        step.clamp_min_(torch.finfo(x.dtype).tiny)
        first.div_(step).nan_to_num_(0.0, 0.0, 0.0)
        if self.digits == 2:
            second = digits[R:-1].copy_(first)
            second.sub_(first.round_()).mul_(2 * MAX_DIGIT)
        digits[-1] = self.range_row
        y = torch.ops.quantized.linear_dynamic(digits, self.packed, True)  # (digits * R + 1, N)
        if self.digits == 2:
            y[:R].add_(y[R:-1], alpha=1 / (2 * MAX_DIGIT))
        return y[:R].mul_(step)


class Int4Linear(StoredLinear):
    """A 4-bit weight and bfloat16 activations, multiplied by torch's kernel for CPUs."""

    packed: Tensor
    pairs: Tensor

    def __init__(self, weight: Int4, bias: Tensor | None) -> None:
        N, G = len(weight.codes), 2 * weight.codes.shape[1] // weight.scale.shape[1]
        super().__init__(2 * weight.codes.shape[1], N, bias)
        self.group = G
        padding = -N % PACKED_ROWS
        zero = (weight.low.float() + 8 * weight.scale.float()).bfloat16()  # the value of code 8
        pairs = torch.stack((weight.scale, zero), -1).transpose(0, 1)  # (K / G, N, 2)
        pairs = F.pad(pairs, (0, 0, 0, padding)).contiguous()  # (K / G, N + padding, 2)
        self.register_buffer("pairs", pairs, persistent=False)
        packed = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                F.pad(unpack_codes(part), (0, 0, 0, -len(part) % PACKED_ROWS)).int(), 1
            )
            for part in weight.codes.split(WIDENED_ROWS)
        ]
        self.register_buffer("packed", torch.cat(packed), persistent=False)
        self.nbytes = self.packed.nbytes + self.pairs.nbytes

    @property
    def arithmetic(self) -> str:
        return "int4 weights, bfloat16 activations (torch)"

    def multiply(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self.packed, self.group, self.pairs
        )
        return y[:, : self.out_features].to(x.dtype)


def choose_linear(weight: Weight, bias: Tensor | None, digits: int = 2) -> StoredLinear:
    """Make the layer that the table at the top of this file lists for a weight on its device.

    digits: how many 7-bit digits activations get if they become integers (1 for int8-dynamic).
    """
    if isinstance(weight, Int8):
        if weight.codes.device.type == "cpu" and kernel_works("int8"):
            return Int8Linear(weight, bias, digits)
    elif isinstance(weight, Int4):
        K, groups = 2 * weight.codes.shape[1], weight.scale.shape[1]
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
def kernel_works(kind: str) -> bool:
    """Whether this torch on this CPU has the kernel for a form, and it computes correctly."""
    try:
        return {"float16": _half_works, "int8": _int8_works, "int4": _int4_works}[kind]()
    except (RuntimeError, AttributeError):  # raised by torch for a missing kernel
        return False


def _examples() -> tuple[Tensor, Tensor]:
    """Inputs (5, 64) and a weight (70, 64) of small integers."""
    return (torch.arange(320) % 13 - 6.0).view(5, 64), (torch.arange(4480) % 11 - 5.0).view(70, 64)


def _half_works() -> bool:
    x, weight = _examples()
    weight = weight * 2.0**-20  # below the normal range of float16
    return torch.equal(HalfLinear(weight, None).multiply(x), x @ weight.T)


def _int8_works() -> bool:
    x, weight = _examples()
    kernel = Int8Linear(Int8(*to_int8(weight)), None, digits=2)
    wide = WidenedLinear(Int8(*to_int8(weight)), None).multiply(x)
    return torch.allclose(kernel.multiply(x), wide, rtol=1e-3, atol=1e-2)


def _int4_works() -> bool:
    x, weight = _examples()
    kernel, wide = (kind(Int4(*to_int4(weight)), None) for kind in (Int4Linear, WidenedLinear))
    return torch.allclose(kernel.multiply(x), wide.multiply(x), rtol=2e-2, atol=2.0)


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights in their stored form; tied ones count once."""
    stored = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    packed = [m for m in model.modules() if isinstance(m, HalfLinear | Int8Linear)]
    return sum(stored.values()) + sum(module.nbytes for module in packed)
