"""Decoding that is prepared once and then repeated, for load(compile=True).

CompiledDecode and GraphDecode take the place of engine.decode and give the same tokens. Both need
the cached rows that a layer sees to be known without asking a method, so a plan that chooses again
for every token (mode=mask, with a score that reads the newest row) goes through engine.decode.

CompiledDecode, for CPUs, runs every decoder layer in code that torch.compile made of one of them.
Weights, cache and the numbers of rows are inputs of that code, so it serves all layers, plans and
lengths. There is one version of it for a prompt alone, and others for batches and masks, which are
made when they are needed first. After 8 versions torch runs layers that none fits uncompiled.

GraphDecode, for CUDA, records all kernels of one token as a CUDA graph and repeats them, so that
the host starts one graph and not hundreds of kernels. A graph always reads and writes the same
addresses: it belongs to one generation, whose cache it reads whole, with a mask over the rows that
are not there yet.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import token_attention
from ..cache import Held, KVCache, write_rows
from ..engine import State, decode, view_cache
from ..llama import Block, Rope
from ..llava import LLaVA
from ..pruning.base import Plan
from ..sample import CacheView
from .assemble import choose_arithmetic
from .error_text import cut

RunBlock = Callable[[Block, Tensor, Rope, Held, CacheView], Tensor]
RunBlocks = Callable[[Sequence[Block], Tensor, Rope, Sequence[Held], CacheView], Tensor]
COMPILERS = {"darwin": "clang++", "win32": "cl"}  # torch's default for C++; elsewhere g++


def check_compilable(device: torch.device, storage: torch.dtype, forms: Mapping[str, str]) -> None:
    """Raise ValueError if a model with these weights (see assemble.py) cannot be compiled here."""
    if device.type != "cpu":
        return
    stored = sorted({*forms.values()}) or [str(storage).removeprefix("torch.")]
    if forms or choose_arithmetic(device, storage, forms) != storage:
        raise ValueError(
            f"compile=True, but weights stored in {' and '.join(stored)} are multiplied here by "
            "kernels that torch.compile does not know; leave compile out, or quantize and dtype"
        )
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compile=True needs the C++ compiler {compiler}, which is not there; install it, name "
            "another one in the environment variable CXX, or leave it out"
        )


def compile_decoding(model: LLaVA) -> CompiledDecode | GraphDecode:
    """What takes the place of engine.decode for a loaded model. Raises ValueError."""
    if model.device.type == "cuda":
        return GraphDecode()
    compiled = CompiledDecode()
    compiled.prepare(model)
    return compiled


def asks_again(plan: Plan, model: LLaVA) -> bool:
    """Whether a plan asks a method again for every token, which only engine.decode does."""
    return any(plan.chosen_again(layer) for layer in range(model.config.text.num_hidden_layers))


# ---------------------------------------------------------------- one token


@dataclass(frozen=True)
class TokenAttention:
    """Attention of the new rows in one decoder layer, on its rows of the cache."""

    keys: Tensor  # (B, Hkv, end, Dh)
    values: Tensor  # (B, Hkv, end, Dh)
    view: CacheView

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, Dh), k, v (B, Hkv, Dh) -> (B, H, Dh)."""
        write_rows(self.keys, k, self.view.at)
        write_rows(self.values, v, self.view.at)
        return token_attention(q, self.keys, self.values, self.view.visible)


def run_block(block: Block, x: Tensor, rope: Rope, held: Held, view: CacheView) -> Tensor:
    """One decoder layer for one row per sample (B, D), with the layer's part of the cache."""
    keys, values = (rows[:, :, : view.end] for rows in held)  # each (B, Hkv, end, Dh)
    return block(x, rope, TokenAttention(keys, values, view))  # (B, D)


def run_blocks(
    blocks: Sequence[Block], x: Tensor, rope: Rope, held: Sequence[Held], view: CacheView
) -> Tensor:
    """Consecutive decoder layers for one row per sample (B, D), with their parts of the cache."""
    for block, rows in zip(blocks, held, strict=True):
        x = run_block(block, x, rope, rows, view)  # (B, D)
    return x


def run_token(
    model: LLaVA, tokens: Tensor, state: State, views: Iterable[CacheView], run: RunBlocks
) -> Tensor:
    """What engine.decode does on the device: logits (B, V) after tokens (B,)."""
    cache = state.cache
    assert cache is not None
    x = model.embed(tokens)  # (B, D)
    for segment, position, view in zip(state.segments, state.position, views, strict=True):
        rope = model.llama.rope(position, model.dtype)
        blocks = [model.block(layer) for layer in segment.layers]
        held = [(cache.keys[layer], cache.values[layer]) for layer in segment.layers]
        x = run(blocks, x, rope, held, view)  # (B, D)
    state.position += 1
    state.length += 1
    return model.llama.logits(x)


def count_token(state: State) -> None:
    """What engine.decode counts on the host."""
    assert state.cache is not None
    state.cache.lengths = [[n + 1 for n in lengths] for lengths in state.cache.lengths]
    for s in state.samples:
        s.generated += 1


# ---------------------------------------------------------------- CPU


