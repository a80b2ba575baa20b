"""Write the llava-hf layout from other layouts: `python -m weights.convert SRC DST`.

SRC is a LLaVA-1.5 checkpoint as its authors publish it (pickled or safetensors shards; the vision
tower inside, or a CLIP that `mm_vision_tower` names), or the mm_projector.bin of a pretraining
together with `--base`, the Llama it was trained for, or a llava-hf checkpoint that has only
pickles. No code in a pickle is run. Everything is checked before anything is written; what is
written is described in files.py: one tensor in memory, and an interrupted run goes on.

The decoder's weights keep their bits. A tower or projector from a file of its own is stored in the
decoder's dtype, as in the repositories of llava-hf. The original layout has no <image> and <pad>
tokens; they become the first ids behind the tokenizer's. Where the vocabulary has no rows for them
it grows to the next multiple of 64 (32,000 to 32,064, as on the hub). Each new row, of embedding
and of output head, is the mean of all others: no picture or text ever reads such an embedding, and
such a logit is the mean of the true ones, so it is never the largest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.app.command import CommandParser as Parser
from minillava.app.command import run_command as command
from minillava.loading.checkpoint import empty_model
from minillava.loading.checkpoint import match_tensors as match
from minillava.loading.config_file import parse_config as config_of
from minillava.loading.config_file import read_config
from minillava.loading.json_entries import Entries, read_json
from minillava.loading.keys import our_name, published_name
from minillava.loading.processor_files import read_processor
from minillava.loading.tensor_files import StoredTensor as Stored

from . import original
from .files import SHARD_BYTES, Planned, check_folder, refuse_inside, write_checkpoint
from .sources import DTYPES, Weight, shards_in, small_files, verify, weights_of
from .towers import Part, Tower, find_tower, inner_tower, place, read_tower

PROJECTOR = "mm_projector.bin"
ADAPTERS = ("adapter_model.bin", "adapter_model.safetensors", "non_lora_trainables.bin")

_INNER_TOWER = "model.vision_tower.vision_tower."
_EMBEDDING, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Conversion:
    """All that will be written: where each tensor is, and the contents of the small files.

    own: the files whose tensors keep their dtype; those of other files become `dtype`, the
    decoder's. rows: of embedding and head in the source; `size` in what is written.
    """

    parts: Mapping[str, Part]
    files: Mapping[str, bytes]
    own: frozenset[Path]
    dtype: torch.dtype
    rows: int
    size: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as it will be written."""
        shape = self.parts[name].shape
        grows = name in (_EMBEDDING, _HEAD) and shape[:1] == (self.rows,)
        return (self.size, *shape[1:]) if grows else shape


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m weights.convert",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of the checkpoint")
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to write, or to go on with")
    parser.add_argument(
        "--vision-tower", metavar="DIR|FILE|HUB_ID", help="CLIP instead of the one SRC has or names"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help=f"folder of the Llama for a SRC of {PROJECTOR}"
    )

    def run() -> None:
        args = parser.parse_args(argv)
        convert(args.src, args.dst, args.vision_tower, args.base)
        print(f"{args.dst} is complete: python -m minillava.generate --model {args.dst}")

    return command(run)


