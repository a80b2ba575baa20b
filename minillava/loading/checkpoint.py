"""Load a checkpoint: folder or hub id -> model and processor.

The model is first built on the meta device, without memory. All its weights are then looked up in
the headers of the files, and only then read and assigned one at a time (assemble.py), so that the
peak of memory is the weights plus one tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..config import Config
from ..llava import LLaVA
from ..processing.processor import Processor
from ..processing.tokenizer import Tokenizer
from ..quant.quantise import stored_parts
from .assemble import TIED, choose_forms, linear_layers, load_weights
from .config_file import read_config
from .hub import find_checkpoint
from .keys import our_name, published_name
from .processor_files import read_processor
from .tensor_files import FLOATS, StoredTensor, read_headers

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

QUANTIZE = ("int8", "int8-dynamic", "int4")

_CPU = torch.device("cpu")
_LISTED = 10  # names that an error lists before it says how many more there are


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> tuple[LLaVA, Processor]:
    """Read a LLaVA-1.5 checkpoint in the llava-hf layout.

    path_or_hub_id: a folder, or a repository org/name on the Hugging Face hub. revision: a branch,
    tag or commit of that repository. device: cpu, cuda or cuda:N. dtype: float32, float16 or
    bfloat16, as a torch.dtype or by name; None means float32 on a CPU and the dtype of the files on
    CUDA. On a CPU it only affects how weights are stored; arithmetic is always float32. quantize:
    int8, int8-dynamic (faster and less accurate, CPU only) or int4 for the weights of the decoder's
    blocks; the other weights are then stored in the dtype of the files unless `dtype` is given. A
    checkpoint that is already quantised needs no `quantize`. progress: show a bar on stderr if that
    is a terminal.

    Raises ValueError for every failure, in one line with the value, what is allowed and what to do.
    """
    target, storage = find_device(device), _parse_dtype(dtype)
    if quantize not in (None, *QUANTIZE):
        raise ValueError(f"quantize={quantize!r}, but must be {', '.join(QUANTIZE)}; choose one")
    if quantize == "int8-dynamic" and target != _CPU:
        raise ValueError("quantize='int8-dynamic' is for CPUs only; on CUDA use 'int8'")
    folder = find_checkpoint(path_or_hub_id, revision)
    config = read_config(folder / "config.json")
    processor = read_processor(folder, config)
    stored = read_headers(folder)
    model = empty_model(config, processor.tokenizer)
    found = match_tensors(model, stored, folder)
    forms = choose_forms(model, found, quantize, folder)
    if storage is None:
        # Scales of integer weights are always float32 and say nothing about the checkpoint.
        weights = [t for name, t in found.items() if not name.endswith(("_scale", "_low"))]
        storage = torch.float32 if target == _CPU and not forms else widest_dtype(weights)
    load_weights(model, found, target, storage, forms, progress)
    return model, processor


def empty_model(config: Config, tokenizer: Tokenizer | None = None) -> LLaVA:
    """A model on the meta device: shapes without memory."""
    with torch.device("meta"), _NoInitialValues():
        return LLaVA(config, tokenizer=tokenizer)


def match_tensors(
    model: LLaVA, stored: Iterable[StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """Find the stored tensor of every parameter: our name -> tensor.

    The weight NAME of a linear layer may be stored as integers (see quant/quantise.py): as int8
    with NAME_scale beside it, or as two 4-bit codes per byte with NAME_scale and NAME_low.

    Raises ValueError if tensors are missing, unknown, or of another shape or dtype; it lists them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kinds: dict[str, Collection[str]] = dict.fromkeys(shapes, FLOATS)
    weights = {f"{name}.weight" for name in linear_layers(model)}
    found: dict[str, StoredTensor] = {}
    unknown, unfit = [], []
    for tensor in stored:
        try:
            name = our_name(tensor.name)
        except KeyError:
            unknown.append(tensor.name)
            continue
        if name is None:
            continue
        if name in found:
            unknown.append(f"{tensor.name} (beside {found[name].name})")
        elif name in weights and tensor.kind in ("I8", "U8"):
            for part, shape, kind in stored_parts(shapes[name], 8 if tensor.kind == "I8" else 4):
                shapes[name + part], kinds[name + part] = shape, (kind,)
        found[name] = tensor

    for name, tensor in found.items():
        if name not in shapes:
            unknown.append(tensor.name)
        elif tensor.shape != shapes[name]:
            unfit.append(f"{tensor.name} {tensor.shape} for {shapes[name]}")
        elif tensor.kind not in kinds[name]:
            unfit.append(f"{tensor.name} {tensor.kind} for {' or '.join(kinds[name])}")
    tied = set(TIED) if model.config.text.tie_word_embeddings else set()
    optional = tied if tied & found.keys() else set()  # one of the two is enough
    missing = [published_name(n) for n in shapes if n not in found and n not in optional]
    if missing or unknown or unfit:
        lists = {"missing": missing, "unknown": unknown, "of another shape or type": unfit}
        wrong = "; ".join(f"{len(n)} {kind}: {_shorten_list(n)}" for kind, n in lists.items() if n)
        raise ValueError(
            f"the tensors in {folder} are not those that its config.json describes ({wrong}); "
            "download the checkpoint again, or correct config.json"
        )
    return found


def widest_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that represents all floating-point tensors among them without loss."""
    floats = (FLOATS[tensor.kind] for tensor in stored if tensor.kind in FLOATS)
    return functools.reduce(torch.promote_types, floats)


class _NoInitialValues(TorchFunctionMode):
    """Skips torch.nn.init, which on the meta device takes seconds and changes nothing."""

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


def _shorten_list(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def find_device(device: str | torch.device) -> torch.device:
    """Parse cpu, cuda or cuda:N. Raises ValueError for other devices and for missing ones."""
    name = str(device)
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):  # torch has at most 128
        raise ValueError(f"device={name!r}, but must be cpu, cuda or cuda:N; choose one of them")
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ValueError(f"device={name!r}, but torch sees {n} CUDA devices; use device='cpu'")
    return found


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    known = DTYPES | {str(value): value for value in DTYPES.values()}  # also 'torch.float16'
    if str(dtype) not in known:
        raise ValueError(
            f"dtype={str(dtype)!r}, but must be {', '.join(DTYPES)} or None; choose one"
        )
    return known[str(dtype)]
