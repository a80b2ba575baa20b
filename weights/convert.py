"""Convert other layouts to the llava-hf layout: `python -m weights.convert SRC DST`.

SRC is one of

- a LLaVA-1.5 checkpoint in the original layout, in pickled or safetensors shards. The vision tower
  is inside, or it is the CLIP that `mm_vision_tower` names.
- the mm_projector.bin of a pretraining, with `--base`: the Llama that it was trained for.
- a llava-hf checkpoint that has only pickles.

No code in a pickle is run. All input is checked before anything is written. One tensor is in memory
at a time, and an interrupted run resumes (see files.py).

The decoder's weights keep their bits. A vision tower or projector from a separate file is stored in
the decoder's dtype, as in the llava-hf repositories. The original layout has no <image> and <pad>
tokens; they get the first two ids after the tokenizer's. If the embedding has no rows for them, the
vocabulary grows to the next multiple of 64 (32,000 to 32,064, as on the hub). Each new row of the
embedding and the output head is the mean of the existing rows. The embedding rows are never read,
and the logit of a new row is the mean of the existing logits, so it is never the largest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.app.command import CommandParser, end_program, parse_path, run_command
from minillava.loading.checkpoint import fit_model
from minillava.loading.config_file import parse_config as config_of
from minillava.loading.config_file import read_config
from minillava.loading.json_entries import Entries, read_json
from minillava.loading.keys import our_name, published_name
from minillava.loading.processor_files import read_processor
from minillava.loading.tensor_files import StoredTensor as Stored

from . import original
from .files import (
    SHARD_BYTES,
    Planned,
    check_folder,
    command_to_ask,
    refuse_inside,
    write_checkpoint,
)
from .sources import DTYPES, Weight, shards_in, small_files, verify, weights_of
from .towers import Part, Tower, add_part, find_tower, inner_tower, read_tower

PROJECTOR = "mm_projector.bin"
ADAPTERS = ("adapter_model.bin", "adapter_model.safetensors", "non_lora_trainables.bin")

_INNER_TOWER = "model.vision_tower.vision_tower."
_EMBEDDING, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Conversion:
    """Everything that will be written."""

    parts: Mapping[str, Part]  # name in DST -> source of the tensor
    files: Mapping[str, bytes]  # name -> content of the small files
    decoder_files: frozenset[Path]  # their tensors keep their dtype
    dtype: torch.dtype  # the decoder's, to which tensors of all other files are converted
    rows: int  # of embedding and output head in the source
    size: int  # of the vocabulary in DST: at least `rows`

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as it will be written."""
        shape = self.parts[name].shape
        grows = name in (_EMBEDDING, _HEAD) and shape[:1] == (self.rows,)
        return (self.size, *shape[1:]) if grows else shape


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m weights.convert",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("src", type=parse_path, metavar="SRC", help="folder of the checkpoint")
    parser.add_argument("dst", type=parse_path, metavar="DST", help="folder to write or resume")
    parser.add_argument(
        "--vision-tower", metavar="DIR|FILE|HUB_ID", help="use this CLIP, not the one in SRC"
    )
    parser.add_argument(
        "--base",
        type=parse_path,
        metavar="DIR",
        help=f"the Llama's folder if SRC has only {PROJECTOR}",
    )

    def run() -> None:
        args = parser.parse_args(argv)
        convert(args.src, args.dst, args.vision_tower, args.base)
        print(f"{args.dst} is complete: {command_to_ask(args.dst)}")

    return run_command(run)


