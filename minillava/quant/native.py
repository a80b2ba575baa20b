"""The inner loops of integer layers in C (native.c): compiled once per user, used where possible.

torch has no fast kernel for a few rows times a 4-bit weight, rounding activations to integers
takes it ten passes over them, and its attention of one row reads the cache at half of memory's
rate. native.c has all three, and runs the decoder layers of a new token whole. On CPUs with AVX2
alone it also multiplies many rows, faster than oneDNN and fbgemm, which do so on others. It needs
an x86 CPU with AVX2 and a C compiler: the first process that makes an integer layer compiles it
within a second or two and puts the library in huggingface-hub's folder for the files of other
libraries. Without such a CPU, a compiler or a folder to write to, kernels() is None, and the layers
use torch's operations.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor

from .quantise import GROUP_COLUMNS, ROTATED_COLUMNS, block_size

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
# Contracting a * b + c to one rounding would give other bits than torch's operations.
FLAGS = ("-O3", "-mavx2", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
COMPILER_SECONDS = 60
FEW_ROWS = 16  # of activations; more are multiplied by oneDNN or by multiply_many
LANES = 8  # a rotated block of columns has at least so many
TINY = torch.finfo(torch.float32).tiny

# A weight (N, K) as native.c reads it: codes, step, low and scale of Int4Linear; or those of
# Int8Linear, which has no step and no low.
Stored = tuple[Tensor, Tensor | None, Tensor | None, Tensor]

_DTYPES = {
    "float": (torch.float32,),
    "byte": (torch.int8, torch.uint8),
    "int": (torch.int32,),
    "long": (torch.int64,),
    "bool": (torch.bool,),
}
# The tensors of each function, then how many sizes and how many other numbers follow.
_ARGUMENTS = {
    "to_digits": ("float byte float", 4, 2),
    "scale_sums": ("int float float float", 2, 1),
    "multiply": ("byte float byte byte byte float float", 3, 1),
    "multiply_many": ("byte float byte byte byte float float", 3, 1),
    "widen_int4": ("byte byte byte byte", 1, 0),
    "decode_layers": ("long float float float long bool", 10, 4),
}


class Kernels:
    """The functions of native.c on tensors. They run in as many threads as torch's operations.

    ValueError: a tensor is not what native.c reads, because somebody moved or converted a model.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.functions = {name: getattr(library, name) for name in _ARGUMENTS}
        for name, (tensors, sizes, numbers) in _ARGUMENTS.items():
            self.functions[name].argtypes = (
                *[ctypes.c_void_p] * len(tensors.split()), *[ctypes.c_long] * sizes,
                *[ctypes.c_float] * numbers, ctypes.c_int,
            )  # fmt: skip

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """A copy of a model uses the same functions."""
        return kernels, ()

    def _call(self, name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
        for t, kind in zip(tensors, _ARGUMENTS[name][0].split(), strict=True):
            if t is not None:
                check_readable(t, _DTYPES[kind])
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        if self.functions[name](*pointers, *numbers, torch.get_num_threads()):
            raise MemoryError(f"{name} could not allocate memory for its temporary values")

    def to_digits(self, x: Tensor, digits: int, limit: int) -> tuple[Tensor, Tensor]:
        """Activations (R, K) float32 -> codes (digits R, K) int8 and step (R, 1) float32.

        See integer.to_digits. The rotation adds and subtracts in pairs, log2 of a block's columns
        times, and sums in another order than a product with the Hadamard matrix.
        """
        x, (R, K) = x.contiguous(), x.shape
        codes, step = x.new_empty(digits * R, K, dtype=torch.int8), x.new_empty(R, 1)
        sizes = R, K, block_size(K, ROTATED_COLUMNS), digits
        self._call("to_digits", (x, codes, step), *sizes, limit, TINY)
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

    def multiply(
        self, codes: Tensor, step: Tensor, weight: Stored, limit: int, share: float = 0.0
    ) -> Tensor:
        """Digits (R, K), of two (2 R, K), with step (R, 1) times a weight (N, K) -> (R, N).

        limit: the largest value of a digit. share: see scale_sums.
        Raises ValueError for more than FEW_ROWS of digits of 8 bits, whose products would saturate.
        """
        (R, N), K = (step.shape[0], weight[-1].shape[0]), codes.shape[1]
        y = step.new_empty(R, N)
        many = R > FEW_ROWS
        if many and limit != 63:
            raise ValueError(
                f"{R} rows of digits up to {limit}, but native.c multiplies more than {FEW_ROWS} "
                "only of digits up to 63; use oneDNN (integer.multiply_integers)"
            )
        name = "multiply_many" if many else "multiply"
        self._call(name, (codes, step, *weight, y), R, N, K, share)
        return y

    def decode_layers(
        self,
        layers: Sequence[Tensor],
        held: Sequence[tuple[Tensor, Tensor]],
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        view: tuple[int, Tensor | None, Tensor | None],
        sizes: tuple[int, int, int, int, int],
        digits: tuple[int, int],
        eps: float,
    ) -> Tensor:
        """Decoder layers on a new row per sample x (B, D) -> (B, D), with its key and value cached.

        layers: for each the addresses (30,) int64 of the weights (Stored) of the projections q, k,
        v, o, gate, up and down, and of the weights (D,) of both norms. held: their parts of the
        cache, keys and values (B, Hkv, room, Dh). rope: see Llama.rope. view: end, at and visible
        of sample.CacheView. sizes: M, H, Hkv, Dh and room. digits: how many, and their limit.
        """
        (B, D), (end, at, visible), (count, limit) = x.shape, view, digits
        _, _, Hkv, Dh, room = sizes
        for rows in (rows for both in held for rows in both):
            check_readable(rows, _DTYPES["float"])
            if rows.shape != (B, Hkv, room, Dh) or end > room:
                raise ValueError(
                    f"rows of the cache are {tuple(rows.shape)}, but a token that sees {end} rows "
                    f"needs {(B, Hkv, max(room, end), Dh)}; reserve them in the cache first"
                )
        tensors = [(layer, *rows) for layer, rows in zip(layers, held, strict=True)]
        addresses = [t.data_ptr() for each in tensors for t in each]
        y = x.clone(memory_format=torch.contiguous_format)
        self._call(
            "decode_layers", (torch.tensor(addresses), y, *rope, at, visible),
            len(layers), B, D, *sizes, end, ROTATED_COLUMNS,
            eps, limit, TINY, 0.5 / limit if count == 2 else 0.0,
        )  # fmt: skip
        return y

    def widen_int4(self, codes: Tensor, step: Tensor, low: Tensor, out: Tensor) -> Tensor:
        """Rows of a 4-bit weight as integers: out (n, K) int8."""
        self._call("widen_int4", (codes, step, low, out), codes.numel() // GROUP_COLUMNS)
        return out


def multiplies_many(limit: int) -> bool:
    """Whether native.c is what multiplies many rows of digits fastest. limit: of a digit.

    It has no instructions newer than AVX2, and takes digits of 7 bits.
    """
    return limit == 63 and torch.backends.cpu.get_cpu_capability() == "AVX2" and bool(kernels())


def check_readable(t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError for a tensor that native.c cannot read."""
    if not (t.dtype in dtypes and t.is_cpu and t.is_contiguous()):
        raise ValueError(
            f"an integer layer of a CPU got a tensor of {t.dtype} on {t.device}, but it needs "
            f"{dtypes[0]} on cpu, row by row; do not convert or move a quantised model: load it "
            "with the dtype and the device that it is to have"
        )


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