class LayerDecode:
    """decode() whose layers are run by run(), in subclasses."""

    def __call__(self, model: LLaVA, tokens: Tensor, state: State) -> Tensor:
        """As engine.decode."""
        if asks_again(state.plan, model):
            return decode(model, tokens, state)
        views = [view_cache(state, i, segment.hidden) for i, segment in enumerate(state.segments)]
        logits = run_token(model, tokens, state, views, self.run)
        count_token(state)
        return logits

    def run(
        self, blocks: Sequence[Block], x: Tensor, rope: Rope, held: Sequence[Held], view: CacheView
    ) -> Tensor:
        """As run_blocks."""
        raise NotImplementedError


class CompiledDecode(LayerDecode):
    """decode() with its decoder layers compiled."""

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.compiled: RunBlock = torch.compile(run_block, dynamic=True, backend=backend)

    def run(
        self, blocks: Sequence[Block], x: Tensor, rope: Rope, held: Sequence[Held], view: CacheView
    ) -> Tensor:
        """As run_blocks."""
        for block, rows in zip(blocks, held, strict=True):
            x = self.run_block(block, x, rope, rows, view)  # (B, D)
        return x

    def run_block(self, block: Block, x: Tensor, rope: Rope, held: Held, view: CacheView) -> Tensor:
        """run_block, compiled except for the last rows that the cache has room for: code for a part
        of a tensor is not code for all of it."""
        if view.end == held[0].shape[2]:
            return run_block(block, x, rope, held, view)
        at = None if view.at is None else view.at.clone()  # its place in memory is not an input
        return self.compiled(block, x, rope, held, replace(view, at=at))

    @torch.inference_mode()
    def prepare(self, model: LLaVA) -> None:
        """Compile what one prompt without masks needs, so that no answer has to wait for it.

        Raises ValueError if it cannot be compiled here.
        """
        cache = KVCache(model.config.text, 3, model.dtype, model.device)
        cache.reserve([0], [2])
        x = torch.zeros(1, model.config.text.hidden_size, dtype=model.dtype)
        rope = model.llama.rope(torch.tensor([2]), model.dtype)
        held = cache.keys[0].zero_(), cache.values[0].zero_()
        try:
            self.run_block(model.block(0), x, rope, held, CacheView(3, None, None))
        except (RuntimeError, OSError) as error:  # all that fails in Dynamo and the compiler
            said = cut(" ".join(str(error).split("\n")[:2]))
            raise ValueError(
                f"compile=True: torch.compile failed ({said}); it needs a C++ compiler and the "
                "header files of Python: install them, or leave it out"
            ) from error


# ---------------------------------------------------------------- CUDA


class TokenGraph:
    """One token of one generation as a CUDA graph."""

    def __init__(self, tokens: Tensor, state: State) -> None:
        assert state.cache is not None
        self.tokens = tokens.clone()  # (B,) that the graph reads
        self.logits: Tensor | None = None  # (B, V) that the graph writes
        self.graph = torch.cuda.CUDAGraph()
        self.shown = [show(state, i) for i in range(len(state.segments))]
        for held in (state.cache.keys, state.cache.values):
            for rows, lengths in zip(held, state.cache.lengths, strict=True):
                rows[:, :, max(lengths) :] = 0.0  # as in KVCache.store

    def views(self, state: State) -> list[CacheView]:
        """The whole cache of each segment, with the rows up to the new one visible."""
        views = []
        for length, shown in zip(state.length, self.shown, strict=True):
            end = shown.shape[-1]
            filled = torch.arange(end, device=length.device) <= length[:, None]  # (B, end)
            views.append(CacheView(end, length, filled[:, None, None] & shown))
        return views

    def record(self, model: LLaVA, state: State) -> None:
        """Record the kernels of a token; they are not run."""
        with (
            torch.cuda.device(self.tokens.device),
            torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
        ):
            self.logits = run_token(model, self.tokens, state, self.views(state), run_blocks)

    def repeat(self, tokens: Tensor) -> Tensor:
        """Run the kernels on other tokens."""
        assert self.logits is not None
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits.clone()


def show(state: State, number: int) -> Tensor:
    """Which rows (B, 1, 1, S) the masks of a plan leave visible in the layers of a segment."""
    assert state.cache is not None
    segment = state.segments[number]
    shown = torch.ones(len(state.samples), state.cache.keys[segment.layers.start].shape[2]).bool()
    for row, hidden in zip(shown, segment.hidden, strict=True):
        if hidden is not None:
            row[: len(hidden)] = ~hidden
    return shown[:, None, None].to(state.length.device, non_blocking=True)


class GraphDecode:
    """decode() from a CUDA graph, which is recorded at the second call of a generation."""

    def __call__(self, model: LLaVA, tokens: Tensor, state: State) -> Tensor:
        """As engine.decode."""
        if asks_again(state.plan, model):
            return decode(model, tokens, state)
        if state.graph is None:  # kernels that run for the first time may do what a graph cannot
            state.graph = TokenGraph(tokens, state)
            logits = run_token(model, tokens, state, state.graph.views(state), run_blocks)
        else:
            if state.graph.logits is None:
                state.graph.record(model, state)
            logits = state.graph.repeat(tokens)
        count_token(state)
        return logits