def convert(
    src: Path,
    dst: Path,
    vision_tower: str | None = None,
    base: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint in `src` to `dst` in the llava-hf layout.

    Raises ValueError for every invalid input. Nothing outside `dst` is changed.
    """
    for folder in (src, *([base] if base else [])):
        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {folder}; download a checkpoint with `python -m "
                "weights.download liuhaotian/llava-v1.5-7b` and give the folder that it prints"
            )
        refuse_inside(dst, folder)
    found = plan(src, vision_tower, base)
    sources = sorted({part.weight.file for part in found.parts.values()})
    if inside := [f for f in sources if os.path.realpath(dst) == os.path.realpath(f.parent)]:
        raise ValueError(f"{dst} contains the source {inside[0].name}; give another folder")
    tensors = [_planned_tensor(name, found) for name in found.parts]
    check_folder(dst, tensors, found.files, shard_bytes)
    digests = verify([*sources, *small_files(src), *(small_files(base) if base else [])])
    origin = [
        (name, part.weight.name, part.first, digests[part.weight.file])
        for name, part in found.parts.items()
    ]
    write_checkpoint(dst, tensors, found.files, repr(origin), shard_bytes)


def plan(src: Path, vision_tower: str | None = None, base: Path | None = None) -> Conversion:
    """Plan a conversion from headers and small files alone.

    Raises ValueError for every invalid input except damaged tensor data.
    """
    for adapter in ADAPTERS:
        if (src / adapter).exists():
            raise ValueError(
                f"{src} contains LoRA adapters ({adapter}), not a whole model; merge them into "
                "their model first, for example with LLaVA's scripts/merge_lora_weights.py"
            )
    values = read_json(src / "config.json")
    if not any(key.startswith("mm_") for key in values):
        return _plan_pickled_hub(src, values)
    return _plan_original(src, values, vision_tower, base)


# ---------------------------------------------------------------- parts of a source


def _plan_original(
    src: Path, values: Mapping[str, Any], vision_tower: str | None, base: Path | None
) -> Conversion:
    """Plan for the original layout, whose config.json has the entries `values`."""
    language, files = src, shards_in(src)
    if files and base is not None:
        raise ValueError(f"{src} contains a language model ({files[0].name}); leave out --base")
    if not files:
        language, files = _find_base(src, base)
        values = _merge_base_config(values, language)
    entries = Entries(str(src / "config.json"), "", values)
    original.check(entries)
    weights = [weight for file in files for weight in weights_of(file)]
    if language != src:
        weights += weights_of(src / PROJECTOR)

    parts, inner = _translate(weights)
    tower = _choose_tower(entries, vision_tower, inner, src)
    for name, part in tower.parts.items():
        add_part(parts, name, part)
    rows = entries.integer("vocab_size", 32000)
    vocabulary = original.Vocabulary.of(language, rows)
    dtype = _decoder_dtype(parts, src)
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


def _translate(
    weights: Iterable[Weight],
) -> tuple[dict[str, Part], list[tuple[str, Weight]]]:
    """Decoder and projector by their llava-hf names; the tower inside by its names in a CLIP."""
    parts: dict[str, Part] = {}
    inner: list[tuple[str, Weight]] = []
    for weight in weights:
        if weight.name.startswith(_INNER_TOWER):
            inner.append((weight.name.removeprefix(_INNER_TOWER), weight))
        elif name := original.hub_name(weight.name):
            add_part(parts, name, Part(weight, weight.shape))
    return parts, inner


def _plan_pickled_hub(src: Path, values: Mapping[str, Any]) -> Conversion:
    """Plan for a llava-hf checkpoint in pickles: same names and values, as safetensors."""
    if "text_config" not in values and values.get("model_type") != "llava":
        raise ValueError(
            f"{src / 'config.json'} describes no LLaVA, as no entry begins with mm_; "
            "give a LLaVA-1.5 checkpoint as SRC (and a language model as --base)"
        )
    files = shards_in(src)
    if not files or files[0].suffix == ".safetensors":
        raise ValueError(
            f"{src} is in the llava-hf layout already and needs no conversion; load it as it is: "
            f"python -m minillava.generate --model {src}"
        )
    parts: dict[str, Part] = {}
    for weight in (weight for file in files for weight in weights_of(file)):
        try:
            ours = our_name(weight.name)
            name = ours and published_name(ours)
        except KeyError:
            name = weight.name  # unknown: `_check` lists it in its error
        if name is not None:
            add_part(parts, name, Part(weight, weight.shape))
    small = {path.name: path.read_bytes() for path in small_files(src)}
    found = Conversion(parts, small, frozenset(files), _decoder_dtype(parts, src), 0, 0)
    read_processor(src, read_config(src / "config.json"))
    _check(found, values, src)
    return found


def _find_base(src: Path, base: Path | None) -> tuple[Path, list[Path]]:
    """The language model's folder and weight files for a `src` that has only a projector."""
    if not (src / PROJECTOR).is_file():
        raise ValueError(
            f"{src} has no weights: neither pytorch_model.bin nor model.safetensors nor their "
            f"index nor {PROJECTOR}; download the checkpoint again"
        )
    if base is None:
        raise ValueError(
            f"{src} has only a projector ({PROJECTOR}); give the folder of the language model "
            "that it was trained for, such as Vicuna 1.5, with --base"
        )
    if not (files := shards_in(base)):
        raise ValueError(f"{base} has no weights of a language model; download it again")
    return base, files


def _merge_base_config(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The config of `base`, updated with the projector's mm_* and image_* entries."""
    language = read_json(base / "config.json")
    if language.get("model_type") != "llama" or any(key.startswith("mm_") for key in language):
        raise ValueError(
            f"{base / 'config.json'}: model_type is {language.get('model_type')!r}, but --base "
            "must be a plain 'llama'; give the folder of one, such as Vicuna 1.5"
        )
    return language | {k: v for k, v in values.items() if k.startswith(("mm_", "image_"))}


def _choose_tower(
    entries: Entries, given: str | None, inner: list[tuple[str, Weight]], src: Path
) -> Tower:
    """The vision tower: the one `given` by the user, else the one inside, else the one named."""
    named = entries.values.get("mm_vision_tower")
    if given is not None:
        return read_tower(find_tower(given))
    if inner:
        return inner_tower(inner, str(named or ""), src)
    if entries.values.get("unfreeze_mm_vision_tower"):
        raise ValueError(
            f"{entries.where('unfreeze_mm_vision_tower')} is true, so the vision tower was trained "
            "too, but its weights are missing from the files; give them with --vision-tower"
        )
    if not isinstance(named, str):
        raise entries.error(
            "mm_vision_tower", named, "a CLIP's hub id or folder", "give it with --vision-tower"
        )
    return read_tower(find_tower(named, src))


def _decoder_dtype(parts: Mapping[str, Part], src: Path) -> torch.dtype:
    """The decoder's dtype: that of the token embedding, or of the output head without one."""
    part = parts.get(_EMBEDDING) or parts.get(_HEAD)
    if part is None or part.weight.kind not in DTYPES:
        what = "missing" if part is None else f"stored as {part.weight.kind}"
        raise ValueError(
            f"{src}: the token embedding (model.embed_tokens.weight) is {what}, but must be "
            f"stored as {' or '.join(DTYPES)}; download the unquantised checkpoint again"
        )
    return DTYPES[part.weight.kind]


def _check(found: Conversion, config: Mapping[str, Any], src: Path) -> None:
    """Raise ValueError for a config, names or shapes that `minillava.load` would refuse."""
    stored = [
        Stored(part.weight.file, name, found.shape(name), part.weight.kind)
        for name, part in found.parts.items()
    ]
    fit_model(config_of(config, {}, str(src / "config.json")), stored, src)


# ---------------------------------------------------------------- tensors


def _planned_tensor(name: str, found: Conversion) -> Planned:
    """One tensor to write, with the function that reads and converts it."""
    part, shape = found.parts[name], found.shape(name)
    stored = DTYPES[part.weight.kind]
    dtype = stored if part.weight.file in found.decoder_files else found.dtype

    def read() -> Tensor:
        tensor = part.weight.read(_CPU, stored)
        if part.shape:
            tensor = tensor[part.first : part.first + part.shape[0]]
        tensor = _convert_dtype(tensor, dtype, f"{part.weight.file}: {part.weight.name}")
        return tensor if tensor.shape == shape else _with_mean_rows(tensor, shape[0])

    return Planned(name, shape, dtype, read)


def _convert_dtype(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Convert to `dtype`. Raises ValueError, which names `where`, if a finite value overflows."""
    result = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(
            f"{where} has values too large for {dtype}, the language model's dtype; give a "
            "vision tower and a projector that belong to this language model"
        )
    return result


def _with_mean_rows(rows: Tensor, size: int) -> Tensor:
    """Rows (V, D), followed by copies of their mean: (size, D)."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(1024):  # without a float64 copy of all rows
        total += block.double().sum(0)
    mean = (total / len(rows)).to(rows.dtype)
    return torch.cat((rows, mean.expand(size - len(rows), -1)))


if __name__ == "__main__":
    end_program(main())
