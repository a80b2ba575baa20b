"""Writing a checkpoint so that no interruption leaves half of a file, and a second run goes on.

What is to be written is known before anything is: `Planned` tensors, whose shapes and dtypes come
from headers, are divided into shards in a fixed manner. Each shard is streamed, one tensor in
memory, into a temporary file beside its place, synchronised, and only then given its name; its
SHA-256 goes into progress.json. The index and config.json come last: without them no half of a
checkpoint passes for a whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
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

# safetensors' words for the dtypes that a checkpoint may hold
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
_SPARE = 50 * 10**6  # left free on the disk


@dataclass(frozen=True)
class Planned:
    """A tensor to be written. `read` makes it when its turn has come, of this shape and dtype."""

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
    """Write tensors and small files (name -> content, config.json among them) into a folder.

    origin: says what the tensors are made from, and how; a folder begun from something else is
    refused. Where an earlier run was interrupted, finished shards are recognised by their SHA-256
    and kept; a folder that is complete is verified. Raises ValueError, in one line, for a folder
    with other things in it, one that another process writes, and a disk that is full.
    """
    check_folder(folder, tensors, files, shard_bytes)
    shards = _named(divide(tensors, shard_bytes))
    # a source that was written here has a progress of its own among its files
    contents = {name: files[name] for name in files if name not in (CONFIG, PROGRESS)}
    if len(shards) > 1:
        contents[INDEX] = _index(shards)
    contents[CONFIG] = files[CONFIG]  # last
    identity = _identity(shards, origin)
    with _writing(folder), _locked(folder):
        done = _progress(folder, identity)
        kept = {name: digest for name, digest in done.items() if _intact(folder, name, digest)}
        _note(folder, identity, kept)
        total = sum(t.nbytes for name, ts in shards.items() if name not in kept for t in ts)
        with progress_bar(total, "writing") as bar:
            for name, shard in shards.items():
                if name not in kept:
                    kept[name] = _write_shard(folder / name, shard, bar)
                    _note(folder, identity, kept)
        for name, content in contents.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                write_file(folder / name, content)


def check_folder(
    folder: Path,
    tensors: Sequence[Planned],
    files: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """What can be said of a folder at once, for callers that have long work to do before they
    write: ValueError where there are other things in it, or no room for all this."""
    shards = _named(divide(tensors, shard_bytes))
    with _writing(folder):
        _refuse_others(folder, {INDEX, *shards, *files})
        _check_space(folder, shards)


def refuse_inside(folder: Path, source: Path) -> None:
    """ValueError if what would be written is the source itself, or in it."""
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
        raise ValueError(f"{folder} is inside {source}, which is only read; give another folder")


def write_file(path: Path, content: bytes) -> None:
    """A small file: all of it under its name, or nothing."""
    with _replacing(path) as file:
        file.write(content)


def to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def sha256_of(path: Path, bar: tqdm | None = None) -> str:
    """In hexadecimal, as sha256sum prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def progress_bar(total: int, what: str) -> tqdm:
    """Bytes, with their rate, on stderr if that is a terminal."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if total else True,
    )


def divide(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Shards of at most `shard_bytes` (one tensor may be larger), in the given order."""
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


def _named(shards: list[list[Planned]]) -> dict[str, list[Planned]]:
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    n = len(shards)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, Sequence[Planned]]) -> bytes:
    total = sum(t.nbytes for shard in shards.values() for t in shard)
    where = {t.name: name for name, shard in shards.items() for t in shard}
    return to_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _write_shard(path: Path, shard: Sequence[Planned], bar: tqdm) -> str:
    """Stream tensors into a safetensors file; returns its SHA-256.

    safetensors' own save_file would need the whole shard in memory. The format: the length of the
    header in 8 bytes, the header, which says of each tensor where its bytes are, and the bytes.
    """
    ordered = sorted(shard, key=lambda t: -t.dtype.itemsize)  # each begins at a multiple of its own
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
    with _replacing(path) as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for t in ordered:
            tensor = t.read()
            assert tuple(tensor.shape) == t.shape, f"{t.name}: {tuple(tensor.shape)}"
            assert tensor.dtype == t.dtype, f"{t.name}: {tensor.dtype}"
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for i in range(0, len(data), _CHUNK):
                put(data[i : i + _CHUNK])
                bar.update(len(data[i : i + _CHUNK]))
    return digest.hexdigest()


# ---------------------------------------------------------------- what is there already


def _identity(shards: Mapping[str, Sequence[Planned]], origin: str) -> str:
    plan = [(n, [(t.name, t.shape, KINDS[t.dtype]) for t in ts]) for n, ts in shards.items()]
    return hashlib.sha256(json.dumps([origin, plan]).encode()).hexdigest()


def _progress(folder: Path, identity: str) -> dict[str, str]:
    if not (folder / PROGRESS).is_file():
        return {}
    noted = read_json(folder / PROGRESS)
    if noted.get("identity") != identity:
        raise ValueError(
            f"{folder} holds what was written from other files or with other options "
            f"({PROGRESS} says so); give a new folder, or delete this one"
        )
    return dict(noted.get("sha256") or {})


def _note(folder: Path, identity: str, done: Mapping[str, str]) -> None:
    write_file(folder / PROGRESS, to_json({"identity": identity, "sha256": done}))


def _intact(folder: Path, name: str, digest: str) -> bool:
    path = folder / name
    if not path.is_file():
        return False
    with progress_bar(path.stat().st_size, f"verifying {name}") as bar:
        return sha256_of(path, bar) == digest


def _refuse_others(folder: Path, ours: set[str]) -> None:
    """A folder may hold what we write, provided that we began it."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder that is empty or not there yet")
    there = {path.name for path in folder.iterdir()} - {LOCK, f"{PROGRESS}{PART}"}
    known = {PROGRESS, *ours, *(name + PART for name in ours)} if PROGRESS in there else set()
    if others := sorted(there - known):
        raise ValueError(
            f"{folder} has other things in it ({', '.join(others[:3])}); "
            "give a folder that is empty or not there yet"
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
            "make room, or give a folder on another disk"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the system refuses, in one line; what was finished is kept."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room there" if full else "give a folder that can be, or change that"
        raise ValueError(
            f"{error.filename or folder} cannot be written ({error.strerror}); {todo}, "
            "and run the command again: it goes on where it stopped"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that was killed."""
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
def _replacing(path: Path) -> Iterator[IO[bytes]]:
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
    """Makes the new name last through a power cut, where a system lets folders be synchronised."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
