"""Load a checkpoint: folder or hub id -> model and processor.

The model is first built on the meta device, without memory. All its weights are then looked up in
the headers of the files, and only then read and assigned one at a time (assemble.py), so that the
peak of memory is the weights plus one tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ..config import Config
from ..llava import LLaVA
from ..processing.generation_rules import GenerationRules
from ..processing.processor import Processor
from ..processing.tokenizer import Tokenizer
from ..quant.cpu import multiplies_bfloat16
from ..quant.quantise import stored_parts
from .assemble import PACKABLE, TIED, choose_arithmetic, choose_forms, linear_layers, load_weights
from .bitsandbytes_layout import JoinedWeight, read_tensors
from .compiled import check_compilable, compile_decoding
from .config_file import read_config, read_generation_rules
from .error_text import cut, cut_path, shorten
from .hub import find_checkpoint
from .keys import our_name, published_name
from .native_decode import native_decoding
from .processor_files import read_processor
from .regular_files import is_present
from .tensor_files import FLOATS, StoredTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

QUANTIZE = ("int8", "int8-dynamic", "int4", "nf4")

ADAPTER = "adapter_config.json"  # with it, transformers (with peft) adds an adapter
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

_CPU = torch.device("cpu")
_LISTED = 10  # names that an error lists before it says how many more there are


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    progress: bool = False,
    mesh: DeviceMesh | None = None,
    compile: bool = False,
    pack: bool = False,
) -> tuple[LLaVA, Processor]:
    """Read a LLaVA-1.5 checkpoint in the llava-hf layout.

    path_or_hub_id: a folder, or a repository org/name on the Hugging Face hub. revision: a branch,
    tag or commit of that repository. device: cpu, cuda or cuda:N. dtype: float32, float16 or
    bfloat16, as a torch.dtype or by name; None means float32 on a CPU and the dtype of the files on
    CUDA; "auto" the fastest 16-bit dtype of the device. A CPU computes in float32 and only stores
    weights in this dtype, except for bfloat16 where it has instructions for that (AVX-512 BF16,
    AMX, Arm). quantize: int8, int8-dynamic (faster, less accurate, CPU only) or int4 for the
    decoder's blocks, or nf4, bitsandbytes' 4 bits; other weights keep the dtype of the files unless
    `dtype` is given. A checkpoint stored quantised needs no `quantize`. progress: show a bar on
    stderr, if that is a terminal. mesh: the processes that share the decoder; each calls load(),
    holds its part, and takes part in every generation (README.md in this folder). compile: prepare
    decoding with torch.compile (CPU; unquantised weights in the dtype of the arithmetic) or CUDA
    graphs, see compiled.py; the tokens are the same. pack: reorder the decoder's float32 weights
    for a CPU, as bfloat16 weights always are. New tokens are then faster, but these weights are no
    parameters and cannot be changed or trained. It has no effect with mesh or compile.

    Raises ValueError for every failure, in one line with the value, what is allowed and what to do.
    """
    target = find_device(device)
    storage = _parse_dtype(dtype, target)
    if quantize not in (None, *QUANTIZE):
        allowed = ", ".join(QUANTIZE)
        raise ValueError(f"quantize={shorten(quantize)}, but must be {allowed}; choose one")
    if quantize == "int8-dynamic" and target != _CPU:
        raise ValueError("quantize='int8-dynamic' is for CPUs only; on CUDA use 'int8'")
    if mesh is not None and quantize is not None:  # before anything is downloaded
        _refuse_to_share({"all": quantize})
    if mesh is not None and compile:
        raise ValueError("compile=True is for one process; leave it out, or start one without mesh")
    folder = find_checkpoint(path_or_hub_id, revision)
    _refuse_other_weights(folder)
    config = read_config(folder / "config.json")
    rules = read_generation_rules(folder / "config.json", config)
    processor = read_processor(folder, config)
    stored = read_tensors(folder)
    config = untie_different_weights(config, stored)
    model, found = fit_model(config, stored, folder, processor.tokenizer, rules)
    forms = choose_forms(model, found, quantize, folder)
    if storage is None:
        # Scales of integer weights are always float32 and say nothing about the checkpoint.
        weights = [t for name, t in found.items() if not name.endswith("_scale")]
        storage = torch.float32 if target == _CPU and not forms else widest_dtype(weights)
    if mesh is not None:
        _refuse_to_share(forms, storage, choose_arithmetic(target, storage, forms))
        from .parallel import split_decoder  # takes a second

        found = split_decoder(model, found, mesh)
    if compile:
        check_compilable(target, storage, forms)
    packable = () if mesh is not None or compile else PACKABLE if pack else (torch.bfloat16,)
    load_weights(model, found, target, storage, forms, progress, packable)
    model.compiled = compile_decoding(model) if compile else native_decoding(model)
    return model, processor


def _refuse_other_weights(folder: Path) -> None:
    """Refuse weights that transformers would read, instead of the model's files or beside them."""
    shards = sorted(path.name for path in folder.iterdir() if _DISTRIBUTED.match(path.name))
    if shards:
        raise ValueError(
            f"{cut_path(folder)} contains {shards[0]}, a part of a distributed checkpoint, which "
            "load() does not read; save the whole model (save_pretrained), or remove them"
        )
    if is_present(folder / ADAPTER):
        raise ValueError(
            f"{cut_path(folder)} contains {ADAPTER}: an adapter belongs to its weights, and "
            "load() does not add it; merge it into the weights (merge_and_unload), or remove it"
        )


