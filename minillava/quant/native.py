"""The inner loops of integer layers in C (native.c): compiled once per user, used where possible.

torch has no fast kernel for a few rows times a 4-bit weight, rounding activations to integers
takes it ten passes over them, and its attention of one row reads the cache at half of memory's
rate. native.c has all three. It needs an x86 CPU with AVX2 and a C compiler:
the first process that makes an integer layer compiles it within a second or two and puts the
library in huggingface-hub's folder for the files of other libraries. Without such a CPU, a compiler
or a folder to write to, kernels() is None, and the layers use torch's operations.

All tensors are contiguous, on the CPU, and row by row. R: rows of activations, K: their columns,
N: rows of the weight.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor

from .quantise import GROUP_COLUMNS, ROTATED_COLUMNS, block_size

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
# Contracting a * b + c to one rounding would give other bits than torch's operations.
FLAGS = ("-O3", "-mavx2", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
COMPILER_SECONDS = 60
FEW_ROWS = 16  # of activations; for more, oneDNN is faster
LANES = 8  # a rotated block of columns has at least so many
TINY = torch.finfo(torch.float32).tiny

_tensor, _size, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "to_digits": (*[_tensor] * 4, *[_size] * 5, *[_float] * 3),
    "scale_sums": (*[_tensor] * 4, *[_size] * 2, _float),
    "multiply_int8": (*[_tensor] * 5, *[_size] * 3, _float),
    "multiply_int4": (*[_tensor] * 7, *[_size] * 3),
    "widen_int4": (*[_tensor] * 4, _size),
    "attend_token": (*[_tensor] * 10, *[_size] * 6),
}  # fmt: skip


class Kernels:
    """The functions of native.c on tensors. They run in as many threads as torch's operations."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.functions = {name: getattr(library, name) for name in _ARGUMENTS}
        for name, arguments in _ARGUMENTS.items():
            self.functions[name].argtypes = (*arguments, ctypes.c_int)

    def _call(self, name: str, tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        if self.functions[name](*pointers, *numbers, torch.get_num_threads()):
            raise MemoryError(f"{name} could not allocate memory for its temporary values")

    def to_digits(self, x: Tensor, digits: int, limit: int) -> tuple[Tensor, Tensor]:
        """Activations (R, K) float32 -> codes (digits R, K) int8 and step (R, 1) float32.

        See integer.to_digits. The rotation adds and subtracts in pairs, log2 of a block's columns
        times, and sums in another order than a product with the Hadamard matrix.
        """
        return self._digits(x, None, digits, limit)

    def normalised_to_digits(
        self, x: Tensor, weight: Tensor, eps: float, digits: int, limit: int
    ) -> tuple[Tensor, Tensor]:
        """The same of RMSNorm of rows x (R, K), with weight (K,) float32."""
        return self._digits(x, weight, digits, limit, eps=eps)

    def gated_to_digits(
        self, gate: Tensor, x: Tensor, digits: int, limit: int
    ) -> tuple[Tensor, Tensor]:
        """The same of silu(gate) * x, both (R, K)."""
        return self._digits(gate, x, digits, limit, gated=True)

    def _digits(
        self,
        x: Tensor,
        other: Tensor | None,
        digits: int,
        limit: int,
        gated: bool = False,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        x, (R, K) = x.contiguous(), x.shape
        codes, step = x.new_empty(digits * R, K, dtype=torch.int8), x.new_empty(R, 1)
        sizes = R, K, block_size(K, ROTATED_COLUMNS), digits, gated
        self._call("to_digits", (x, other, codes, step), *sizes, eps, limit, TINY)
        return codes, step

    def scale_sums(self, sums: Tensor, scale: Tensor, step: Tensor, share: float) -> Tensor:
        """Sums (R, N) int32, of two digits (2 R, N), -> results (R, N) float32, in their memory.

        scale (N,), step (R, 1). share: what the sum of the second digit is multiplied by before
        it is added to that of the first; 0: there is one digit.
        """
        R, N = step.shape[0], sums.shape[1]
        y = sums.view(torch.float32)[:R]
        self._call("scale_sums", (sums, y, scale, step), R, N, share)
        return y

    def multiply_int8(
        self, codes: Tensor, weight: Tensor, scale: Tensor, step: Tensor, share: float
    ) -> Tensor:
        """Digits (R, K), of two (2 R, K), times a weight (N, K) int8 -> (R, N), as scale_sums."""
        (N, K), R = weight.shape, step.shape[0]
        y = step.new_empty(R, N)
        self._call("multiply_int8", (codes, weight, scale, step, y), R, N, K, share)
        return y

    def multiply_int4(
        self, digits: Tensor, codes: Tensor, steps: Tensor, low: Tensor, scale: Tensor, step: Tensor
    ) -> Tensor:
        """Digits (R, K) with step (R, 1) times a 4-bit weight (N, K) -> (R, N) float32.

        The weight as integer.Int4Linear holds it: codes (N, K / 2), steps and low (N, K / 32).
        """
        (R, K), N = digits.shape, scale.shape[0]
        y = step.new_empty(R, N)
        self._call("multiply_int4", (digits, codes, steps, low, scale, step, y), R, N, K)
        return y

    def attend_token(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor],
        end: int,
        at: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """Attention of one new row per sample (B, H * Dh), whose key and value it caches.

        qkv: q (B, H, Dh), k and v (B, Hkv, Dh), float32, not yet rotated. rope: see Llama.rope.
        held: keys and values of the cache (B, Hkv, room, Dh). end, at (B,) and visible
        (B, 1, 1, end): see sample.CacheView.
        """
        (B, H, Dh), (keys, values) = qkv[0].shape, held
        y = qkv[0].new_empty(B, H * Dh)
        tensors = (*qkv, *rope, keys, values, at, visible, y)
        self._call("attend_token", tensors, B, H, keys.shape[1], keys.shape[2], end, Dh)
        return y

    def widen_int4(self, codes: Tensor, step: Tensor, low: Tensor, out: Tensor) -> Tensor:
        """Rows of a 4-bit weight as integers: out (n, K) int8."""
        self._call("widen_int4", (codes, step, low, out), codes.numel() // GROUP_COLUMNS)
        return out


@functools.cache
def kernels() -> Kernels | None:
    """The compiled functions, or None where they cannot be had."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    try:
        return Kernels(ctypes.CDLL(str(compile_library())))
    except (OSError, subprocess.SubprocessError):
        return None


def compile_library() -> Path:
    """The compiled native.c of this user, made if it is not there yet.

    Raises OSError without a compiler or a folder, SubprocessError if compiling fails.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C compiler is installed: none of {', '.join(COMPILERS)}")
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *FLAGS)).encode()).hexdigest()
    folder = cached_assets_path("minillava", namespace="native", subfolder=key[:16])
    library = folder / "native.so"
    if not library.exists():
        # Written under another name first: other processes never see half a library.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "native.so"
            command = (compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm")
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILER_SECONDS)
            os.replace(made, library)
    return library
