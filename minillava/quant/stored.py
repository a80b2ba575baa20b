"""Layers for weights that are stored in fewer bits than the arithmetic uses, and the simple ones.

A StoredLinear takes the place of an nn.Linear. "Widened" means that a block of the weight is
converted to the dtype of the input, multiplied, and overwritten by the next block. Layers with
integer activations are in integer.py; linear.py chooses between all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import fewest_rows, multiplies
from .nf4 import Nested, Nf4, from_nf4, level_pairs
from .quantise import rotate_columns, widen_codes

WIDENED_ROWS = 512  # rows of a weight that are widened at a time
INPUT_ROWS = 1024  # rows of an input that are multiplied at a time
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

        Measured on a demo of 64 tokens: the largest share at which one of 17 methods, on one of 40
        scenes, kept another set was 0.26 for int8, with digits of 7 bits, and 0.46 for int4 with
        groups of 64 columns, where groups have 32 now. The report compares margins with it.
        """
        return INT4_ROUNDING

    def prepare(self, x: Tensor) -> Tensor | Digits:
        """What several layers of one form that are given the same x can share: here x itself."""
        return x

    def forward(self, x: Tensor | Digits) -> Tensor:
        """x (..., K), or what prepare() made of it -> (..., N) in the dtype of x.

        Raises ValueError for another number of columns.
        """
        self.check_columns(x)
        if isinstance(x, Digits):
            y = self.multiply_digits(x)
        else:
            y = self._multiply_in_parts(x.flatten(0, -2))
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def check_columns(self, x: Tensor | Digits) -> None:
        """Raise ValueError for x that is not (..., K): the kernels do not look."""
        if not x.shape or x.shape[-1] != self.in_features:
            raise ValueError(
                f"a linear layer of {self.in_features} columns got an input {tuple(x.shape)}; its "
                f"last dimension must be {self.in_features}"
            )

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
        self.nbytes = 2 * packed_values(weight.shape)

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


class PackedLinear(StoredLinear):
    """A float32 or bfloat16 weight, multiplied by oneDNN with activations of the same dtype.

    The weight (N, K) is held in the order in which oneDNN reads it. nn.Linear computes the same
    from the usual order. In bfloat16 it has oneDNN reorder the whole weight for every product: with
    the weights of a 7B model that adds three quarters to the product of one row, and a fifteenth to
    that of 620. In float32 it has MKL multiply, which is as fast for many rows or slower, depending
    on the CPU, and up to four times as slow for two to eight.
    Where a CPU does not multiply the weight in its dtype, because it was moved, converted or
    unpickled, this is an nn.Linear.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.hold(weight)

    def hold(self, weight: Tensor) -> None:
        """Take a weight (N, K) in the usual order."""
        self.packed, self.nbytes = weight, weight.nbytes
        if weight.device.type == "cpu" and multiplies(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            self.nbytes = torch.ops.mkldnn._nbytes(self.packed)  # with oneDNN's padding

    @property
    def arithmetic(self) -> str:
        return str(self.packed.dtype).removeprefix("torch.")

    @property
    def rounding(self) -> float:
        return 2 * torch.finfo(self.packed.dtype).eps ** 0.5

    @property
    def weight(self) -> Tensor:
        """A copy (N, K) in the usual order."""
        return self.packed.to_dense() if self.packed.is_mkldnn else self.packed

    def forward(self, x: Tensor | Digits) -> Tensor:
        assert isinstance(x, Tensor), "prepare() of this layer makes no digits"
        self.check_columns(x)
        if x.dtype != self.packed.dtype:
            raise ValueError(
                f"a linear layer in {self.packed.dtype} got an input in {x.dtype}; convert one of "
                "them with to()"
            )
        if not self.packed.is_mkldnn or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)  # oneDNN's product has no gradient
        few = x.shape[0] if x.ndim == 2 and 0 < x.shape[0] < fewest_rows() else None
        if few:
            x = F.pad(x, (0, 0, 0, fewest_rows() - few))
        # the bias is added before the sum is rounded, as nn.Linear does
        y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y[:few]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """For to(), cuda() and their like: the weight on another device or in another dtype."""
        self.hold(fn(self.weight))
        nn.Module._apply(self, fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle, which cannot read a packed weight."""
        return {**self.__dict__, "packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.hold(state["packed"])


def packed_values(shape: Sequence[int]) -> int:
    """The number of values that fbgemm stores for a weight (N, K), with its padding."""
    N, K = shape
    return N * (K + -K % PACKED_COLUMNS)
