"""Decoding of models with integer weights on a CPU, with what lies between the products in C.

A token of a 7B model streams gigabytes of weights through the CPU's caches, which leaves none of
the interpreter's and torch's own code there: an operation that takes 2 microseconds in a loop then
takes 10, and a decoder layer has fifty. NativeDecode runs a layer as seven products and four calls
of native.c: norm and rounding, rotation and attention on the cache, rounding, gate and rounding.
It gives the same as engine.decode up to the rounding of float32.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..cache import Held
from ..llama import Block, Rope
from ..llava import LLaVA
from ..quant.integer import Int4Linear, Int8Linear, IntegerLinear
from ..quant.native import LANES, Kernels, kernels
from ..quant.quantise import ROTATED_COLUMNS, block_size
from ..quant.stored import Digits
from ..sample import CacheView
from .compiled import LayerDecode


def native_decoding(model: LLaVA) -> NativeDecode | None:
    """What takes the place of engine.decode for a model whose decoder layers native.c can run."""
    text, compiled = model.config.text, kernels()
    blocks = map(model.block, range(text.num_hidden_layers))
    layers = [layer for b in blocks for layer in (*b.attn.children(), *b.mlp.children())]
    columns = (text.hidden_size, text.intermediate_size, text.head_dim)
    if (
        compiled is None
        or {*map(type, layers)} not in ({Int4Linear}, {Int8Linear})
        or any(block_size(K, ROTATED_COLUMNS) < LANES for K in columns)
    ):
        return None
    return NativeDecode(compiled)


class NativeDecode(LayerDecode):
    """decode() with the operations between the products in C."""

    def __init__(self, compiled: Kernels) -> None:
        self.kernels = compiled

    def run(self, block: Block, x: Tensor, rope: Rope, held: Held, view: CacheView) -> Tensor:
        """A decoder layer for one row per sample (B, D), with the layer's part of the cache."""
        attn, mlp, B = block.attn, block.mlp, len(x)
        digits = self.normalise(x, block.norm1.weight, block.norm1.eps, attn.q_proj)
        q, k, v = (
            cast(IntegerLinear, proj).multiply_digits(digits).view(B, -1, attn.head_dim)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        y = self.kernels.attend_token((q, k, v), rope, held, view.end, view.at, view.visible)
        x = x + attn.o_proj(y)  # (B, D)
        digits = self.normalise(x, block.norm2.weight, block.norm2.eps, mlp.gate_proj)
        gate, up = (
            cast(IntegerLinear, proj).multiply_digits(digits)
            for proj in (mlp.gate_proj, mlp.up_proj)
        )
        down = cast(IntegerLinear, mlp.down_proj)
        found = self.kernels.gated_to_digits(gate, up, down.digits, down.limit)
        return x.add_(down.multiply_digits(Digits(*found, gate.shape, gate.dtype)))  # (B, D)

    def normalise(self, x: Tensor, weight: Tensor, eps: float, layer: torch.nn.Module) -> Digits:
        """Digits of RMSNorm of x (B, D), as `layer` reads them."""
        reader = cast(IntegerLinear, layer)
        found = self.kernels.normalised_to_digits(x, weight, eps, reader.digits, reader.limit)
        return Digits(*found, x.shape, x.dtype)
