"""What this CPU multiplies fast and exactly, found out by asking torch or by trying."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

PACKED_ROWS = 64  # rows of a weight that torch's int4 kernel takes at a time


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


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype with instructions of this CPU."""
    if dtype == torch.bfloat16:
        return multiplies_bfloat16()
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


def fewest_rows() -> int:
    """The number of rows that oneDNN multiplies by a packed weight at least as fast as fewer ones.

    With AVX-512 it reads the bfloat16 weights of a 7B model at 28 GB/s for five rows and at 21 for
    one; with AVX2 one row of float32 is fastest. It was not measured on other CPUs.
    """
    return 5 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1


@functools.cache
def digit_limit() -> int:
    """The largest activation, 127 or 63, whose products with int8 weights oneDNN sums exactly.

    Instructions older than VNNI add two products of 8 bits in 16 bits, which saturate.
    """
    inputs = torch.full((6, 256), 255, dtype=torch.uint8)
    y = multiply_unsigned(inputs, 0, torch.full((64, 256), 127, dtype=torch.int8))
    return 127 if (y == 255 * 127 * 256).all() else 63


def multiply_unsigned(x: Tensor, zero: int, weight: Tensor) -> Tensor:
    """Sums (R, N) float32 of products of x - zero (R, K) and a weight (N, K) int8, by oneDNN.

    x is uint8, and `zero` the number in it that means 0.
    """
    N = len(weight)
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)  # it ignores strides
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero, packed, torch.ones(N), torch.zeros(N, dtype=torch.int64), None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


@functools.cache
def packed_block_rows() -> int:
    """Rows of a block in the layout of torch's int4 kernel: 64 with AVX-512, 32 with AVX2."""
    codes = torch.zeros(PACKED_ROWS, 32, dtype=torch.int32)
    codes[32:] = 1
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return 64 if (packed == 16).all() else 32
