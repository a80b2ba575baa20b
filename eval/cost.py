"""What a run costs, counted: FLOPs by the papers' formulas and exactly, bytes, memory, limits.

FastV's and SparseVLM's formulas count a multiply-add as one and stop at the decoder's layers;
`decoder_flops` and `vision_flops` count every multiplication and addition of matrix products and
attention (dense, causality not discounted), as torch's FlopCounterMode does.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillava.config import Config, TextConfig
from minillava.llava import LLaVA
from minillava.loading import memory
from minillava.pruning.base import Plan

RESET = Path("/proc/self/clear_refs")

# ---------------------------------------------------------------- formulas


def fastv_flops(n: int, config: TextConfig) -> int:
    """FastV's cost of a layer with n rows (arXiv 2403.06764, eq. 5): 4 n d^2 + 2 n^2 d + 2 n d m.

    It counts two of Llama's three MLP matrices.
    """
    d, m = config.hidden_size, config.intermediate_size
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def sparsevlm_flops(n: int, config: TextConfig) -> int:
    """SparseVLM's cost of a layer (arXiv 2410.04417): the same with all three MLP matrices."""
    return fastv_flops(n, config) + n * config.hidden_size * config.intermediate_size


def fastv_share(entering: Sequence[int], unpruned: int, config: TextConfig) -> float:
    """What the layers with so many rows cost, of what they cost unpruned, by FastV's formula."""
    whole = fastv_flops(unpruned, config) * len(entering)
    return sum(fastv_flops(n, config) for n in entering) / whole


def decoder_flops(entering: Sequence[int], config: TextConfig) -> int:
    """Exact FLOPs of a prefill of one sample with so many rows in each layer, one row of logits."""
    d, m, dh = config.hidden_size, config.intermediate_size, config.head_dim
    H, Hkv = config.num_attention_heads, config.num_key_value_heads
    row = 2 * d * dh * (2 * H + 2 * Hkv) + 6 * d * m  # q and o, k and v, gate, up and down
    layers = sum(n * row + 4 * n * n * H * dh for n in entering)
    return layers + 2 * d * config.vocab_size


def vision_flops(config: Config, blocks: int) -> int:
    """Exact FLOPs of a picture: patches, so many blocks of the tower, and the projector."""
    v, N, D = config.vision, config.vision.num_patches, config.text.hidden_size
    C, M, T = v.hidden_size, v.intermediate_size, N + 1
    patches = 2 * N * C * 3 * v.patch_size**2
    block = 8 * T * C * C + 4 * T * C * M + 4 * T * T * C
    return patches + blocks * block + 2 * N * D * (C + D)


def cache_bytes(entering: Sequence[int], config: TextConfig, itemsize: int = 4) -> int:
    """Keys and values of so many rows in each layer."""
    return sum(entering) * 2 * config.num_key_value_heads * config.head_dim * itemsize


def activation_bytes(entering: Sequence[int], config: Config, plan: Plan, itemsize: int = 4) -> int:
    """The largest moment of a prefill of one sample with one picture and so many rows in each
    layer, weights and cache apart (without what layers of integer weights need for themselves).

    It is in a block's MLP. In the decoder there are rows before the block, after its attention, and
    normalised; gate and up; queries and keys, where the plan asks a layer for them; the tower's
    states and projected features. In the tower: the patches; rows as in the decoder; one matrix,
    its sigmoid and their product.
    """
    t, v = config.text, config.vision
    N, D, C = v.num_patches, t.hidden_size, v.hidden_size
    heads = (t.num_attention_heads + t.num_key_value_heads) * t.head_dim
    asked = any(step.stage == "decoder" for step in plan.steps)
    row = 3 * D + asked * heads + 2 * t.intermediate_size
    decoder = max(entering) * row + (N + 1) * C + N * D
    tower = (N + 1) * (3 * C + 3 * v.intermediate_size) + N * C
    return max(decoder, tower) * itemsize


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float  # quartiles; with fewer than four measurements the least and the greatest
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
    """Seconds spent in the choices of a plan."""

    seconds: float = 0.0


@dataclass(frozen=True)
class _Timed:
    """A method whose choices are timed, with the model's own work that they ask for."""

    inner: Any
    clock: Clock
    device: torch.device = field(default=torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def resolve(self, n_layers: int, per_image: int) -> _Timed:
        return self

    def choose(self, context: Any) -> Any:
        synchronize(self.device)
        began = time.perf_counter()
        keep = self.inner.choose(context)
        synchronize(self.device)
        self.clock.seconds += time.perf_counter() - began
        return keep


def with_timed_choices(plan: Plan, model: LLaVA, clock: Clock) -> Plan:
    """The same plan; the time of its choices is added to `clock`."""
    config = model.config
    plan = plan.resolve(config.text.num_hidden_layers, config.vision.num_patches)
    methods: Any = tuple(_Timed(method, clock, model.device) for method in plan.methods)
    return replace(plan, methods=methods)


def synchronize(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(act: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least of several times, after one that does not count."""
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
    """FLOPs a second of a linear layer of the model on so many rows."""
    x = torch.randn(rows, columns, device=model.device, dtype=model.dtype)
    with torch.inference_mode():
        return 2 * rows * columns * outputs / best_seconds(lambda: linear(x), model.device)


def memory_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second, reading `size` bytes once."""
    values = torch.ones(size // 4, device=device)
    return size / best_seconds(values.sum, device)


def can_reset_peak() -> bool:
    """Whether the system can start a new peak of resident memory (Linux)."""
    return RESET.exists()


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Inside, a function that gives the process's peak of resident bytes since it began.

    Linux can start a new peak; elsewhere it is that of the process's whole life. All that the
    process holds is in it, the libraries' code too.
    """
    if can_reset_peak():
        RESET.write_text("5")
    yield _peak


def give_back() -> None:
    """Return freed memory to the system, where that can be asked of it."""
    gc.collect()
    memory.return_freed_memory()


def resident_bytes() -> int:
    """Memory that the process holds now; where the system does not say, its peak."""
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
