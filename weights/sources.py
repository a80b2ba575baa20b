"""The tensors of published weights, pickled or safetensors: what they are, and one at a time.

Pickles are opened with torch's restricted unpickler, which builds tensors and containers of them
and refuses everything else, so that no code in them runs. Files of torch 1.6 and later are mapped,
not read: a tensor's bytes are fetched when it is copied. Every file is opened read-only.
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

_AGAIN = "fetch it again"
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
    kind: str  # in safetensors' words, as `Stored` has it

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor itself, in memory of its own. The file is opened anew each time: its pages
        would be held for as long as it is mapped."""
        return unpickle(self.file)[self.name].to(device, dtype, copy=True)


Weight = Stored | Pickled


def weights_of(file: Path) -> list[Weight]:
    """Every tensor of one file. Raises ValueError for a damaged file, and a pickle with code."""
    if file.suffix == ".safetensors":
        return list(tensors_of(file))
    return [
        Pickled(file, name, tuple(t.shape), KINDS.get(t.dtype, str(t.dtype).removeprefix("torch.")))
        for name, t in unpickle(file).items()
    ]


def shards_in(folder: Path) -> list[Path]:
    """The files of a whole model, safetensors first; [] where there are none.

    Raises ValueError for an index that names a file outside the folder or one that is not there.
    """
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return listed_files(folder / index)
    return []


def small_files(folder: Path) -> list[Path]:
    """What stands beside the weights and is read: json files without indices, tokenizer.model."""
    found = [*sorted(folder.glob("*.json")), folder / "tokenizer.model"]
    return [p for p in found if p.is_file() and not p.name.endswith(".index.json")]


def unpickle(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, mapped from the file where its format allows that."""
    try:
        mapped = zipfile.is_zipfile(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of every kind, depending on where the damage is
        raise ValueError(_refusal(file, error)) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # training's form
        state = {str(name).removeprefix("module."): t for name, t in state["state_dict"].items()}
    if not isinstance(state, dict) or not all(map(_is_plain, state.values())):
        raise ValueError(
            f"{file} holds other things than named tensors with all their values; "
            "give a file of weights"
        )
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _is_plain(value: object) -> bool:
    """A tensor with all its values, one by one, in memory."""
    return isinstance(value, Tensor) and (value.layout, value.device.type) == (torch.strided, "cpu")


def _refusal(file: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "TorchScript" in text:
        return (
            f"{file} is a TorchScript archive, a program with weights in it, and is not read; give "
            "the same CLIP as plain weights: openai/clip-vit-large-patch14-336 on the hub, or "
            "open_clip's safetensors of it"
        )
    if found := _CODE.search(text):
        return (
            f"{file} is a pickle that asks for {found['named'] or found['dotted']} when opened, "
            "which is code, no weight; it was not run. Fetch the file from a source you trust"
        )
    if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError):
        return f"{file} cannot be read ({error.strerror}); give a file that can"
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the doc")[0][:120]
    return f"{file} is truncated, damaged or no file of weights ({reason or 'empty'}); {_AGAIN}"


# ---------------------------------------------------------------- checksums


def verify(files: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of each file, compared with what its source offers.

    That is SHA256SUMS in its folder, or what the hub said when it was fetched; where there is
    neither, the check sums that pickles of torch 1.6 and later carry inside. Raises ValueError for
    a file that is not as it was.
    """
    digests = {}
    with progress_bar(sum(f.stat().st_size for f in files), "checking") as bar:
        for file in files:
            digests[file] = digest = sha256_of(file, bar)
            offered = _offered(file)
            if offered is not None and digest != offered:
                raise ValueError(
                    f"{file} has SHA-256 {digest}, but should have {offered}; {_AGAIN}"
                )
            if offered is None and file.suffix != ".safetensors" and zipfile.is_zipfile(file):
                _check_zip(file)
    return digests


def _check_zip(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
            packed = [i.filename for i in archive.infolist() if i.compress_type]
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged ({error}); {_AGAIN}") from error
    if bad or packed:  # what is packed cannot be mapped
        raise ValueError(
            f"{file} is damaged: its entry {bad or packed[0]} does not have the check sum or the "
            f"form it was written with; {_AGAIN} (one written without check sums needs its SHA-256 "
            "in a file SHA256SUMS beside it)"
        )


def _offered(file: Path) -> str | None:
    sums = file.parent / "SHA256SUMS"
    if sums.is_file():
        for line in sums.read_text(errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().removeprefix("*").removeprefix("./") == file.name:
                return digest.lower()
    blob = file.resolve()  # in the hub's cache a large file is a link to a blob named by its digest
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if note.is_file():  # fetched to a folder of one's own: commit, ETag (large files: digest), time
        lines = note.read_text(errors="replace").split()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
            return lines[1]
    return None