def fit_model(
    config: Config,
    stored: Collection[StoredTensor],
    folder: Path,
    tokenizer: Tokenizer | None = None,
    rules: GenerationRules | None = None,
) -> tuple[LLaVA, dict[str, StoredTensor]]:
    """A model on the meta device, and the stored tensor of each of its parameters: name -> tensor.

    Raises ValueError if the files do not contain the model that config.json describes.
    """
    check_sizes(config, stored, folder)
    model = empty_model(config, tokenizer, rules)
    return model, match_tensors(model, stored, folder)


def check_sizes(config: Config, stored: Collection[StoredTensor], folder: Path) -> None:
    """Refuse a config.json that describes a much larger model than the files contain.

    match_tensors compares every shape, but needs the model, and to build a million layers takes
    hours. Each layer has tensors of its own, and each size is that of some axis of a tensor.
    """
    # Two 4-bit codes share a byte, and a tensor without elements may claim any shape.
    most = 2 * max((n for t in stored if 0 not in t.shape for n in t.shape), default=0)
    text, vision = config.text, config.vision
    sizes = {
        "text_config.num_hidden_layers": (text.num_hidden_layers, len(stored)),
        "text_config.vocab_size": (text.vocab_size, most),
        "text_config.hidden_size": (text.hidden_size, most),
        "text_config.intermediate_size": (text.intermediate_size, most),
        "text_config.head_dim": (text.num_attention_heads * text.head_dim, most),
        "vision_config.num_hidden_layers": (vision.num_hidden_layers, len(stored)),
        "vision_config.hidden_size": (vision.hidden_size, most),
        "vision_config.intermediate_size": (vision.intermediate_size, most),
        "vision_config.image_size": (vision.num_patches, most),
        "vision_config.patch_size": (vision.patch_size, most),
    }
    for name, (size, bound) in sizes.items():
        if size > bound:
            raise ValueError(
                f"{cut_path(folder / 'config.json')}: {name} describes a model with {size}, "
                f"but the {len(stored)} tensors in the folder have place for at most {bound}; "
                "correct config.json, or download the checkpoint again"
            )


def untie_different_weights(config: Config, stored: Iterable[StoredTensor]) -> Config:
    """The config of a model whose files have an output head and another embedding.

    Then tie_word_embeddings is not followed, as in transformers: both are used as they are.
    """
    pair = [t for t in stored if _name_of(t) in TIED and t.kind in FLOATS]
    if not config.text.tie_word_embeddings or len(pair) != 2:
        return config
    embedding, head = (t.read(_CPU, FLOATS[t.kind]) for t in pair)
    if torch.equal(embedding, head):
        return config
    return replace(config, text=replace(config.text, tie_word_embeddings=False))


def _name_of(tensor: StoredTensor) -> str | None:
    """Our name of a stored tensor; None if it has none."""
    try:
        return our_name(tensor.name)
    except KeyError:
        return None


