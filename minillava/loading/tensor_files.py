"""The safetensors files of a checkpoint: read their headers, then one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .error_text import cut, cut_path, shorten
from .json_entries import read_json
from .regular_files import is_present

SMALL = 2**18  # values of a tensor that read_small reads
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as the file's header describes it. Its values are read by `read`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str  # dtype as safetensors spells it: F16, I8, ...; FLOATS lists the floating ones
    # of each dimension, what `read` reads; (): the whole tensor
    part: tuple[slice, ...] = field(default=(), kw_only=True)

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Read the values into new memory on `device`, converted to `dtype`.

        The file is opened for each tensor and the values are copied, because the pages of a mapped
        file count as memory in use until it is closed, and because the weights must not change when
        the file does.
        """
        with _open_safetensors(self.file) as file:
            if self.part:
                return file.get_slice(self.name)[self.part].to(device, dtype, copy=True)
            return file.get_tensor(self.name).to(device, dtype, copy=True)


@dataclass(frozen=True)
class SmallTensor(StoredTensor):
    """A tensor whose values were read before."""

    values: Tensor

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As StoredTensor.read."""
        return self.values.to(device, dtype, copy=True)


def read_small(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors, the small ones with their values.

    Each file is opened once for these: to parse its header takes longer than to read one of them.
    """
    small = {
        name: t
        for name, t in found.items()
        if type(t) is StoredTensor and not t.part and math.prod(t.shape) <= SMALL
    }
    read = dict(found)
    for path in {t.file for t in small.values()}:
        with _open_safetensors(path) as file:
            for name, t in small.items():
                if t.file == path:
                    values = file.get_tensor(t.name).clone()
                    read[name] = SmallTensor(t.file, t.name, t.shape, t.kind, values)
    return read


def read_headers(folder: Path) -> list[StoredTensor]:
    """List every tensor of the checkpoint in a folder, from the headers of its files alone.

    Raises ValueError for a folder without safetensors files, for an index that names missing files
    or files outside the folder, and for a truncated or damaged file.
    """
    return [tensor for path in _find_files(folder) for tensor in read_header(path)]


def read_header(path: Path) -> list[StoredTensor]:
    """List every tensor of one safetensors file."""
    if not is_present(path):
        raise ValueError(f"there is no {cut_path(path)}; download it")
    tensors = []
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping: it cannot be iterated itself)
            view = file.get_slice(name)
            tensors.append(StoredTensor(path, name, tuple(view.get_shape()), str(view.get_dtype())))
    return tensors


def _find_files(folder: Path) -> list[Path]:
    if is_present(folder / SINGLE):
        return [folder / SINGLE]
    if is_present(folder / INDEX):
        return read_index(folder / INDEX)
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        names = ", ".join(map(cut, pickles[:3]))
        raise ValueError(
            f"{cut_path(folder)} has its weights only as pickles ({names}), which load() does not "
            "read; convert them to the llava-hf layout, without running code in them, "
            f"with `python -m weights.convert {cut_path(folder)} DST`, and load DST"
        )
    raise ValueError(
        f"{cut_path(folder)} has neither {SINGLE} nor {INDEX}; give the folder of a checkpoint in "
        "the llava-hf layout, or download one with `python -m weights.download`"
    )


def read_index(index: Path) -> list[Path]:
    """The files that an index names, in the order of their names.

    Raises ValueError for a name that is missing or that leads out of the index's own folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{cut_path(index)}: weight_map is {shorten(weight_map)}, but must be an object of "
            "tensor: file pairs; download it again"
        )
    names = sorted(
        {name if isinstance(name, str) else shorten(name) for name in weight_map.values()}
    )
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(
                f"{cut_path(index)} names {shorten(name)}, but must name files in its own folder; "
                "download it again"
            )
        if not is_present(index.parent / name):
            raise ValueError(
                f"{cut_path(index)} names {cut(name)}, which is not there; download the file"
            )
    return [index.parent / name for name in names]


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{cut_path(path)} is truncated, damaged or not a safetensors file "
            f"({cut(str(error))}); download it again"
        ) from error
