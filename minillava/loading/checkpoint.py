"""A checkpoint's folder or hub id -> model and processor.

The model is built without memory, the headers of the files are compared with it as a whole, and
then each tensor is put in its place, one at a time (fill.py): the peak is the weights plus one.
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
from ..processor import Processor
from ..quant.quantise import stored_parts
from ..tokenizer import Tokenizer
from .assemble import TIED, fill, forms_of, linear_layers
from .config_file import read_config
from .hub import find
from .keys import our_name, published_name
from .processor_files import read_processor
from .tensor_files import FLOATS, Stored, stored_tensors

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
_LISTED = 10  # names of each kind in an error


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> tuple[LLaVA, Processor]:
    """Read a LLaVA-1.5 checkpoint in the llava-hf layout.

    path_or_hub_id: a folder, or org/name on the Hugging Face hub, there at `revision`. device: cpu,
    cuda or cuda:N. dtype: float32, float16 or bfloat16, torch's or by name; None is float32 on a
    CPU and the files' own on CUDA. On a CPU it is that of storage only, arithmetic stays float32.
    quantize: int8, int8-dynamic (faster, less accurate, CPU only) or int4 for the weights of the
    decoder's blocks; the others are then held in the files' own dtype, if dtype does not say
    otherwise. A checkpoint that is stored quantised is loaded as it is. progress: a bar on stderr,
    if that is a terminal.
    Every failure is a ValueError of one line with the value, what was allowed and what to do.
    """
    place, storage = find_device(device), _dtype(dtype)
    if quantize not in (None, *QUANTIZE):
        raise ValueError(f"quantize={quantize!r}, but must be {', '.join(QUANTIZE)}; choose one")
    if quantize == "int8-dynamic" and place != _CPU:
        raise ValueError("quantize='int8-dynamic' is arithmetic for CPUs; on CUDA use 'int8'")
    folder = find(path_or_hub_id, revision)
    config = read_config(folder / "config.json")
    processor = read_processor(folder, config)
    stored = stored_tensors(folder)
    model = empty_model(config, processor.tokenizer)
    found = match(model, stored, folder)
    forms = forms_of(model, found, quantize, folder)
    if storage is None:
        # the scales of integer weights are float32 whatever the checkpoint is
        own = [t for name, t in found.items() if not name.endswith(("_scale", "_low"))]
        storage = torch.float32 if place == _CPU and not forms else widest(own)
    fill(model, found, place, storage, forms, progress)
    return model, processor


def empty_model(config: Config, tokenizer: Tokenizer | None = None) -> LLaVA:
    """A model whose tensors have shapes but no memory."""
    with torch.device("meta"), _NoInitialValues():
        return LLaVA(config, tokenizer=tokenizer)


def match(model: LLaVA, stored: Iterable[Stored], folder: Path) -> dict[str, Stored]:
    """Which stored tensor belongs to which parameter: our name -> tensor, for all of them.

    The weight of a linear layer may be there as integers (see quantise.py): int8 with NAME_scale
    beside it, or two 4-bit codes in a byte with NAME_scale and NAME_low.
    Raises one ValueError that lists every tensor that is missing, unknown or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kinds: dict[str, Collection[str]] = dict.fromkeys(shapes, FLOATS)
    weights = {f"{name}.weight" for name in linear_layers(model)}
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
    twins = set(TIED) if model.config.text.tie_word_embeddings else set()
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


def widest(stored: Iterable[Stored]) -> torch.dtype:
    """The dtype that holds all floats among them without loss."""
    floats = (FLOATS[tensor.kind] for tensor in stored if tensor.kind in FLOATS)
    return functools.reduce(torch.promote_types, floats)


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


def find_device(device: str | torch.device) -> torch.device:
    """cpu, cuda or cuda:N, if it is there (ValueError)."""
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
