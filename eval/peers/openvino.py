"""The decoder at the shape of LLaVA-1.5-7B in OpenVINO, with random weights.

The graph is written out as optimum-intel exports a Llama: stateful keys and values, RMSNorm, RoPE
and attention in the forms that the CPU plugin fuses, and compressed weights as NNCF stores them:

    f16   float16, computed in the precision that OpenVINO chooses (bfloat16 if the CPU has it)
    int8  8 bits with a scale and a zero point for each row
    u4    4 bits with a scale and a zero point for each group of 128 columns

Everything else is OpenVINO's default: 8-bit keys and values, and activations quantised dynamically
in groups of 32 where weights are compressed. No two weights are equal, because OpenVINO multiplies
an input only once by weights that are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from minillava.config import Config, TextConfig

from .base import TOKENS, Times, scale

GROUP = 128  # columns of a 4-bit weight that share a scale
POOL = 2**20 + 7  # random values that a weight repeats
SHIFT = 4099  # values of the pool between the start of a weight and that of the next
_Node = Any  # openvino.Node
_END = 2**31 - 1  # of a slice, as exporters write it: the fusion of RoPE looks for it


class OpenVino:
    """The decoder compiled for the CPU; it has no vision tower."""

    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    forms: ClassVar[Mapping[str, float]] = {
        "f16": 4.0,
        "int8": 2.0,
        "u4": 1.0,
    }  # the graph's copy and the compiled one

    def __init__(self, form: str, config: Config, tokens: int) -> None:
        import openvino

        text = config.text
        self.name, self.layers = f"openvino {form}", text.num_hidden_layers
        threads = torch.get_num_threads()
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        graph = _Graph(form, text)
        core = openvino.Core()
        compiled = core.compile_model(graph.decoder(), "CPU", options)
        self.decoder = compiled.create_infer_request()
        head = core.compile_model(graph.head_alone(), "CPU", options)
        self.head = head.create_infer_request()
        self.ids = np.random.default_rng(0).integers(3, text.vocab_size, (1, tokens))
        self.row = np.zeros((1, 1, text.hidden_size), np.float32)

    @staticmethod
    def shapes(config: Config) -> list[Config]:
        return [config]

    def measure(self) -> Times:
        self.decoder.reset_state()
        start = time.perf_counter()
        self._run(self.ids, 0)
        prefill = time.perf_counter()
        for i in range(TOKENS):
            self._run(self.ids[:, :1], self.ids.shape[1] + i)
        token = time.perf_counter()
        for _ in range(TOKENS):
            self.head.infer([self.row])
        head = (time.perf_counter() - token) / TOKENS
        return Times(
            vision=None,
            prefill=scale(prefill - start, head, self.layers),
            per_token=scale((token - prefill) / TOKENS, head, self.layers),
        )

    def _run(self, ids: Any, past: int) -> Any:
        """Logits (1, 1, V) of the last of the ids (1, L), which follow `past` earlier ones."""
        L = ids.shape[1]
        mask = np.triu(np.full((L, past + L), -np.inf, np.float32), past + 1)
        positions, beam = np.arange(past, past + L)[None], np.zeros(1, np.int32)
        return self.decoder.infer([ids, positions, mask[None, None], beam])[0]


class _Graph:
    """Makes the nodes of the decoder."""

    def __init__(self, form: str, config: TextConfig) -> None:
        import openvino

        self.ov, self.op = openvino, openvino.opset13
        self.form, self.config = form, config
        rng = np.random.default_rng(0)
        self.pool = rng.standard_normal(POOL, np.float32)  # repeated in every float weight
        self.codes = rng.integers(0, 256, POOL, np.uint8)  # and in every weight of integers
        self.weights = 0  # that were made
        self.sinks: list[_Node] = []

    def decoder(self) -> Any:
        """ids and positions (1, L), mask (1, 1, L, S), beam (1,) -> logits (1, 1, V)."""
        op, V, D = self.op, self.config.vocab_size, self.config.hidden_size
        ids = op.parameter([1, -1], np.int64, "ids")
        positions = op.parameter([1, -1], np.int64, "positions")
        mask = op.parameter([1, 1, -1, -1], np.float32, "mask")
        beam = op.parameter([1], np.int32, "beam")
        table = op.convert(op.constant(self._random(V, D)), np.float32)
        x = op.gather(table, ids, op.constant(0))  # (1, L, D)
        rope = self._rope(positions)
        for layer in range(self.config.num_hidden_layers):
            x = op.add(x, self._attention(layer, self._norm(x), rope, mask, beam))
            x = op.add(x, self._mlp(self._norm(x)))
        last = op.gather(x, op.constant([-1]), op.constant(1))  # (1, 1, D)
        return self._model(self._logits(last), [ids, positions, mask, beam])

    def head_alone(self) -> Any:
        """row (1, 1, D) -> logits (1, 1, V)."""
        row = self.op.parameter([1, 1, self.config.hidden_size], np.float32, "row")
        self.sinks = []
        return self._model(self._logits(row), [row])

    def _model(self, logits: _Node, inputs: list[_Node]) -> Any:
        return self.ov.Model([self.op.result(logits)], self.sinks, inputs, "decoder")

    def _logits(self, x: _Node) -> _Node:
        return self._linear(self._norm(x), self.config.vocab_size, self.config.hidden_size)

    def _norm(self, x: _Node) -> _Node:
        op, one = self.op, np.ones((1, 1, self.config.hidden_size), np.float32)
        square = op.reduce_mean(op.power(x, op.constant(np.float32(2))), op.constant([-1]), True)
        root = op.sqrt(op.add(square, op.constant(np.float32(self.config.rms_norm_eps))))
        return op.multiply(op.constant(one), op.multiply(x, op.divide(np.float32(1), root)))

    def _rope(self, positions: _Node) -> tuple[_Node, _Node]:
        """Cosine and sine of each position, (1, 1, L, Dh)."""
        op, Dh, theta = self.op, self.config.head_dim, self.config.rope_theta
        exponent = np.arange(0, Dh, 2, dtype=np.float32) / Dh
        frequency = op.constant((1.0 / theta**exponent).astype(np.float32)[None, :, None])
        at = op.unsqueeze(op.convert(positions, np.float32), op.constant(1))  # (1, 1, L)
        angle = op.transpose(op.matmul(frequency, at, False, False), op.constant([0, 2, 1]))
        both = op.unsqueeze(op.concat([angle, angle], 2), op.constant(1))  # (1, 1, L, Dh)
        return op.cos(both), op.sin(both)

    def _rotate(self, x: _Node, rope: tuple[_Node, _Node]) -> _Node:
        op, half = self.op, self.config.head_dim // 2
        one, axis = op.constant([1]), op.constant([3])
        a = op.slice(x, op.constant([0]), op.constant([half]), one, axis)
        b = op.slice(x, op.constant([half]), op.constant([_END]), one, axis)
        turned = op.concat([op.multiply(b, op.constant(np.float32(-1))), a], -1)
        return op.add(op.multiply(x, rope[0]), op.multiply(turned, rope[1]))

    def _attention(
        self, layer: int, x: _Node, rope: tuple[_Node, _Node], mask: _Node, beam: _Node
    ) -> _Node:
        op, D, H, Dh = self.op, *_sizes(self.config)
        split, order = op.constant([0, 0, H, Dh]), op.constant([0, 2, 1, 3])
        q, k, v = (
            op.transpose(op.reshape(self._linear(x, D, D), split, True), order) for _ in range(3)
        )  # (1, H, L, Dh)
        q, k = self._rotate(q, rope), self._rotate(k, rope)
        k, v = self._remember(f"k{layer}", k, beam), self._remember(f"v{layer}", v, beam)
        y = op.scaled_dot_product_attention(q, k, v, mask)
        y = op.reshape(op.transpose(y, order), op.constant([0, 0, D]), True)
        return self._linear(y, D, D)

    def _remember(self, name: str, new: _Node, beam: _Node) -> _Node:
        """Append new keys or values to the earlier ones, a variable of the compiled model."""
        op, (_, H, Dh) = self.op, _sizes(self.config)
        empty = op.constant(np.zeros((1, H, 0, Dh), np.float32))
        shape = self.ov.PartialShape([-1, H, -1, Dh])
        past = op.read_value(empty, name, np.float32, shape)
        both = op.concat([op.gather(past, beam, op.constant(0)), new], 2)
        self.sinks.append(op.assign(both, name))
        return both

    def _mlp(self, x: _Node) -> _Node:
        D, M = self.config.hidden_size, self.config.intermediate_size
        gate = self.op.swish(self._linear(x, M, D))
        return self._linear(self.op.multiply(gate, self._linear(x, M, D)), D, M)

    def _linear(self, x: _Node, N: int, K: int) -> _Node:
        return self.op.matmul(x, self._weight(N, K), False, True)

    def _weight(self, N: int, K: int) -> _Node:
        """A weight (N, K) as float32, decompressed from its stored form."""
        op, half = self.op, np.float16
        if self.form == "f16":
            return op.convert(op.constant(self._random(N, K)), np.float32)
        shape: tuple[int, ...] = (N, 1)
        step, codes = K**-0.5 / 128, op.constant(self._bytes(N, K))
        zero = op.constant(np.full(shape, 128, np.uint8))
        if self.form == "u4":
            shape, step = (N, K // min(GROUP, K), 1), K**-0.5 / 8
            codes = self._nibbles(self._bytes(N, K // 2), (*shape[:2], min(GROUP, K)))
            zero = self._nibbles(np.full(N * shape[1] // 2, 0x88, np.uint8), shape)
        centred = op.subtract(op.convert(codes, half), op.convert(zero, half))
        weight = op.multiply(centred, op.constant(np.full(shape, step, half)))
        if self.form == "u4":
            weight = op.reshape(weight, op.constant([N, K]), False)
        return op.convert(weight, np.float32)

    def _nibbles(self, packed: Any, shape: tuple[int, ...]) -> _Node:
        # by default the constant would read this array after it is gone
        tensor = self.ov.Tensor(packed, [*shape], self.ov.Type.u4)
        return self.ov.op.Constant(tensor, shared_memory=False)

    def _random(self, N: int, K: int) -> Any:
        return self._repeat((self.pool * K**-0.5).astype(np.float16), N, K)

    def _bytes(self, N: int, K: int) -> Any:
        return self._repeat(self.codes, N, K)

    def _repeat(self, pool: Any, N: int, K: int) -> Any:
        self.weights += 1
        return np.resize(np.roll(pool, -SHIFT * self.weights), (N, K))


def _sizes(config: TextConfig) -> tuple[int, int, int]:
    return config.hidden_size, config.num_attention_heads, config.head_dim