def convert(
    src: Path,
    dst: Path,
    vision_tower: str | None = None,
    base: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint in `src` into `dst` in the llava-hf layout; see the module.

    Raises ValueError, in one line, for every bad input. Nothing outside `dst` is changed.
    """
    for folder in (src, *([base] if base else [])):
        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {folder}; fetch a checkpoint with `python -m "
                "weights.download liuhaotian/llava-v1.5-7b` and give the folder that it prints"
            )
        refuse_inside(dst, folder)
    found = plan(src, vision_tower, base)
    sources = sorted({part.weight.file for part in found.parts.values()})
    if inside := [f for f in sources if os.path.realpath(dst) == os.path.realpath(f.parent)]:
        raise ValueError(f"{dst} holds {inside[0].name}, which is only read; give another folder")
    tensors = [_planned(name, found) for name in found.parts]
    check_folder(dst, tensors, found.files, shard_bytes)
    digests = verify([*sources, *small_files(src), *(small_files(base) if base else [])])
    origin = [
        (name, part.weight.name, part.first, digests[part.weight.file])
        for name, part in found.parts.items()
    ]
    write_checkpoint(dst, tensors, found.files, repr(origin), shard_bytes)


def plan(src: Path, vision_tower: str | None = None, base: Path | None = None) -> Conversion:
    """What is to be written, from headers and small files alone: here all bad input is found."""
    for adapter in ADAPTERS:
        if (src / adapter).exists():
            raise ValueError(
                f"{src} holds LoRA adapters ({adapter}), which are changes to a model; merge them "
                "into their model first, as scripts/merge_lora_weights.py of LLaVA does"
            )
    values = read_json(src / "config.json")
    if not any(key.startswith("mm_") for key in values):
        return _pickled_hub(src, values)

    language, files = src, shards_in(src)
    if files and base is not None:
        raise ValueError(f"{src} has a language model itself ({files[0].name}); leave --base out")
    if not files:
        language, files = _base(src, base)
        values = _with_base(values, language)
    entries = Entries(str(src / "config.json"), "", values)
    original.check(entries)
    weights = [weight for file in files for weight in weights_of(file)]
    if language != src:
        weights += weights_of(src / PROJECTOR)

    inner: list[tuple[str, Weight]] = []
    parts: dict[str, Part] = {}
    for weight in weights:
        if weight.name.startswith(_INNER_TOWER):
            inner.append((weight.name.removeprefix(_INNER_TOWER), weight))
        elif name := original.hub_name(weight.name):
            place(parts, name, Part(weight, weight.shape))
    tower = _tower(entries, vision_tower, inner, src)
    for name, part in tower.parts.items():
        place(parts, name, part)
    rows = entries.integer("vocab_size", 32000)
    vocabulary = original.Vocabulary.of(language, rows)
    dtype = _dtype(parts, src)
    generation = language / "generation_config.json"
    config = original.hub_config(
        values,
        read_json(generation) if generation.is_file() else {},
        tower.config,
        vocabulary,
        dtype,
    )
    found = Conversion(
        parts,
        original.small_files(config, language, vocabulary, tower.image),
        frozenset(files),
        dtype,
        rows,
        vocabulary.size,
    )
    _check(found, config, src)
    return found


# ---------------------------------------------------------------- what a source is made of


def _pickled_hub(src: Path, values: Mapping[str, Any]) -> Conversion:
    """A llava-hf checkpoint as it is, if its weights are pickles."""
    if "text_config" not in values and values.get("model_type") != "llava":
        raise ValueError(
            f"{src / 'config.json'} describes no LLaVA, as it has no entry that begins with mm_; "
            "give a LLaVA-1.5 checkpoint (a language model goes into --base)"
        )
    files = shards_in(src)
    if not files or files[0].suffix == ".safetensors":
        raise ValueError(
            f"{src} is in the llava-hf layout already, nothing is to be converted; load it as it "
            f"is: python -m minillava.generate --model {src}"
        )
    parts: dict[str, Part] = {}
    for weight in (weight for file in files for weight in weights_of(file)):
        try:
            ours = our_name(weight.name)
            name = ours and published_name(ours)
        except KeyError:
            name = weight.name  # for the error about it
        if name is not None:
            place(parts, name, Part(weight, weight.shape))
    small = {path.name: path.read_bytes() for path in small_files(src)}
    found = Conversion(parts, small, frozenset(files), _dtype(parts, src), 0, 0)
    read_processor(src, read_config(src / "config.json"))
    _check(found, values, src)
    return found


def _base(src: Path, base: Path | None) -> tuple[Path, list[Path]]:
    if not (src / PROJECTOR).is_file():
        raise ValueError(
            f"{src} has no weights: neither pytorch_model.bin or model.safetensors, nor their "
            f"index, nor {PROJECTOR}; fetch the checkpoint again"
        )
    if base is None:
        raise ValueError(
            f"{src} has only a projector ({PROJECTOR}); give the language model that it was "
            "trained for, a folder with a Llama such as Vicuna 1.5, with --base"
        )
    if not (files := shards_in(base)):
        raise ValueError(f"{base} has no weights of a language model; fetch it again")
    return base, files


def _with_base(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The base's config with what that of a projector says of pictures."""
    language = read_json(base / "config.json")
    if language.get("model_type") != "llama" or any(key.startswith("mm_") for key in language):
        raise ValueError(
            f"{base / 'config.json'}: model_type is {language.get('model_type')!r}, but --base "
            "must be a plain 'llama', such as Vicuna 1.5; give the folder of one"
        )
    return language | {k: v for k, v in values.items() if k.startswith(("mm_", "image_"))}


def _tower(
    entries: Entries, given: str | None, inner: list[tuple[str, Weight]], src: Path
) -> Tower:
    named = entries.values.get("mm_vision_tower")
    if given is not None:
        return read_tower(find_tower(given))
    if inner:
        return inner_tower(inner, str(named or ""), src)
    if entries.values.get("unfreeze_mm_vision_tower"):
        raise ValueError(
            f"{entries.where('unfreeze_mm_vision_tower')} is true, so the vision tower was trained "
            "too, but its weights are not in the files; give that tower with --vision-tower"
        )
    if not isinstance(named, str):
        raise entries.error(
            "mm_vision_tower", named, "a CLIP's hub id or folder", "give it with --vision-tower"
        )
    return read_tower(find_tower(named, src))


def _dtype(parts: Mapping[str, Part], src: Path) -> torch.dtype:
    part = parts.get(_EMBEDDING) or parts.get(_HEAD)
    if part is None or part.weight.kind not in DTYPES:
        what = "nowhere" if part is None else f"stored as {part.weight.kind}"
        raise ValueError(
            f"{src}: the embedding of tokens (model.embed_tokens.weight) is {what}, but must be "
            f"there as {' or '.join(DTYPES)}; fetch the unquantised checkpoint again"
        )
    return DTYPES[part.weight.kind]


def _check(found: Conversion, config: Mapping[str, Any], src: Path) -> None:
    """Raises ValueError for a config, names and shapes that `minillava.load` would refuse."""
    model = empty_model(config_of(config, {}, str(src / "config.json")))
    match(
        model,
        [
            Stored(part.weight.file, name, found.shape(name), part.weight.kind)
            for name, part in found.parts.items()
        ],
        src,
    )


# ---------------------------------------------------------------- tensors


def _planned(name: str, found: Conversion) -> Planned:
    part, shape = found.parts[name], found.shape(name)
    stored = DTYPES[part.weight.kind]
    dtype = stored if part.weight.file in found.own else found.dtype

    def read() -> Tensor:
        whole = part.weight.read(_CPU, stored)
        tensor = whole[part.first : part.first + part.shape[0]] if part.shape else whole
        tensor = _as(tensor, dtype, f"{part.weight.file}: {part.weight.name}")
        return tensor if tensor.shape == shape else _grown(tensor, shape[0])

    return Planned(name, shape, dtype, read)


def _as(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    result = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(
            f"{where} has values too large for {dtype}, the dtype of the language model; give a "
            "checkpoint whose parts belong together"
        )
    return result


def _grown(rows: Tensor, size: int) -> Tensor:
    """Rows (V, D) and behind them their mean, up to `size`."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for some in rows.split(1024):
        total += some.double().sum(0)
    mean = (total / len(rows)).to(rows.dtype)
    return torch.cat((rows, mean.expand(size - len(rows), -1)))


if __name__ == "__main__":
    sys.exit(main())
