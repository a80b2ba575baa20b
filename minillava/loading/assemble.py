"""Fill a model on the meta device with its weights, quantised if asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from ..llava import LLaVA
from ..quant.linear import (
    Int4,
    Int8,
    Weight,
    WidenedLinear,
    choose_linear,
    kernel_works,
    multiplies_bfloat16,
)
from ..quant.quantise import to_int4, to_int8
from .memory import return_freed_memory
from .tensor_files import FLOATS, StoredTensor

TIED = ("llama.embed_tokens.weight", "llama.lm_head.weight")  # one tensor in some models
BLOCKS = ("llama.blocks.",)
TOWER = ("vision.", "projector.")
_BITS = {"I8": 8, "U8": 4}  # how safetensors spells the dtypes of integer weights


def linear_layers(model: LLaVA) -> dict[str, nn.Linear]:
    """Every nn.Linear by its name in our model, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def quantised_layers(model: LLaVA, bits: int) -> dict[str, int]:
    """The linear layers whose weights become integers: our name -> 8 or 4 bits.

    The decoder's blocks get `bits`. The vision tower, the projector, an untied output head, and
    rows of odd length (two 4-bit codes share a byte) get 8. Embeddings, a head tied to them and
    everything small are not quantised.
    """
    tied = model.config.text.tie_word_embeddings
    return {
        name: bits if name.startswith(BLOCKS) and layer.in_features % 2 == 0 else 8
        for name, layer in linear_layers(model).items()
        if not (tied and name == "llama.lm_head")
    }


def choose_forms(
    model: LLaVA, found: Mapping[str, StoredTensor], quantize: str | None, folder: Path
) -> dict[str, str]:
    """The form of each quantised layer: our name -> "int8", "int8-dynamic" or "int4".

    Raises ValueError if the files are already quantised to another number of bits.
    """
    kinds = {n: t.kind for n, t in found.items() if t.kind in _BITS}
    bits = {name.removesuffix(".weight"): _BITS[kind] for name, kind in kinds.items()}
    stored = "int4" if 4 in bits.values() else "int8"
    if bits and quantize not in (None, stored, f"{stored}-dynamic"):
        raise ValueError(
            f"quantize={quantize!r}, but the weights in {folder} are stored in {stored}; leave "
            "quantize out, or take the unquantised checkpoint"
        )
    if not bits and quantize is None:
        return {}
    bits = bits or quantised_layers(model, 4 if quantize == "int4" else 8)
    names = {4: "int4", 8: "int8"}
    dynamic: tuple[str, ...] = BLOCKS if quantize == "int8-dynamic" else ()
    if (dynamic or stored == "int4" or quantize == "int4") and kernel_works("onednn"):
        dynamic += TOWER  # with 8 bits one digit is accurate enough for it
    return {
        name: "int8-dynamic" if name.startswith(dynamic) and n == 8 else names[n]
        for name, n in bits.items()
    }


def choose_arithmetic(
    device: torch.device, storage: torch.dtype, forms: Mapping[str, str]
) -> torch.dtype:
    """The dtype that a model computes in, from the dtype that its weights are held in.

    On CUDA they are the same. A CPU computes in float32, but in bfloat16 where it multiplies
    bfloat16 in hardware and no weight is stored in integers (those kernels take float32).
    """
    if device.type != "cpu":
        return storage
    native = storage == torch.bfloat16 and not forms and multiplies_bfloat16()
    return storage if native else torch.float32


