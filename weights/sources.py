"""List the tensors of published weights, pickled or safetensors, and read them one at a time.

Pickles are opened with torch's restricted unpickler. It builds tensors and containers of tensors
and refuses everything else, so no code in a pickle runs. Files written by torch 1.6 or later are
memory-mapped: the bytes of a tensor are read when it is copied. All files are opened read-only.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.loading.tensor_files import INDEX, SINGLE
from minillava.loading.tensor_files import StoredTensor as Stored
from minillava.loading.tensor_files import read_header as tensors_of
from minillava.loading.tensor_files import read_index as listed_files

from .files import progress_bar, sha256_of

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")

KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {kind: dtype for dtype, kind in KINDS.items()}

_REMEDY = "download it again"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CODE = re.compile(
    r"GLOBAL +['`]*(?P<named>[A-Za-z_][\w.]*)"
    r"|(?:global:?|class|function:?|call) +['`]*(?P<dotted>[A-Za-z_]\w*(?:\.\w+)+)"
)


@dataclass(frozen=True)
class Pickled:
    """A tensor in a pickled file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str  # safetensors' name of the dtype, as in `Stored`

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a copy of the tensor.

        The file is opened again for each tensor: as long as it is mapped, the pages that were read
        stay in memory.
        """
        return unpickle(self.file)[self.name].to(device, dtype, copy=True)


Weight = Stored | Pickled


def weights_of(file: Path) -> list[Weight]:
    """List every tensor of one file. Raises ValueError if it is damaged or a pickle with code."""
    if file.suffix == ".safetensors":
        return list(tensors_of(file))
    return [
        Pickled(file, name, tuple(t.shape), KINDS.get(t.dtype, str(t.dtype).removeprefix("torch.")))
        for name, t in unpickle(file).items()
    ]


def shards_in(folder: Path) -> list[Path]:
    """Return the weight files of a model: safetensors if there are any, else pickles, else [].

    Raises ValueError if an index names a missing file or one outside the folder.
    """
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return listed_files(folder / index)
    return []


def small_files(folder: Path) -> list[Path]:
    """Return the files beside the weights: tokenizer.model, and JSON and Jinja except indices."""
    found = [*sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]), folder / "tokenizer.model"]
    return [p for p in found if p.is_file() and not p.name.endswith(".index.json")]


def unpickle(file: Path) -> dict[str, Tensor]:
    """Return name -> tensor, memory-mapped if the file's format allows it."""
    try:
        mapped = zipfile.is_zipfile(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises many types, depending on the damage
        raise ValueError(_explain_unpickling_error(file, error)) from error
    # training scripts save the weights as one entry of a larger dictionary
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = {str(name).removeprefix("module."): t for name, t in state["state_dict"].items()}
    if not isinstance(state, dict) or not all(map(_is_dense, state.values())):
        raise ValueError(
            f"{file} contains other things than named, dense tensors with their values; "
            "give a file of weights"
        )
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _is_dense(value: object) -> bool:
    """Whether the value is a dense tensor in CPU memory (not sparse, not on the meta device)."""
    return isinstance(value, Tensor) and (value.layout, value.device.type) == (torch.strided, "cpu")


def _explain_unpickling_error(file: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "TorchScript" in text:
        return (
            f"{file} is a TorchScript archive, a program that contains weights, and is not read; "
            "give the same CLIP as plain weights: openai/clip-vit-large-patch14-336 on the hub, or "
            "its safetensors file of open_clip"
        )
    if found := _CODE.search(text):
        return (
            f"{file} is a pickle that asks for {found['named'] or found['dotted']} when opened, "
            "which is code and not a weight; it was not run. Get the file from a source you trust"
        )
    if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError):
        return f"{file} cannot be read ({error.strerror}); give a readable file"
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the doc")[0][:120]
    return f"{file} is truncated, damaged or not a weight file ({reason or 'empty'}); {_REMEDY}"


# ---------------------------------------------------------------- checksums


def verify(files: Sequence[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, after comparing it with the published one.

    The published SHA-256 comes from SHA256SUMS in the file's folder or from the hub's download
    metadata. Without either, the CRC-32 sums inside pickles of torch 1.6 and later are checked.
    Raises ValueError if a file does not match.
    """
    digests = {}
    with progress_bar(sum(f.stat().st_size for f in files), "checking") as bar:
        for file in files:
            digests[file] = digest = sha256_of(file, bar)
            published = _published_sha256(file)
            if published is not None and digest != published:
                raise ValueError(
                    f"{file} has SHA-256 {digest}, but should have {published}; {_REMEDY}"
                )
            if published is None and file.suffix != ".safetensors" and zipfile.is_zipfile(file):
                _check_zip(file)
    return digests


def _check_zip(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
            packed = [i.filename for i in archive.infolist() if i.compress_type]
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged ({error}); {_REMEDY}") from error
    if bad or packed:  # a compressed entry cannot be memory-mapped
        raise ValueError(
            f"{file} is damaged: its entry {bad or packed[0]} has a wrong checksum or is "
            f"compressed; {_REMEDY} (a file that was written without checksums needs its SHA-256 "
            "in a file SHA256SUMS beside it)"
        )


def _published_sha256(file: Path) -> str | None:
    sums = file.parent / "SHA256SUMS"
    if sums.is_file():
        for line in sums.read_text(errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().removeprefix("*").removeprefix("./") == file.name:
                return digest.lower()
    blob = file.resolve()  # in the hub's cache, large files link to a blob named by its SHA-256
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if metadata.is_file():  # local_dir downloads: commit, ETag (SHA-256 of large files), time
        lines = metadata.read_text(errors="replace").split()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
            return lines[1]
    return None