def empty_model(
    config: Config, tokenizer: Tokenizer | None = None, rules: GenerationRules | None = None
) -> LLaVA:
    """A model on the meta device: shapes without memory."""
    with torch.device("meta"), _NoInitialValues():
        return LLaVA(config, tokenizer=tokenizer, rules=rules)


def match_tensors(
    model: LLaVA, stored: Iterable[StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """Find the stored tensor of every parameter: our name -> tensor.

    The weight NAME of a linear layer may be stored as integers (see quant/quantise.py): as int8
    with NAME_scale beside it, or as two 4-bit codes per byte with NAME_step, NAME_low and
    NAME_scale. Or it is one of bitsandbytes' weights (bitsandbytes_layout.py).

    Raises ValueError if tensors are missing, unknown, or of another shape or dtype; it lists them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kinds: dict[str, Collection[str]] = dict.fromkeys(shapes, FLOATS)
    tied = set(TIED) if model.config.text.tie_word_embeddings else set()
    weights = {f"{name}.weight" for name in linear_layers(model)} - tied
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
        elif name in weights and isinstance(tensor, JoinedWeight):
            kinds[name] = (tensor.kind,)
        found[name] = tensor

    for name, tensor in found.items():
        if name not in shapes:
            unknown.append(tensor.name)
        elif tensor.shape != shapes[name]:
            unfit.append(f"{tensor.name} {tensor.shape} for {shapes[name]}")
        elif tensor.kind not in kinds[name]:
            unfit.append(f"{tensor.name} {tensor.kind} for {' or '.join(kinds[name])}")
    optional = tied if tied & found.keys() else set()  # one of the two is enough
    missing = [published_name(n) for n in shapes if n not in found and n not in optional]
    if missing or unknown or unfit:
        lists = {"missing": missing, "unknown": unknown, "of another shape or type": unfit}
        wrong = "; ".join(f"{len(n)} {kind}: {_shorten_list(n)}" for kind, n in lists.items() if n)
        raise ValueError(
            f"the tensors in {cut_path(folder)} are not those that its config.json describes "
            f"({wrong}); download the checkpoint again, or correct config.json"
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
    listed = names[:_LISTED]
    return ", ".join(cut(name, 480 // len(listed)) for name in listed) + more


def find_device(device: str | torch.device) -> torch.device:
    """Parse cpu, cuda or cuda:N. Raises ValueError for other devices and for missing ones."""
    name = str(device)
    match = re.fullmatch(r"cpu|cuda(?::(0|[1-9]\d{0,8}))?", name)
    if match is None:
        asked = shorten(name)
        raise ValueError(f"device={asked}, but must be cpu, cuda or cuda:N; choose one of them")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ValueError(f"device={name!r}, but torch sees {n} CUDA devices; use device='cpu'")
    return torch.device(name)


def _parse_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    if dtype is None:
        return None
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported if device.type == "cuda" else multiplies_bfloat16
        return torch.bfloat16 if native() else torch.float16
    known = DTYPES | {str(value): value for value in DTYPES.values()}  # also 'torch.float16'
    if str(dtype) not in known:
        raise ValueError(
            f"dtype={shorten(str(dtype))}, but must be {', '.join(DTYPES)}, auto or None; "
            "choose one"
        )
    return known[str(dtype)]


def _refuse_to_share(
    forms: Mapping[str, str],
    storage: torch.dtype | None = None,
    arithmetic: torch.dtype | None = None,
) -> None:
    """Refuse weights for several processes that are not held in the dtype of the arithmetic."""
    for form in forms.values():
        raise ValueError(
            f"weights quantised to {form} cannot be shared by several processes, only float32, "
            "bfloat16 and float16; take a checkpoint that is not quantised, without quantize, or "
            "start one process"
        )
    if storage != arithmetic:
        name, wide = (str(dtype).removeprefix("torch.") for dtype in (storage, arithmetic))
        raise ValueError(
            f"dtype={name} only says how this CPU stores weights, it computes in {wide}; several "
            f"processes share weights in the dtype of the arithmetic, so give dtype={wide}"
        )