def load_weights(
    model: LLaVA,
    found: Mapping[str, StoredTensor],
    device: torch.device,
    storage: torch.dtype,
    forms: Mapping[str, str],
    progress: bool = False,
) -> None:
    """Give a model on the meta device its weights, reading and converting one at a time.

    found: our name -> tensor in a file, for all weights. storage: dtype that linear and embedding
    weights are held in; all others are held in the dtype of the arithmetic. forms: the quantised
    layers, see choose_forms. progress: a bar on stderr.
    Raises ValueError for values that the dtype or the integers cannot represent.
    """
    model.requires_grad_(False).eval()
    model.dtype = choose_arithmetic(device, storage, forms)
    converted = {name for name in linear_layers(model) if name in forms or model.dtype != storage}
    tied = TIED if model.config.text.tie_word_embeddings else ()
    if tied:
        stored = found[next(name for name in TIED if name in found)]
        _set_tied_weights(model, _read_floats(stored, device, storage))
    # Largest first, so that the temporary memory of converting them does not come on top of the
    # weights already loaded.
    order = sorted(found, key=lambda name: -math.prod(found[name].shape))
    for name in tqdm(order, "loading", unit="", leave=False, disable=None if progress else True):
        layer, _, part = name.rpartition(".")
        if name in tied or (layer in converted and part != "weight"):
            continue
        if layer in converted:
            weight = _read_weight(found, name, device, storage, forms.get(layer))
            stored_bias = found.get(f"{layer}.bias")
            bias = None if stored_bias is None else _read_floats(stored_bias, device, model.dtype)
            digits = 1 if forms.get(layer) == "int8-dynamic" else 2
            model.set_submodule(layer, choose_linear(weight, bias, digits))
            del weight
            return_freed_memory()
        else:
            dtype = storage if name == TIED[0] else model.dtype
            _set_parameter(model, name, _read_floats(found[name], device, dtype))
    missing = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not missing, f"without values: {missing}"


def _set_parameter(model: LLaVA, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


def _set_tied_weights(model: LLaVA, weight: Tensor) -> None:
    """Set the embedding and the output head to one tensor."""
    _set_parameter(model, TIED[0], weight)
    if weight.dtype != model.dtype:
        model.llama.set_submodule("lm_head", WidenedLinear(weight, None))
    model.llama.lm_head.weight = model.llama.embed_tokens.weight  # one object, so they stay tied


def _read_weight(
    found: Mapping[str, StoredTensor],
    name: str,
    device: torch.device,
    storage: torch.dtype,
    form: str | None,
) -> Weight:
    """A linear layer's weight in the given form; the file has it in that form or as floats."""
    tensor = found[name]
    if form is None:
        return _read_floats(tensor, device, storage)
    if tensor.kind == "I8":
        return Int8(
            tensor.read(device, torch.int8), found[f"{name}_scale"].read(device, torch.float32)
        )
    if tensor.kind == "U8":
        dtypes = {"step": torch.uint8, "low": torch.int8, "scale": torch.float32}
        parts = [found[f"{name}_{part}"].read(device, dtype) for part, dtype in dtypes.items()]
        return Int4(tensor.read(device, torch.uint8), *parts)
    made = quantise_tensor(tensor, device, 4 if form == "int4" else 8)
    return Int4(*made) if form == "int4" else Int8(*made)


def quantise_tensor(tensor: StoredTensor, device: torch.device, bits: int) -> tuple[Tensor, ...]:
    """Quantise a weight that a file has as floats: the result of to_int8 or to_int4.

    Raises ValueError for NaN and infinity, which integers cannot represent.
    """
    weight = tensor.read(device, FLOATS[tensor.kind])
    *parts, scale = to_int8(weight) if bits == 8 else to_int4(weight)
    if not scale.isfinite().all():  # the scale of a row with NaN or infinity is not finite either
        raise ValueError(
            f"{tensor.file}: {tensor.name} has values that are not finite, which integers cannot "
            "represent; download the checkpoint again"
        )
    return (*parts, scale)


def _read_floats(tensor: StoredTensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Raises ValueError for values that are too large for float16."""
    value = tensor.read(device, dtype)
    if dtype == torch.float16 and tensor.kind != "F16" and not value.isfinite().all():
        raise ValueError(
            f"{tensor.file}: {tensor.name} has values that float16 cannot represent (at most "
            "65504); use dtype bfloat16 or float32"
        )
    return value
