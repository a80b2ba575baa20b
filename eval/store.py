"""A file of predictions that grows line by line and survives a killed process.

Each line is written in one piece and flushed at once. A killed process leaves at most one
incomplete last line, which the next run removes. With several processes, each writes its own file
NAME.part-RANK until all are done. The next run merges these parts, whatever its number of
processes.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Row = dict[str, Any]  # a row of LLaVA's answer files; metadata.number is the index of the question


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all: first under another name, then renamed."""
    part = path.with_name(f"{path.name}.writing")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def as_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and lock it. Raises ValueError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout:
        raise ValueError(
            f"another process writes to {folder}; wait for it, or give another --out"
        ) from None


def append_rows(file: Any, rows: Iterable[Row]) -> None:
    """Append rows to a file that is open in mode "ab", and flush it."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    file.flush()


def part_path(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.part-{rank}")


def merge_parts(path: Path, more: Iterable[Row] = ()) -> dict[int, Row]:
    """Merge a file, its parts and the rows `more`; returns the rows by index of the question.

    Afterwards all rows are in the file in the order of their indices, and the parts are deleted.
    """
    parts = sorted(Path(p) for p in glob.glob(f"{glob.escape(str(path))}.part-*"))
    rows = {number_of(row): row for file in (path, *parts) for row in _read_rows(file)}
    found = {number_of(row): row for row in more}
    if parts or found:
        rows = dict(sorted({**rows, **found}.items()))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
        write_atomically(path, "".join(lines))
        for part in parts:
            part.unlink()
    return rows


def number_of(row: Mapping[str, Any]) -> int:
    return int(row["metadata"]["number"])


def _read_rows(path: Path) -> list[Row]:
    """The rows of a file, or none if it does not exist. An incomplete last line is removed from it.

    Raises ValueError for a complete line that is not a row of eval.run.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with path.open("rb+") as file:
            file.truncate(complete)
    rows = []
    for i, line in enumerate(content[:complete].split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            number_of(rows[-1])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {i} is not a prediction of eval.run; give another --out"
            ) from None
    return rows
