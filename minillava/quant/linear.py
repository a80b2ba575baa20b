"""Linear layers whose weights are stored smaller than they are computed with.

load() chooses one for each nn.Linear and puts it in its place; the model's own code knows nothing
of it. Activations go in and come out in the model's dtype, float32 on a CPU.

                 a CPU with torch's fbgemm kernels                       anywhere else
    float16      fp16 weights, float32 activations and sums              widened piece by piece
    bfloat16     widened piece by piece                                  the same
    int8         int8 weights, activations as two 7-bit digits,          widened piece by piece
                 exact integer sums
    int8-dynamic int8 weights, activations as one 7-bit digit            widened piece by piece
    int4         4-bit weights, bfloat16 activations, float32 sums       widened piece by piece

Every row of the result depends on its own row alone, and NaN gives NaN. Integer activations and
int4 give a row the same bits in any company; the others differ by float32's rounding, as its own
product does where a library takes few rows in another order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantise import codes_of, from_int4, largest, rotated, to_int4, to_int8

WIDENED = 512  # output rows that are widened at one time
AT_ONCE = 1024  # input rows that are multiplied at one time
PACKED_GROUPS, PACKED_ROWS = (32, 64, 128, 256), 64  # what the int4 kernel can read
PACKED_COLUMNS = 512  # fbgemm packs so many together, and fills the last ones up
DIGIT = 63  # the largest level of an activation; with -64 below it, 7 bits


@dataclass(frozen=True)
class Int8:
    """A weight in 8 bits: see quantise.to_int8."""

    codes: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32


@dataclass(frozen=True)
class Int4:
    """A weight in 4 bits: see quantise.to_int4."""

    codes: Tensor  # (N, K / 2) uint8
    scale: Tensor  # (N, K / G) bfloat16
    low: Tensor  # (N, K / G) bfloat16


Weight = Tensor | Int8 | Int4


class StoredLinear(nn.Module):
    """y = x W^T + bias, where W is held in a form of its own."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.nbytes = 0  # of the weight as it is held

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in the dtype of x."""
        rows = x.flatten(0, -2)  # (R, K)
        if len(rows) <= AT_ONCE:
            y = self.product(rows) if len(rows) else rows.new_empty(0, self.out_features)
        else:
            y = rows.new_empty(len(rows), self.out_features)
            for at in range(0, len(rows), AT_ONCE):
                y[at : at + AT_ONCE] = self.product(rows[at : at + AT_ONCE])
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """(R, K), R > 0, -> (R, N), in memory of its own."""
        raise NotImplementedError


class WidenedLinear(StoredLinear):
    """Any form of weight, widened piece by piece to the dtype of the input before it is used."""

    scale: Tensor
    low: Tensor

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        parts = [weight] if isinstance(weight, Tensor) else list(vars(weight).values())
        N, K = parts[0].shape
        super().__init__(2 * K if isinstance(weight, Int4) else K, N, bias)
        self.form = type(weight)
        self.weight = nn.Parameter(parts[0], requires_grad=False)  # a tied head shares it
        for name, part in zip(("scale", "low"), parts[1:], strict=False):
            self.register_buffer(name, part)
        self.nbytes = sum(part.nbytes for part in parts)

    def product(self, x: Tensor) -> Tensor:
        if self.form is Int8:
            x = rotated(x)
        y = x.new_empty(len(x), self.out_features)
        # a piece that stays in a CPU's cache; a GPU takes all at once
        rows = min(WIDENED, self.out_features) if x.device.type == "cpu" else self.out_features
        scratch = x.new_empty(rows, self.in_features)
        for at in range(0, self.out_features, rows):
            piece = slice(at, min(at + rows, self.out_features))
            wide = scratch[: piece.stop - at]
            if self.form is Int4:
                wide.copy_(from_int4(self.weight[piece], self.scale[piece], self.low[piece]))
            else:
                wide.copy_(self.weight[piece])
            torch.mm(x, wide.T, out=y[:, piece])
        return y.mul_(self.scale.to(y.dtype)) if self.form is Int8 else y


class HalfLinear(StoredLinear):
    """A float16 weight for float32 activations, by fbgemm."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        self.nbytes = 2 * _packed_values(weight.shape)

    @property
    def weight(self) -> Tensor:
        """(N, K) float16, a copy."""
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0].half()

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(StoredLinear):
    """An int8 weight, activations as integers too, by fbgemm.

    A row of activations is turned as the weight was, divided by a step that makes its largest
    value 63, and rounded: its first digit. What rounding left, times 126, gives a second digit.
    fbgemm chooses its own step from the least and the greatest value of all its input; a last row
    with -64 and 63 makes that step exactly 1 and its zero exactly 64, whatever the other rows hold.
    """

    ends: Tensor

    def __init__(self, weight: Int8, bias: Tensor | None, digits: int) -> None:
        N, K = weight.codes.shape
        super().__init__(K, N, bias)
        self.digits = digits
        self.nbytes = _packed_values((N, K)) + weight.scale.nbytes
        with warnings.catch_warnings():  # torch will remove this type one day: see packs()
            warnings.filterwarnings("ignore", ".*quantized tensor creation functions.*")
            integers = torch._make_per_channel_quantized_tensor(
                weight.codes, weight.scale.double(), torch.zeros(N, dtype=torch.long), 0
            )
        self.packed = torch.ops.quantized.linear_prepack(integers, None)
        ends = torch.zeros(K)
        ends[0], ends[-1] = -DIGIT - 1, DIGIT
        self.register_buffer("ends", ends, persistent=False)

    def product(self, x: Tensor) -> Tensor:
        R, K = x.shape
        levels = x.new_empty(self.digits * R + 1, K)
        first = rotated(x, out=levels[:R])
        step = largest(first).div_(DIGIT)  # (R, 1); NaN or inf if the row has one
        step.clamp_min_(torch.finfo(x.dtype).tiny)
        first.div_(step).nan_to_num_(0.0, 0.0, 0.0)
        if self.digits == 2:
            second = levels[R:-1].copy_(first)
            second.sub_(first.round_()).mul_(2 * DIGIT)
        levels[-1] = self.ends
        y = torch.ops.quantized.linear_dynamic(levels, self.packed, True)  # (digits * R + 1, N)
        if self.digits == 2:
            y[:R].add_(y[R:-1], alpha=1 / (2 * DIGIT))
        return y[:R].mul_(step)


