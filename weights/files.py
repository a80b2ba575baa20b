"""Write a checkpoint so that an interruption leaves no partial file and a second run resumes.

The complete list of tensors (`Planned`) is known before anything is written: shapes and dtypes come
from file headers, and `divide` assigns the tensors to shards deterministically. Each shard is
streamed, one tensor in memory at a time, into a temporary file in the same folder. That file is
synced to disk, renamed, and its SHA-256 is recorded in progress.json. The index and config.json are
written last, so an incomplete checkpoint cannot be loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from minillava.loading.json_entries import read_json
from minillava.loading.tensor_files import INDEX, SINGLE

CONFIG, PROGRESS, LOCK, PART = "config.json", "progress.json", ".lock", ".part"
SHARD_BYTES = 4 * 10**9

# safetensors' names of the dtypes that a checkpoint may hold
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_CHUNK = 1 << 22
_SPARE = 50 * 10**6  # bytes to leave free on the disk


@dataclass(frozen=True)
class Planned:
    """A tensor to write. `read` is called when it is written and returns it in this form."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    tensors: Sequence[Planned],
    files: Mapping[str, bytes],
    origin: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` and the small `files` (name -> content, including config.json) to `folder`.

    `origin` describes the sources and the options. A folder that was started from another origin
    is refused. After an interrupted run, finished shards whose SHA-256 matches are kept; a complete
    folder is verified. Raises ValueError if the folder contains other files, if another process is
    writing to it, and if the disk is full.
    """
    check_folder(folder, tensors, files, shard_bytes)
    shards = _named_shards(divide(tensors, shard_bytes))
    # a source folder that this function wrote contains a progress.json too; it is not copied
    contents = {name: files[name] for name in files if name not in (CONFIG, PROGRESS)}
    if len(shards) > 1:
        contents[INDEX] = _index(shards)
    contents[CONFIG] = files[CONFIG]  # written last
    identity = _identity(shards, origin)
    with explain_os_errors(folder), _locked(folder):
        recorded = _read_progress(folder, identity)
        kept = {
            name: digest for name, digest in recorded.items() if _has_digest(folder, name, digest)
        }
        _write_progress(folder, identity, kept)
        total = sum(t.nbytes for name, ts in shards.items() if name not in kept for t in ts)
        with progress_bar(total, "writing") as bar:
            for name, shard in shards.items():
                if name not in kept:
                    kept[name] = _write_shard(folder / name, shard, bar)
                    _write_progress(folder, identity, kept)
        for name, content in contents.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                write_file(folder / name, content)


def check_folder(
    folder: Path,
    tensors: Sequence[Planned],
    files: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Raise ValueError if the folder contains other files or the disk has too little space.

    `write_checkpoint` checks this itself. Callers with long work before it call this first.
    """
    shards = _named_shards(divide(tensors, shard_bytes))
    with explain_os_errors(folder):
        _refuse_other_files(folder, {INDEX, *shards, *files})
        _check_space(folder, shards)


def refuse_inside(folder: Path, source: Path) -> None:
    """Raise ValueError if the destination `folder` is the `source` folder or inside it."""
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
        raise ValueError(f"{folder} is inside {source}, which is only read; give another folder")


def write_file(path: Path, content: bytes) -> None:
    """Write a small file atomically: `path` is either complete or unchanged."""
    with _open_atomically(path) as file:
        file.write(content)


def to_json(values: Mapping[str, Any]) -> bytes:
    """Indented JSON in UTF-8, with a newline at the end."""
    return (json.dumps(values, indent=2) + "\n").encode()


def sha256_of(path: Path, bar: tqdm | None = None) -> str:
    """SHA-256 of a file in hexadecimal, as sha256sum prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def progress_bar(total: int, what: str) -> tqdm:
    """A bar on stderr that counts bytes and shows their rate, if stderr is a terminal."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if total else True,
    )


def divide(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Divide the tensors, in order, into shards of at most `shard_bytes`.

    A tensor that is larger than `shard_bytes` gets a shard of its own.
    """
    shards: list[list[Planned]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


# ---------------------------------------------------------------- shards


def _named_shards(shards: list[list[Planned]]) -> dict[str, list[Planned]]:
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    n = len(shards)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, Sequence[Planned]]) -> bytes:
    total = sum(t.nbytes for shard in shards.values() for t in shard)
    where = {t.name: name for name, shard in shards.items() for t in shard}
    return to_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _write_shard(path: Path, shard: Sequence[Planned], bar: tqdm) -> str:
    """Stream tensors into a safetensors file and return its SHA-256.

    safetensors.torch.save_file would need the whole shard in memory. The format is: 8 bytes for
    the length of the header, the header (JSON with the byte range of each tensor), then the data.
    """
    # wide dtypes first, so that each tensor is aligned to its item size
    ordered = sorted(shard, key=lambda t: -t.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in ordered:
        end = at + t.nbytes
        header[t.name] = {
            "dtype": KINDS[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with _open_atomically(path) as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for t in ordered:
            tensor = t.read()
            assert tuple(tensor.shape) == t.shape, f"{t.name}: {tuple(tensor.shape)}"
            assert tensor.dtype == t.dtype, f"{t.name}: {tensor.dtype}"
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for i in range(0, len(data), _CHUNK):
                write(data[i : i + _CHUNK])
                bar.update(len(data[i : i + _CHUNK]))
    return digest.hexdigest()


# ---------------------------------------------------------------- resuming


def _identity(shards: Mapping[str, Sequence[Planned]], origin: str) -> str:
    plan = [(n, [(t.name, t.shape, KINDS[t.dtype]) for t in ts]) for n, ts in shards.items()]
    return hashlib.sha256(json.dumps([origin, plan]).encode()).hexdigest()


def _read_progress(folder: Path, identity: str) -> dict[str, str]:
    if not (folder / PROGRESS).is_file():
        return {}
    try:
        noted = read_json(folder / PROGRESS)
    except ValueError as error:
        raise _damaged_progress(folder, str(error.__cause__ or error)) from None
    if noted.get("identity") != identity:
        raise ValueError(
            f"{folder} was written from other files or with other options (see its {PROGRESS}); "
            "give a new folder, or delete this one"
        )
    recorded = noted.get("sha256")
    if not isinstance(recorded, dict) or not all(isinstance(v, str) for v in recorded.values()):
        raise _damaged_progress(folder, f"sha256 is {str(recorded)[:60]}, but must be an object")
    return recorded


def _damaged_progress(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"{folder / PROGRESS} is damaged: {reason}; give a new folder, or delete this one"
    )


def _write_progress(folder: Path, identity: str, recorded: Mapping[str, str]) -> None:
    write_file(folder / PROGRESS, to_json({"identity": identity, "sha256": recorded}))


def _has_digest(folder: Path, name: str, digest: str) -> bool:
    path = folder / name
    if not path.is_file():
        return False
    with progress_bar(path.stat().st_size, f"verifying {name}") as bar:
        return sha256_of(path, bar) == digest


def _refuse_other_files(folder: Path, ours: set[str]) -> None:
    """Raise ValueError if the folder contains files that an earlier run did not write.

    Files named in `ours` are accepted only beside a progress.json.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give an empty or a new folder")
    there = {path.name for path in folder.iterdir()} - {LOCK, f"{PROGRESS}{PART}"}
    known = {PROGRESS, *ours, *(name + PART for name in ours)} if PROGRESS in there else set()
    if others := sorted(there - known):
        raise ValueError(
            f"{folder} contains other files ({', '.join(others[:3])}); "
            "give an empty or a new folder"
        )


# ---------------------------------------------------------------- the disk


def _check_space(folder: Path, shards: Mapping[str, Sequence[Planned]]) -> None:
    needed = _SPARE
    for name, shard in shards.items():
        if not (folder / name).is_file():
            needed += sum(t.nbytes for t in shard)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{folder} needs {needed / 1e9:.2f} GB on a disk with {free / 1e9:.2f} GB free; "
            "free some space, or give a folder on another disk"
        )


def command_to_ask(folder: Path) -> str:
    """The command that asks the checkpoint in a folder, as it can be pasted into a shell."""
    return shlex.join(["python", "-m", "minillava.generate", "--model", str(folder)])


@contextmanager
def explain_os_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a ValueError that says how to continue; finished files are kept."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "free some space" if full else "give a writable folder or change its permissions"
        raise ValueError(
            f"{error.filename or folder} cannot be written ({error.strerror}); {todo}, "
            "then run the command again: it resumes where it stopped"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock. The system releases the lock of a killed process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            try:
                yield
            finally:
                (folder / LOCK).unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(
            f"{folder} is being written by another process; wait for it, or give another folder"
        ) from error


@contextmanager
def _open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that replaces it when the block has succeeded."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, on systems that can sync folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
