"""Fill a model on the meta device with its weights, quantised if asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from ..llava import LLaVA
from ..quant.cpu import multiplies_bfloat16
from ..quant.linear import can_pack, choose_linear, kernel_works
from ..quant.nf4 import Nf4, absmax_of, to_nf4
from ..quant.quantise import to_int4, to_int8
from ..quant.stored import Int4, Int8, Weight, WidenedLinear
from .bitsandbytes_layout import LLM_INT8, JoinedWeight
from .memory import return_freed_memory
from .tensor_files import FLOATS, StoredTensor, read_small

TIED = ("llama.embed_tokens.weight", "llama.lm_head.weight")  # one tensor in some models
BLOCKS = ("llama.blocks.",)
TOWER = ("vision.", "projector.")
HEAD, PROJECTOR, DECODER = "llama.lm_head", "projector.", "llama."
PACKABLE = torch.bfloat16, torch.float32  # dtypes of a PackedLinear
LARGE = 2**20  # values of a float32 weight for which packing pays, such as (1024, 1024)
# The form of a weight by the dtype that safetensors names, or by a JoinedWeight's kind.
_FORMS = {"U8": "int4", "NF4": "nf4", "FP4": "fp4", LLM_INT8: LLM_INT8, "I8": "int8"}


def linear_layers(model: LLaVA) -> dict[str, nn.Linear]:
    """Every nn.Linear by its name in our model, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def quantised_layers(model: LLaVA, quantize: str) -> dict[str, str]:
    """The form of each linear layer whose weight is quantised: our name -> form.

    int8, int8-dynamic, int4: the decoder's blocks get that form. The vision tower, the projector,
    an untied output head, and for int4 rows of odd length (two codes share a byte), get int8.
    nf4: the decoder's blocks and the projector, as when LLaVA's own loader is told load_4bit.
    Embeddings, a head tied to them and everything small are not quantised.
    """
    layers = linear_layers(model)
    if quantize == "nf4":
        return {name: quantize for name in layers if name.startswith((*BLOCKS, PROJECTOR))}
    tied = model.config.text.tie_word_embeddings
    fits = {n for n, layer in layers.items() if quantize != "int4" or layer.in_features % 2 == 0}
    return {
        name: quantize if name.startswith(BLOCKS) and name in fits else "int8"
        for name in layers
        if not (tied and name == HEAD)
    }


def choose_forms(
    model: LLaVA, found: Mapping[str, StoredTensor], quantize: str | None, folder: Path
) -> dict[str, str]:
    """The form of each quantised layer: our name -> a value of _FORMS, or "int8-dynamic".

    Raises ValueError if the files are already quantised to another form.
    """
    stored = {
        name.removesuffix(".weight"): _FORMS[tensor.kind]
        for name, tensor in found.items()
        if tensor.kind in _FORMS
    }
    if not stored and quantize is None:
        return {}
    has = next((form for form in _FORMS.values() if form in stored.values()), quantize)
    if quantize not in (None, has) and (quantize, has) != ("int8-dynamic", "int8"):
        raise ValueError(
            f"quantize={quantize!r}, but the weights in {folder} are stored in {has}; leave "
            "quantize out, or take the unquantised checkpoint"
        )
    forms = stored or quantised_layers(model, str(quantize))
    dynamic: tuple[str, ...] = BLOCKS if quantize == "int8-dynamic" else ()
    if (quantize == "int8-dynamic" or has == "int4") and kernel_works("onednn"):
        dynamic += TOWER  # with 8 bits one digit is accurate enough for it
    return {
        name: "int8-dynamic" if form == "int8" and name.startswith(dynamic) else form
        for name, form in forms.items()
    }


def packed_layers(model: LLaVA, pack: Collection[torch.dtype]) -> set[str]:
    """The linear layers whose weights pay packed on a CPU, if the arithmetic is one of `pack`.

    bfloat16: all. float32: large ones of the decoder, which new tokens multiply by few rows. MKL,
    which multiplies the others, starts sooner, and on some CPUs it is faster for many rows.
    """
    if model.dtype not in pack or not can_pack(model.dtype):
        return set()
    layers = linear_layers(model)
    if model.dtype == torch.bfloat16:
        return set(layers)
    return {
        name
        for name, layer in layers.items()
        if name.startswith(DECODER) and layer.in_features * layer.out_features >= LARGE
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
    pack: Collection[torch.dtype] = PACKABLE,
) -> None:
    """Give a model on the meta device its weights, reading and converting one at a time.

    found: our name -> tensor in a file, for all weights. storage: dtype that linear and embedding
    weights are held in; all others are held in the dtype of the arithmetic. forms: the quantised
    layers, see choose_forms. progress: a bar on stderr. pack: the dtypes of arithmetic in which a
    CPU holds weights packed (PackedLinear), which neither torch's inductor nor processes that share
    a decoder can use.
    Raises ValueError for values that the dtype or the integers cannot represent.
    """
    found = read_small(found)
    model.requires_grad_(False).eval()
    model.dtype = choose_arithmetic(device, storage, forms)
    converted = set(forms) | (packed_layers(model, pack) if device.type == "cpu" else set())
    if model.dtype != storage:
        converted |= set(linear_layers(model))
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
            model.set_submodule(layer, choose_linear(weight, bias, digits, model.dtype))
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
    if isinstance(tensor, JoinedWeight):
        return tensor.read_weight(device)
    if tensor.kind == "I8":
        return Int8(
            tensor.read(device, torch.int8), found[f"{name}_scale"].read(device, torch.float32)
        )
    if tensor.kind == "U8":
        dtypes = {"step": torch.uint8, "low": torch.int8, "scale": torch.float32}
        parts = [found[f"{name}_{part}"].read(device, dtype) for part, dtype in dtypes.items()]
        return Int4(tensor.read(device, torch.uint8), *parts)
    return quantise_tensor(tensor, device, form)


def quantise_tensor(tensor: StoredTensor, device: torch.device, form: str) -> Int8 | Int4 | Nf4:
    """Quantise a weight that a file has as floats, in the file's dtype.

    Raises ValueError for NaN and infinity, which integers cannot represent.
    """
    weight = tensor.read(device, FLOATS[tensor.kind])
    stored: Int8 | Int4 | Nf4
    # NaN and infinity make the scale of their group not finite, or the mean of nf4's.
    if form == "nf4":
        stored = to_nf4(weight)
        scales = absmax_of(stored)
    else:
        stored = Int4(*to_int4(weight)) if form == "int4" else Int8(*to_int8(weight))
        scales = stored.scale
    if not scales.isfinite().all():
        raise ValueError(
            f"{tensor.file}: {tensor.name} has values that are not finite or too large, which "
            f"{form} cannot represent; download the checkpoint again"
        )
    return stored


def _read_floats(tensor: StoredTensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Raises ValueError for values that are too large for float16."""
    value = tensor.read(device, dtype)
    if dtype == torch.float16 and tensor.kind != "F16" and not value.isfinite().all():
        raise ValueError(
            f"{tensor.file}: {tensor.name} has values that float16 cannot represent (at most "
            "65504); use dtype bfloat16 or float32"
        )
    return value
