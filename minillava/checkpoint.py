"""A checkpoint's folder or hub id -> model and processor.

The model is built without memory, the headers of the files are compared with it as a whole, and
then each tensor is put in its place, one at a time: the peak is the weights plus one tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .config import Config
from .hub import find
from .linear import store_small, stored_names
from .llava import LLaVA
from .names import our_name, published_name
from .processor import Processor
from .shards import FLOATS, Stored, stored_tensors

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

_TIED = ("llama.embed_tokens.weight", "llama.lm_head.weight")  # one tensor in some models
_CPU = torch.device("cpu")
_LISTED = 10  # names of each kind in an error


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    revision: str | None = None,
) -> tuple[LLaVA, Processor]:
    """Read a LLaVA-1.5 checkpoint in the llava-hf layout.

    path_or_hub_id: a folder, or org/name on the Hugging Face hub, there at `revision`. device: cpu,
    cuda or cuda:N. dtype: float32, float16 or bfloat16, torch's or by name; None is float32 on a
    CPU and the files' own on CUDA. On a CPU it is that of storage only, arithmetic stays float32.
    Every failure is a ValueError of one line with the value, what was allowed and what to do.
    """
    if quantize is not None:
        raise ValueError(
            f"quantize={quantize!r}: quantised weights (int8, int8-dynamic, int4) are not in this "
            "version; leave quantize out, and use dtype='float16' to save memory"
        )
    place, storage = _device(device), _dtype(dtype)
    folder = find(path_or_hub_id, revision)
    config = Config.from_file(folder / "config.json")
    processor = Processor.from_folder(folder, config)
    stored = stored_tensors(folder)
    with torch.device("meta"), _NoInitialValues():  # shapes without memory
        model = LLaVA(config)
    found = match(model, stored, folder)
    if storage is None:
        storage = torch.float32 if place == _CPU else widest(found.values())
    fill(model, found, place, storage)
    model.decode_text = processor.decode
    return model, processor


def match(model: LLaVA, stored: Iterable[Stored], folder: Path) -> dict[str, Stored]:
    """Which stored tensor belongs to which parameter: our name -> tensor, for all of them.

    Raises one ValueError that lists every tensor that is missing, unknown or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, Stored] = {}
    unknown, unfit = [], []
    for tensor in stored:
        try:
            name = our_name(tensor.name)
        except KeyError:
            unknown.append(tensor.name)
            continue
        if name is None:
            continue
        if name not in shapes:
            unknown.append(tensor.name)
        elif name in found:
            unknown.append(f"{tensor.name} (beside {found[name].name})")
        elif tensor.shape != shapes[name]:
            unfit.append(f"{tensor.name} {tensor.shape} for {shapes[name]}")
        elif tensor.kind not in FLOATS:
            unfit.append(f"{tensor.name} {tensor.kind} for {' or '.join(FLOATS)}")
        found[name] = tensor

    twins = set(_TIED) if model.config.text.tie_word_embeddings else set()
    enough = twins if twins & found.keys() else set()  # one of the two will do
    missing = [published_name(n) for n in shapes if n not in found and n not in enough]
    if missing or unknown or unfit:
        lists = {"missing": missing, "unknown": unknown, "of another shape or type": unfit}
        wrong = "; ".join(f"{len(n)} {kind}: {_some(n)}" for kind, n in lists.items() if n)
        raise ValueError(
            f"the tensors in {folder} are not those that its config.json describes ({wrong}); "
            "fetch the checkpoint again, or correct config.json"
        )
    return found


def fill(
    model: LLaVA, found: Mapping[str, Stored], device: torch.device, storage: torch.dtype
) -> None:
    """Give a model on the meta device its weights, read and converted one at a time.

    `storage` is the dtype of the large ones; the others are held as they are computed with.
    """
    model.requires_grad_(False).eval()
    model.dtype = torch.float32 if device == _CPU else storage  # no fast 16-bit arithmetic there
    if model.dtype != storage:
        with _NoInitialValues():
            store_small(model)
    large = stored_names(model)
    state = {
        name: nn.Parameter(tensor.read(device, storage if name in large else model.dtype))
        for name, tensor in found.items()
    }
    if model.config.text.tie_word_embeddings:
        weights = [state[name] for name in _TIED if name in state]
        if not torch.equal(weights[0], weights[-1]):
            raise ValueError(
                f"{found[_TIED[1]].file}: tie_word_embeddings is true, but the output head and the "
                "embedding differ; set it to false in config.json, if the two are meant to"
            )
        state.update(dict.fromkeys(_TIED, weights[0]))  # one object: they stay tied
    model.load_state_dict(state, strict=True, assign=True)
    left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    assert not left, f"buffers without values: {left}"


def widest(stored: Iterable[Stored]) -> torch.dtype:
    """The dtype that holds all of them without loss."""
    return functools.reduce(torch.promote_types, (FLOATS[tensor.kind] for tensor in stored))


class _NoInitialValues(TorchFunctionMode):
    """Passes over torch.nn.init, which on the meta device costs seconds and changes nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _device(device: str | torch.device) -> torch.device:
    name = str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name!r}, but must be cpu, cuda or cuda:N; choose one of them")
    place = torch.device(name)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ValueError(f"device={name!r}, but torch sees {n} CUDA devices; use device='cpu'")
    return place


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    known = DTYPES | {str(value): value for value in DTYPES.values()}  # 'torch.float16' as well
    if str(dtype) not in known:
        raise ValueError(
            f"dtype={str(dtype)!r}, but must be {', '.join(DTYPES)} or None; choose one"
        )
    return known[str(dtype)]
