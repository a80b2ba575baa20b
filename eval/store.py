"""A file of predictions that grows line by line and survives whatever happens to the process.

Every line is written whole and flushed at once. What a kill leaves behind is at most half of a last
line, which the next run cuts off. Where several processes work, each has a file of its own beside
it, NAME.part-RANK, until all are done; the next run of any number of processes takes them in.
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

Row = dict[str, Any]  # of LLaVA's answer files; metadata.number: which question of the task


def write_atomically(path: Path, text: str) -> None:
    """All of it under its name, or nothing."""
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
    """Alone in a folder, which is made. ValueError where another process is at work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout:
        raise ValueError(
            f"another process writes to {folder}; wait for it, or give another --out"
        ) from None


def append_rows(file: Any, rows: Iterable[Row]) -> None:
    """Write rows to a file that is open for appending bytes, and leave nothing in a buffer."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    file.flush()


def part_path(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.part-{rank}")


def merge_parts(path: Path, more: Iterable[Row] = ()) -> dict[int, Row]:
    """The rows of a file, of all parts beside it and `more`, by number. Afterwards they are all in
    the file, in the order of their numbers, and there are no parts."""
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
    """The whole lines of a file, none if there is no such file; half of a last one is cut off it.

    Raises ValueError for a whole line that is no row of ours.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("rb+") as file:
            file.truncate(whole)
    rows = []
    for i, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            number_of(rows[-1])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {i} is no prediction of eval.run; give another --out"
            ) from None
    return rows
