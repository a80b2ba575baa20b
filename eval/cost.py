"""The costs of a run: FLOPs by the papers' formulas and exactly, bytes, times and memory.

FastV's and SparseVLM's formulas count a multiply-add as one operation and cover the decoder's
layers only. `decoder_flops` and `vision_flops` count every multiplication and every addition of the
matrix products and of attention, as torch's FlopCounterMode does: attention counts as dense, with
no discount for the causal mask.
"""

from __future__ import annotations

import copy
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillava.config import Config, TextConfig
from minillava.llava import LLaVA
from minillava.loading import memory
from minillava.pruning.base import Method, Plan

RESET = Path("/proc/self/clear_refs")

# ---------------------------------------------------------------- formulas


def fastv_flops(n: int, config: TextConfig) -> int:
    """FLOPs of a layer with n rows by FastV (arXiv 2403.06764, eq. 5): 4 n d^2 + 2 n^2 d + 2 n d m.

    The formula counts two of Llama's three MLP matrices.
    """
    d, m = config.hidden_size, config.intermediate_size
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def sparsevlm_flops(n: int, config: TextConfig) -> int:
    """FLOPs of a layer by SparseVLM (arXiv 2410.04417): as FastV's, with all three MLP matrices."""
    return fastv_flops(n, config) + n * config.hidden_size * config.intermediate_size


def fastv_share(entering: Sequence[int], unpruned: int, config: TextConfig) -> float:
    """The share of FLOPs, by FastV's formula, relative to the unpruned prompt.

    entering: rows that enter each layer; unpruned: rows of the unpruned prompt.
    """
    full = fastv_flops(unpruned, config) * len(entering)
    return sum(fastv_flops(n, config) for n in entering) / full


def decoder_flops(entering: Sequence[int], config: TextConfig) -> int:
    """Exact FLOPs of a prefill of one sample, with the logits of its last row.

    entering: rows that enter each layer.
    """
    d, m, dh = config.hidden_size, config.intermediate_size, config.head_dim
    H, Hkv = config.num_attention_heads, config.num_key_value_heads
    row = 2 * d * dh * (2 * H + 2 * Hkv) + 6 * d * m  # q and o, k and v, gate, up and down
    layers = sum(n * row + 4 * n * n * H * dh for n in entering)
    return layers + 2 * d * config.vocab_size


def vision_flops(config: Config, blocks: int) -> int:
    """Exact FLOPs of one image: patch embedding, `blocks` blocks of the tower, and projector."""
    v, N, D = config.vision, config.vision.num_patches, config.text.hidden_size
    C, M, T = v.hidden_size, v.intermediate_size, N + 1
    patches = 2 * N * C * 3 * v.patch_size**2
    block = 8 * T * C * C + 4 * T * C * M + 4 * T * T * C
    return patches + blocks * block + 2 * N * D * (C + D)


def cache_bytes(entering: Sequence[int], config: TextConfig, itemsize: int = 4) -> int:
    """Bytes of the keys and values. entering: rows that each layer holds."""
    return sum(entering) * 2 * config.num_key_value_heads * config.head_dim * itemsize


def activation_bytes(entering: Sequence[int], config: Config, plan: Plan, itemsize: int = 4) -> int:
    """The peak of the activations' bytes in a prefill of one sample with one image.

    Weights, the KV cache and the temporary memory of integer layers are not in it. The peak is in
    the MLP of a block. In the decoder it consists of the rows before the block, after its attention
    and normalised; gate and up; cosine and sine of their positions; and the tower's states. If the
    plan asks a layer, also of its queries and keys, and all rows as they entered the decoder. In
    the tower it consists of the patches; the rows as in the decoder; one matrix, its sigmoid and
    their product.
    """
    t, v = config.text, config.vision
    N, D, C = v.num_patches, t.hidden_size, v.hidden_size
    heads = (t.num_attention_heads + t.num_key_value_heads) * t.head_dim
    asked = any(step.stage == "decoder" for step in plan.steps)
    row = 3 * D + asked * (heads + D) + 2 * (t.intermediate_size + t.head_dim)
    decoder = max(entering) * row + (N + 1) * C
    tower = (N + 1) * (3 * C + 3 * v.intermediate_size) + N * C
    return max(decoder, tower) * itemsize


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Spread:
    """The median and quartiles of several measurements of one quantity."""

    median: float
    low: float  # quartiles; of fewer than four measurements the minimum and the maximum
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, high = min(values), max(values)
        if len(values) > 3:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high, len(values))


@dataclass
class Clock:
    """The seconds that the choices of a plan have taken so far, and whether any drew at random."""

    seconds: float = 0.0
    drew: bool = False


def _timed(method: Method, clock: Clock, device: torch.device) -> Method:
    """A copy of the method whose choices are timed, with the computations that they ask for."""
    own = type(method)

    def choose(self: Any, context: Any) -> Any:
        before = None if clock.drew else context.generator.get_state()
        synchronize(device)
        began = time.perf_counter()
        keep = own.choose(self, context)
        synchronize(device)
        clock.seconds += time.perf_counter() - began
        if before is not None:
            clock.drew = not torch.equal(before, context.generator.get_state())
        return keep

    copied = copy.copy(method)
    # the copy is frozen, and shares its fields with a class that differs in choose() alone
    timed = type(own.__name__, (own,), {"name": own.name, "choose": choose})
    object.__setattr__(copied, "__class__", timed)
    return copied


def with_timed_choices(plan: Plan, model: LLaVA, clock: Clock) -> Plan:
    """The same plan, but the time of its choices is added to `clock`."""
    config = model.config
    plan = plan.resolve(config.text.num_hidden_layers, config.vision.num_patches)
    methods = tuple(_timed(method, clock, model.device) for method in plan.methods)
    return replace(plan, methods=methods)


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is idle; nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(act: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The shortest of `repeats` runs in seconds, after one run for warming up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        act()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


# ---------------------------------------------------------------- the machine


def gemm_rate(linear: nn.Module, rows: int, columns: int, outputs: int, model: LLaVA) -> float:
    """FLOPs per second of a linear layer of the model with `rows` input rows."""
    x = torch.randn(rows, columns, device=model.device, dtype=model.dtype)
    with torch.inference_mode():
        return 2 * rows * columns * outputs / best_seconds(lambda: linear(x), model.device)


def memory_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes per second of one pass over `size` bytes."""
    values = torch.ones(size // 4, device=device)
    return size / best_seconds(values.sum, device)


def can_reset_peak() -> bool:
    """Whether the system can reset the peak of resident memory (Linux can)."""
    return RESET.exists()


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the process's peak of resident bytes since entry.

    On systems other than Linux the peak is that of the process's whole life. It includes everything
    that the process holds, also the libraries' code.
    """
    if can_reset_peak():
        RESET.write_text("5")
    yield _peak


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library supports it."""
    gc.collect()
    memory.return_freed_memory()


def resident_bytes() -> int:
    """The resident memory of the process in bytes; on systems that do not report it, its peak."""
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
