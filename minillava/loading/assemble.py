"""Stored tensors -> the weights of a model without memory, in the form that was asked for."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from ..llava import LLaVA
from ..quant.linear import Int4, Int8, Weight, WidenedLinear, stored_linear
from ..quant.quantise import to_int4, to_int8
from .tensor_files import FLOATS, Stored

TIED = ("llama.embed_tokens.weight", "llama.lm_head.weight")  # one tensor in some models
BLOCKS = ("llama.blocks.",)
_BITS = {"I8": 8, "U8": 4}  # files' words for weights that are integers


def linear_layers(model: LLaVA) -> dict[str, nn.Linear]:
    """By our names, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def quantised_layers(model: LLaVA, bits: int) -> dict[str, int]:
    """Which linear layers get integers as weights, and of how many bits: our name -> 8 or 4.

    The decoder's blocks get `bits`; the vision tower, the projector, an output head of its own and
    rows of odd length (two 4-bit codes share a byte) get 8. Embeddings, a head tied to them and
    everything small stay as they are.
    """
    tied = model.config.text.tie_word_embeddings
    return {
        name: bits if name.startswith(BLOCKS) and layer.in_features % 2 == 0 else 8
        for name, layer in linear_layers(model).items()
        if not (tied and name == "llama.lm_head")
    }


def forms_of(
    model: LLaVA, found: Mapping[str, Stored], quantize: str | None, folder: Path
) -> dict[str, str]:
    """The layers that are quantised, and how: our name -> int8, int8-dynamic or int4.

    Raises ValueError if the files are quantised already, in another way.
    """
    kinds = {n: t.kind for n, t in found.items() if t.kind in _BITS}
    bits = {name.removesuffix(".weight"): _BITS[kind] for name, kind in kinds.items()}
    has = "int4" if 4 in bits.values() else "int8"
    if bits and quantize not in (None, has, f"{has}-dynamic"):
        raise ValueError(
            f"quantize={quantize!r}, but the weights in {folder} are stored in {has}; leave "
            "quantize out, or take the unquantised checkpoint"
        )
    if not bits and quantize is None:
        return {}
    bits = bits or quantised_layers(model, 4 if quantize == "int4" else 8)
    names = {4: "int4", 8: "int8"}
    dynamic = BLOCKS if quantize == "int8-dynamic" else ()  # elsewhere it would save no time
    return {
        name: "int8-dynamic" if name.startswith(dynamic) else names[n] for name, n in bits.items()
    }


def fill(
    model: LLaVA,
    found: Mapping[str, Stored],
    device: torch.device,
    storage: torch.dtype,
    forms: Mapping[str, str],
    progress: bool = False,
) -> None:
    """Give a model on the meta device its weights, read and converted one at a time.

    `storage` is the dtype of the large ones, `forms` names the quantised layers; all others are
    held as they are computed with.
    """
    on_cpu = device.type == "cpu"
    model.requires_grad_(False).eval()
    model.dtype = torch.float32 if on_cpu else storage  # no fast 16-bit arithmetic there
    stored = {name for name in linear_layers(model) if name in forms or model.dtype != storage}
    tied = TIED if model.config.text.tie_word_embeddings else ()
    if tied:
        _put_tied(model, [found[n] for n in TIED if n in found], device, storage)
    # the largest first: what converting them takes for a moment is then not on top of all others
    order = sorted(found, key=lambda name: -math.prod(found[name].shape))
    for name in tqdm(order, "loading", unit="", leave=False, disable=None if progress else True):
        layer, _, part = name.rpartition(".")
        if name in tied or (layer in stored and part != "weight"):
            continue
        if layer in stored:
            weight = _weight(found, name, device, storage, forms.get(layer))
            there = found.get(f"{layer}.bias")
            bias = None if there is None else _floats(there, device, model.dtype)
            digits = 1 if forms.get(layer) == "int8-dynamic" else 2
            model.set_submodule(layer, stored_linear(weight, bias, digits))
            del weight
            give_back()
        else:
            dtype = storage if name == TIED[0] else model.dtype
            _put(model, name, _floats(found[name], device, dtype))
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"without values: {left}"


def give_back() -> None:
    """Return freed memory to the system. glibc keeps blocks below 32 MB, and what conversion leaves
    between the weights that stay would add up to a third of a model in 4 bits."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _put(model: LLaVA, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


def _put_tied(
    model: LLaVA, stored: list[Stored], device: torch.device, storage: torch.dtype
) -> None:
    weights = [_floats(tensor, device, storage) for tensor in stored]
    if not torch.equal(weights[0], weights[-1]):
        raise ValueError(
            f"{stored[-1].file}: tie_word_embeddings is true, but the output head and the "
            "embedding differ; set it to false in config.json, if the two are meant to"
        )
    _put(model, TIED[0], weights[0])
    if storage != model.dtype:
        model.llama.set_submodule("lm_head", WidenedLinear(weights[0], None))
    model.llama.lm_head.weight = model.llama.embed_tokens.weight  # one object: they stay tied


def _weight(
    found: Mapping[str, Stored],
    name: str,
    device: torch.device,
    storage: torch.dtype,
    form: str | None,
) -> Weight:
    """A layer's weight in its form, from a file that has it in the same form or as floats."""
    tensor = found[name]
    if form is None:
        return _floats(tensor, device, storage)
    if tensor.kind == "I8":
        return Int8(
            tensor.read(device, torch.int8), found[f"{name}_scale"].read(device, torch.float32)
        )
    if tensor.kind == "U8":
        scale, low = (
            found[name + part].read(device, torch.bfloat16) for part in ("_scale", "_low")
        )
        return Int4(tensor.read(device, torch.uint8), scale, low)
    parts = integers(tensor, device, 4 if form == "int4" else 8)
    return Int4(*parts) if form == "int4" else Int8(*parts)


def integers(tensor: Stored, device: torch.device, bits: int) -> tuple[Tensor, ...]:
    """A weight that a file has as floats, in 8 or 4 bits: what to_int8 or to_int4 makes of it.

    Raises ValueError for values that are not finite, which integers cannot stand for.
    """
    weight = tensor.read(device, FLOATS[tensor.kind])
    codes, scale, *low = to_int8(weight) if bits == 8 else to_int4(weight)
    if not scale.isfinite().all():  # a group with NaN or infinity has such a scale
        raise ValueError(
            f"{tensor.file}: {tensor.name} has values that are not finite, which integers cannot "
            "hold; fetch the checkpoint again"
        )
    return (codes, scale, *low)


def _floats(tensor: Stored, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Raises ValueError for values that are too large for the dtype."""
    value = tensor.read(device, dtype)
    if dtype == torch.float16 and tensor.kind != "F16" and not value.isfinite().all():
        raise ValueError(
            f"{tensor.file}: {tensor.name} has values that float16 cannot hold (65504 at most); "
            "take dtype bfloat16 or float32"
        )
    return value