class Int4Linear(StoredLinear):
    """A 4-bit weight, by the kernel that torch has for CPUs."""

    packed: Tensor
    pairs: Tensor

    def __init__(self, weight: Int4, bias: Tensor | None) -> None:
        N, G = len(weight.codes), 2 * weight.codes.shape[1] // weight.scale.shape[1]
        super().__init__(2 * weight.codes.shape[1], N, bias)
        self.group = G
        more = -N % PACKED_ROWS
        zero = (weight.low.float() + 8 * weight.scale.float()).bfloat16()  # the value of code 8
        pairs = torch.stack((weight.scale, zero), -1).transpose(0, 1)  # (K / G, N, 2)
        self.register_buffer("pairs", F.pad(pairs, (0, 0, 0, more)).contiguous(), persistent=False)
        packed = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                F.pad(codes_of(piece), (0, 0, 0, -len(piece) % PACKED_ROWS)).int(), 1
            )
            for piece in weight.codes.split(WIDENED)
        ]
        self.register_buffer("packed", torch.cat(packed), persistent=False)
        self.nbytes = self.packed.nbytes + self.pairs.nbytes

    def product(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self.packed, self.group, self.pairs
        )
        return y[:, : self.out_features].to(x.dtype)


def stored_linear(weight: Weight, bias: Tensor | None, digits: int = 2) -> StoredLinear:
    """The fastest layer for this weight on its device that is as accurate as the table says.

    digits: of activations, where they become integers (1 for int8-dynamic).
    """
    if isinstance(weight, Int8):
        if weight.codes.device.type == "cpu" and packs("int8"):
            return Int8Linear(weight, bias, digits)
    elif isinstance(weight, Int4):
        K, groups = 2 * weight.codes.shape[1], weight.scale.shape[1]
        if weight.codes.device.type == "cpu" and K // groups in PACKED_GROUPS and packs("int4"):
            return Int4Linear(weight, bias)
    elif weight.dtype == torch.float16 and packs("float16") and _is_finite(weight):
        return HalfLinear(weight, bias)
    return WidenedLinear(weight, bias)


def _packed_values(shape: Sequence[int]) -> int:
    """How many values fbgemm holds of a weight (N, K)."""
    N, K = shape
    return N * (K + -K % PACKED_COLUMNS)


def _is_finite(weight: Tensor) -> bool:
    """Of float16, whose finite values have a finite sum; fbgemm makes infinity 65504."""
    return bool(weight.sum(dtype=torch.float32).isfinite())


@functools.cache
def packs(kind: str) -> bool:
    """Does this torch on this CPU have the kernel, and does it compute what is expected of it?"""
    try:
        return {"float16": _half_works, "int8": _int8_works, "int4": _int4_works}[kind]()
    except (RuntimeError, AttributeError):  # what torch raises for a kernel that it has not
        return False


def _examples() -> tuple[Tensor, Tensor]:
    """Inputs (5, 64) and weights (70, 64): small multiples of a power of two."""
    return (torch.arange(320) % 13 - 6.0).view(5, 64), (torch.arange(4480) % 11 - 5.0).view(70, 64)


def _half_works() -> bool:
    x, weight = _examples()
    weight = weight * 2.0**-20  # below the normal numbers of float16
    return torch.equal(HalfLinear(weight, None).product(x), x @ weight.T)


def _int8_works() -> bool:
    x, weight = _examples()
    made = Int8Linear(Int8(*to_int8(weight)), None, digits=2)
    wide = WidenedLinear(Int8(*to_int8(weight)), None).product(x)
    return torch.allclose(made.product(x), wide, rtol=1e-3, atol=1e-2)


def _int4_works() -> bool:
    x, weight = _examples()
    made, wide = (kind(Int4(*to_int4(weight)), None) for kind in (Int4Linear, WidenedLinear))
    return torch.allclose(made.product(x), wide.product(x), rtol=2e-2, atol=2.0)


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights as they are held, tied ones once."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    packed = [m for m in model.modules() if isinstance(m, HalfLinear | Int8Linear)]
    return sum(held.values()) + sum(module.nbytes for module in packed)
