"""The safetensors files of a checkpoint: what they hold, and one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .json_entries import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, known from the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str  # safetensors' word for its dtype; FLOATS has those that hold weights

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor itself, in memory of its own.

        The file is opened anew each time and the copy forced: pages of a mapped file would count
        towards the peak until the file is closed, and weights must not change with the file.
        """
        with _opened(self.file) as file:
            return file.get_tensor(self.name).to(device, dtype, copy=True)


def stored_tensors(folder: Path) -> list[Stored]:
    """Every tensor of a folder's checkpoint, from the headers alone, file by file.

    Raises ValueError for a folder without safetensors, an index that leads nowhere or out of the
    folder, and a truncated or damaged file.
    """
    return [tensor for path in _files(folder) for tensor in tensors_of(path)]


def tensors_of(path: Path) -> list[Stored]:
    """Every tensor of one safetensors file, from its header."""
    tensors = []
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping: it has nothing but keys)
            view = file.get_slice(name)
            tensors.append(Stored(path, name, tuple(view.get_shape()), str(view.get_dtype())))
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return listed_files(folder / INDEX)
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has its weights only as pickles ({', '.join(pickles[:3])}), which are not "
            "read here; write the llava-hf layout from them, without running code in them, with "
            f"`python -m weights.convert {folder} DST`, and load DST"
        )
    raise ValueError(
        f"{folder} has neither {SINGLE} nor {INDEX}; give the folder of a checkpoint in the "
        "llava-hf layout, or fetch it whole: `python -m weights.download`"
    )


def listed_files(index: Path) -> list[Path]:
    """The files that an index names. Raises ValueError for one that is not there, or elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: weight_map is {weight_map!r}, not tensor: file pairs; fetch it again"
        )
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(
                f"{index} names {name!r}, but must name files in its own folder; fetch it again"
            )
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there; fetch the file")
    return [index.parent / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or no safetensors file ({error}); fetch it again"
        ) from error
