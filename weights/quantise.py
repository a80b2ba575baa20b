"""Store a checkpoint in 8 or 4 bits: `python -m weights.quantise SRC DST --bits 8|4`, or `--nf4`.

SRC is a folder in the llava-hf layout, or a hub id. The weights of linear layers are stored as
integers; all other tensors keep their bits. minillava/quant has the arithmetic, and
minillava/loading/assemble.py chooses the layers. A weight NAME is stored as

    int8: NAME, int8 codes; NAME_scale, one float32 scale per row
    int4: NAME, two codes per byte; NAME_step and NAME_low, two integers for each group of up to 32
          columns of a row; NAME_scale, one float32 scale per row
    nf4:  as bitsandbytes does with double quantisation (minillava/loading/bitsandbytes_layout.py);
          transformers opens DST too

config.json describes this too, and `minillava.load` opens DST directly. One tensor is in memory at
a time, and an interrupted run resumes (see files.py).
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from minillava.app.command import CommandParser, end_program, parse_int, parse_path, run_command
from minillava.loading.assemble import quantise_tensor as integers
from minillava.loading.assemble import quantised_layers
from minillava.loading.bitsandbytes_layout import planned_parts, store_parts
from minillava.loading.bitsandbytes_layout import read_tensors as stored_tensors
from minillava.loading.checkpoint import fit_model
from minillava.loading.config_file import read_config
from minillava.loading.hub import find_checkpoint as find
from minillava.loading.json_entries import read_json
from minillava.loading.processor_files import read_processor
from minillava.loading.tensor_files import FLOATS
from minillava.loading.tensor_files import StoredTensor as Stored
from minillava.quant.nf4 import Nf4
from minillava.quant.quantise import GROUP_COLUMNS as GROUP
from minillava.quant.quantise import ROTATED_COLUMNS as ROTATED
from minillava.quant.quantise import stored_parts

from .files import (
    SHARD_BYTES,
    Planned,
    check_folder,
    command_to_ask,
    refuse_inside,
    to_json,
    write_checkpoint,
)
from .sources import small_files, verify

_CPU = torch.device("cpu")
_DTYPES = FLOATS | {"I8": torch.int8, "U8": torch.uint8}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m weights.quantise",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("src", metavar="SRC", help="folder or hub id of a llava-hf checkpoint")
    parser.add_argument("dst", type=parse_path, metavar="DST", help="folder to write or resume")
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument("--bits", type=parse_int, choices=(8, 4), help="bits per weight")
    forms.add_argument("--nf4", action="store_true", help="4 bits in the format of bitsandbytes")

    def run() -> None:
        args = parser.parse_args(argv)
        quantise(find(args.src), args.dst, "nf4" if args.nf4 else f"int{args.bits}")
        print(f"{args.dst} is complete: {command_to_ask(args.dst)}")

    return run_command(run)


def quantise(src: Path, dst: Path, form: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint in `src` to `dst` with weights in the form int8, int4 or nf4.

    Raises ValueError for every invalid input. Nothing outside `dst` is changed.
    """
    refuse_inside(dst, src)
    values = read_json(src / "config.json")
    config = read_config(src / "config.json")
    read_processor(src, config)  # raises for small files that DST could not be loaded with
    model, found = fit_model(config, stored_tensors(src), src)
    if any(tensor.kind not in FLOATS for tensor in found.values()):
        raise ValueError(f"{src} is quantised already; give the unquantised checkpoint")
    layers = {f"{name}.weight": form for name, form in quantised_layers(model, form).items()}
    planned = [p for name, t in found.items() for p in _planned(t, layers.get(name))]
    files = {path.name: path.read_bytes() for path in small_files(src)}
    files["config.json"] = to_json({**values, "quantization_config": quantization_config(form)})
    check_folder(dst, planned, files, shard_bytes)
    sources = sorted({tensor.file for tensor in found.values()})
    digests = verify([*sources, *small_files(src)])
    origin = [(file.name, digests[file]) for file in sources]
    write_checkpoint(dst, planned, files, repr((form, origin)), shard_bytes)


def quantization_config(form: str) -> dict[str, object]:
    """Return config.json's quantization_config, for the loader and for people who read it."""
    if form == "nf4":
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            # As modules are called in transformers 5, and in earlier versions.
            "llm_int8_skip_modules": ["lm_head", "model.vision_tower", "vision_tower"],
        }
    eight = f"weight = (codes * scale) H, H orthogonal on blocks of at most {ROTATED} columns"
    four = (
        f"weight = ((code * step + low) * scale) H, step and low for at most {GROUP} columns; "
        "low nibble first"
    )
    method = "minillava/quantise.py"
    return {
        "quant_method": "minillava",
        "version": 2,
        "bits": int(form.removeprefix("int")),
        "weights": {"I8": eight, "U8": four},
        "defined_in": method,
    }


def _planned(tensor: Stored, form: str | None) -> list[Planned]:
    """The tensors that one stored tensor is written as; form=None: itself, unchanged."""
    if form is None:
        dtype = FLOATS[tensor.kind]
        return [Planned(tensor.name, tensor.shape, dtype, lambda: tensor.read(_CPU, dtype))]
    N, K = tensor.shape
    if form == "nf4":
        parts = planned_parts((N, K))
    else:
        kinds = stored_parts(tensor.shape, int(form.removeprefix("int")))
        parts = [(suffix, shape, _DTYPES[kind]) for suffix, shape, kind in kinds]
    return [
        Planned(tensor.name + suffix, shape, dtype, lambda i=i: _parts(tensor, form)[i])  # type: ignore[misc]
        for i, (suffix, shape, dtype) in enumerate(parts)
    ]


@functools.lru_cache(maxsize=1)
def _parts(tensor: Stored, form: str) -> list[Tensor]:
    """All parts of one quantised tensor, kept until the next tensor's are asked for."""
    weight = integers(tensor, _CPU, form)
    if isinstance(weight, Nf4):
        return store_parts(weight, FLOATS[tensor.kind])
    return list(vars(weight).values())


if __name__ == "__main__":
    end_program(main())
