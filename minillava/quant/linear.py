"""Linear layers whose weights are stored in fewer bits than the arithmetic uses.

load() replaces each nn.Linear by one of them; the code of the model does not change. Inputs and
outputs have the model's dtype. "Widened" means that a block of the weight is converted to that
dtype, multiplied, and overwritten by the next block.

    form          on a CPU                                                    anywhere else
    float32       float32 weights and activations                             nn.Linear
    float16       float16 weights, float32 activations and sums               widened
    bfloat16      bfloat16 weights and activations, or widened (see below)    nn.Linear
    int8          int8 weights, activations as two digits, exact sums         widened
    int8-dynamic  int8 weights, activations as one digit, exact sums          widened
    int4          4-bit codes of int8 weights, one digit, exact sums          widened
    nf4, fp4      widened: the 4-bit weights of bitsandbytes (nf4.py)         widened
    LLM.int8      widened: the 8-bit weights of bitsandbytes                  widened

stored.py has the layers that widen or multiply floats, integer.py those with integer activations.
Where a C compiler is installed, native.c does part of their work; without it torch's kernels do.

A digit is an integer of 8 bits where the CPU multiplies them exactly (AVX-512 VNNI, AMX), of 7 bits
on other CPUs, whose instructions for 8 bits saturate: digit_limit() finds out by trying. oneDNN
multiplies 8 bits. 7 bits are multiplied by native.c with AVX2, and otherwise by fbgemm.

A CPU that multiplies bfloat16 in hardware (AVX-512 BF16, AMX, Arm's BF16) does so at twice the rate
of float32 or more. There a model in bfloat16 computes in bfloat16, as on a GPU; on other CPUs its
weights are widened. multiplies_bfloat16() says whether this is such a CPU.

A row's result does not depend on the other rows of the input: bit-exact in float32 for the forms
with exact sums, up to summation order otherwise. NaN in a row gives NaN in its result.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from . import native
from .cpu import digit_limit
from .integer import FbgemmLinear, Int4Linear, Int8Linear, PackedInt4Linear
from .nf4 import Nf4
from .quantise import to_int4, to_int8
from .stored import (
    HalfLinear,
    Int4,
    Int8,
    Nf4Linear,
    PackedLinear,
    RowInt8,
    StoredLinear,
    Weight,
    WidenedLinear,
)

PACKED_GROUPS = (32, 64, 128, 256)  # columns of a group that torch's int4 kernel supports


def choose_linear(
    weight: Weight,
    bias: Tensor | None,
    digits: int = 2,
    arithmetic: torch.dtype = torch.float32,
) -> StoredLinear:
    """Make the layer that the table at the top of this file lists for a weight on its device.

    digits: how many digits activations get if they become integers (1 for int8-dynamic).
    arithmetic: dtype of the inputs.
    """
    if isinstance(weight, Nf4):
        return Nf4Linear(weight, bias)
    if isinstance(weight, RowInt8):
        return WidenedLinear(weight, bias)
    if isinstance(weight, Int8):
        on_cpu = weight.codes.device.type == "cpu"
        if on_cpu and (kernel_works("onednn") or kernel_works("many")):
            return Int8Linear(weight, bias, digits)
        if on_cpu and kernel_works("fbgemm"):
            return FbgemmLinear(weight, bias, digits)
    elif isinstance(weight, Int4):
        on_cpu = weight.codes.device.type == "cpu"
        K, groups = 2 * weight.codes.shape[1], weight.step.shape[1]
        if on_cpu and Int4Linear.takes(weight) and kernel_works("native"):
            return Int4Linear(weight, bias)
        if on_cpu and K // groups in PACKED_GROUPS and kernel_works("int4"):
            return PackedInt4Linear(weight, bias)
    elif weight.dtype == arithmetic and can_pack(weight.dtype):
        return PackedLinear(weight, bias)
    elif weight.dtype == torch.float16 and kernel_works("float16") and _is_finite(weight):
        return HalfLinear(weight, bias)
    return WidenedLinear(weight, bias)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype on a CPU can be multiplied by PackedLinear."""
    name = str(dtype).removeprefix("torch.")
    return name in ("float32", "bfloat16") and kernel_works(name)


def _is_finite(weight: Tensor) -> bool:
    """For float16: finite values have a finite float32 sum. fbgemm turns infinity into 65504."""
    return bool(weight.sum(dtype=torch.float32).isfinite())


@functools.cache
def kernel_works(kind: str) -> bool:
    """Whether this torch on this CPU has the kernel for a form, and it computes correctly.

    "float16" and "fbgemm" (int8) are fbgemm's, "int4" is torch's. "float32" and "bfloat16" are
    oneDNN's, the latter where the CPU multiplies it, "onednn" is int8 by oneDNN where its products
    of 8 bits are exact. "native" is int4 by native.c, "many" is int8 by it.
    """
    works = {
        "float32": _float32_works, "float16": _half_works, "bfloat16": _bfloat16_works,
        "onednn": _onednn_works, "fbgemm": _fbgemm_works, "int4": _packed_int4_works,
        "native": _native_works, "many": _many_works,
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


def _float32_works() -> bool:
    return _packed_works(torch.float32)


def _bfloat16_works() -> bool:
    return _packed_works(torch.bfloat16)


def _packed_works(dtype: torch.dtype) -> bool:
    x, weight = (t.to(dtype) for t in _examples())
    layer, expected = PackedLinear(weight, None), x @ weight.T
    few_and_many = _multiply_few_and_many(layer, x, few=1)
    return layer.packed.is_mkldnn and all(torch.equal(y, expected) for y in few_and_many)


def _onednn_works() -> bool:
    return digit_limit() == 127 and _int8_works(Int8Linear)


def _many_works() -> bool:
    return native.multiplies_many(digit_limit()) and _int8_works(Int8Linear)


def _fbgemm_works() -> bool:
    return _int8_works(FbgemmLinear)


def _int8_works(layer: type[Int8Linear | FbgemmLinear]) -> bool:
    x, weight = _examples()
    stored = Int8(*to_int8(weight))
    few_and_many = _multiply_few_and_many(layer(stored, None, digits=2), x)
    expected = WidenedLinear(stored, None).multiply(x)
    return all(torch.allclose(y, expected, rtol=1e-3, atol=1e-2) for y in few_and_many)


def _packed_int4_works() -> bool:
    return _int4_works(PackedInt4Linear)


def _native_works() -> bool:
    return native.kernels() is not None and _int4_works(Int4Linear)


def _int4_works(layer: type[Int4Linear | PackedInt4Linear]) -> bool:
    x, weight = _examples()
    stored = Int4(*to_int4(weight))
    few, many = _multiply_few_and_many(layer(stored, None), x)
    expected = WidenedLinear(stored, None).multiply(x)
    return torch.equal(few, many) and torch.allclose(many, expected, rtol=3e-2, atol=4.0)


def _multiply_few_and_many(layer: StoredLinear, x: Tensor, few: int = 5) -> tuple[Tensor, Tensor]:
    """The product with some rows at a time, and with all at once, which another kernel may take."""
    return torch.cat([layer(rows) for rows in x.split(few)]), layer(x)


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights in their stored form; tied ones count once."""
    stored = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    kinds = (HalfLinear, PackedLinear, FbgemmLinear)
    packed = [m for m in model.modules() if isinstance(m, kinds)]
    return sum(stored.values()) + sum(module.nbytes for module in packed)
