"""Decoding of models with integer weights on a CPU: a segment's layers in one call of native.c.

A token of a 7B model streams gigabytes of weights through the CPU's caches, which leaves none of
the interpreter's and torch's own code there: an operation that takes 2 microseconds in a loop then
takes 10, and a decoder layer has fifty. NativeDecode therefore runs whole layers in C. It gives the
same as engine.decode up to the rounding of float32.

Weights may be moved or replaced between two tokens: the addresses that native.c is given are
compared with the modules' tensors for each token, in 1 ms for 32 layers, and collected anew if any
differs. Torch runs a segment with a layer that is then not stored as the first was when the model
was loaded, or of which any module has a hook, another class, or another forward(). It also runs
batches of more than FEW_ROWS samples.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..cache import Held
from ..config import TextConfig
from ..llama import MLP, Attention, Block, RMSNorm, Rope
from ..llava import LLaVA
from ..quant.integer import Int4Linear, Int8Linear
from ..quant.native import FEW_ROWS, LANES, Kernels, kernels
from ..quant.quantise import ROTATED_COLUMNS, block_size
from ..sample import CacheView
from .compiled import LayerDecode, run_blocks

# What native.c does is what these do.
FORWARDS = {kind: kind.forward for kind in (Block, Attention, MLP, RMSNorm, Int8Linear, Int4Linear)}


def native_decoding(model: LLaVA) -> NativeDecode | None:
    """What takes the place of engine.decode for a model whose decoder layers native.c can run."""
    text, compiled = model.config.text, kernels()
    columns = (text.hidden_size, text.intermediate_size, text.head_dim)
    if (
        compiled is None
        or not native_form(model.block(0))
        or any(block_size(K, ROTATED_COLUMNS) < LANES for K in columns)
    ):
        return None
    decoding = NativeDecode(compiled, text, model.block(0))
    blocks = map(model.block, range(text.num_hidden_layers))
    return decoding if all(map(decoding.prepare, blocks)) else None


@dataclass(frozen=True)
class NativeLayer:
    """The weights of a decoder layer as native.c reads them, and where they were found."""

    record: Tensor  # the addresses of all tensors, int64
    tensors: list[Tensor]
    states: list[tuple[Any, ...]]  # of the tensors, see state_of
    places: list[tuple[dict[str, Any], str, Any]]  # what every module inside the layer held
    modules: list[nn.Module]  # inside the layer, not itself: it is the key of this value

    def is_current(self) -> bool:
        """Whether the modules hold the same tensors in the same places, and compute as before."""
        return (
            all(holder.get(name) is value for holder, name, value in self.places)
            and [state_of(t) for t in self.tensors] == self.states
            and not any(map(is_changed, self.modules))
        )


class NativeDecode(LayerDecode):
    """decode() with its decoder layers in C."""

    def __init__(self, compiled: Kernels, text: TextConfig, first: Block) -> None:
        """first: a layer; segments with one that is not stored as it is are run by torch."""
        self.kernels, self.eps = compiled, text.rms_norm_eps
        self.sizes = text.intermediate_size, text.num_attention_heads, text.num_key_value_heads
        layer = linear_layers(first)[0]  # the others compute as it does, see native_form
        self.digits, self.form = (layer.digits, layer.limit), form_of(layer)
        self.shapes = [None if t is None else state_of(t)[1:] for t in stored_tensors(first)]
        self.prepared: MutableMapping[Block, NativeLayer] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, also one in a file: it prepares the layers of its own model."""
        return {name: value for name, value in self.__dict__.items() if name != "prepared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "prepared": WeakKeyDictionary()}

    def prepare(self, block: Block) -> NativeLayer | None:
        """A layer's weights; None: they are not stored as those of the first layer were, or the
        layer does something else."""
        known = self.prepared.get(block)
        if known is not None and not is_changed(block) and known.is_current():
            return known
        self.prepared.pop(block, None)
        itself, *inside = block.modules()
        if any(map(is_changed, (itself, *inside))):
            return None
        if any(form_of(layer) != self.form for layer in linear_layers(block)):
            return None
        stored = stored_tensors(block)
        tensors = [t for t in stored if t is not None]
        if [None if t is None else state_of(t)[1:] for t in stored] != self.shapes:
            return None
        record = torch.tensor([0 if t is None else t.data_ptr() for t in stored])
        states = [state_of(t) for t in tensors]
        found = NativeLayer(record, tensors, states, places_in(block), inside)
        self.prepared[block] = found
        return found

    def run(
        self, blocks: Sequence[Block], x: Tensor, rope: Rope, held: Sequence[Held], view: CacheView
    ) -> Tensor:
        """As run_blocks."""
        native = len(x) <= FEW_ROWS and not (
            _global_forward_hooks
            or _global_forward_pre_hooks
            or any(kind.forward is not forward for kind, forward in FORWARDS.items())
        )
        layers = [self.prepare(block) for block in blocks] if native else []
        records = [layer.record for layer in layers if layer is not None]
        if len(records) < len(blocks):
            return run_blocks(blocks, x, rope, held, view)
        seen, (room, Dh) = (view.end, view.at, view.visible), held[0][0].shape[2:]
        sizes = (*self.sizes, Dh, room)
        return self.kernels.decode_layers(
            records, held, x, rope, seen, sizes, self.digits, self.eps
        )


def linear_layers(block: Block) -> list[Int4Linear | Int8Linear]:
    """The seven linear layers in the order in which native.c wants them."""
    a, m = block.attn, block.mlp
    found = [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
    return cast(list[Int4Linear | Int8Linear], found)


def form_of(layer: nn.Module) -> tuple[Any, ...]:
    """How a linear layer computes."""
    if not isinstance(layer, Int4Linear | Int8Linear):
        return (type(layer),)
    return type(layer), layer.digits, layer.limit, layer.bias is None


def native_form(block: Block) -> bool:
    """Whether all linear layers compute alike, without bias, and native.c has their products."""
    first, *others = linear_layers(block)
    alike = all(form_of(layer) == form_of(first) for layer in others)
    return alike and isinstance(first, Int4Linear | Int8Linear) and first.bias is None


def stored_tensors(block: Block) -> list[Tensor | None]:
    """The tensors of the linear layers and of both norms, in the order that native.c wants."""
    linear = [t for layer in linear_layers(block) for t in layer.stored]
    return [*linear, block.norm1.weight, block.norm2.weight]


def state_of(tensor: Tensor) -> tuple[Any, ...]:
    """The address of a tensor, and what native.c relies on there."""
    where = tensor.data_ptr(), tensor.dtype, tensor.shape
    return *where, tensor.is_contiguous(), tensor.is_cpu


def is_changed(module: nn.Module) -> bool:
    """Whether somebody gave a module something to do that native.c does not know of."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or type(module) not in FORWARDS


def places_in(block: Block) -> list[tuple[dict[str, Any], str, Any]]:
    """Everything that the modules of a layer hold, and in which dictionaries they hold it."""
    holders: list[dict[str, Any]] = []
    for m in block.modules():
        holders += [m._modules, m._parameters, m._buffers]
    return [(holder, name, value) for holder in holders for name, value in holder.items()]
