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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict, cast

from filelock import FileLock, Timeout

from .first_token import Distribution
from .typed import find_type_error, parse_json, refuse_special_file


class Measurements(TypedDict):
    """The counts, times and bytes of one answer. Times are those of its whole batch."""

    prompt_tokens: int
    tokens_entering: list[int]  # [layer]
    image_tokens_entering: list[int]  # [layer]
    new_tokens: int
    stopped: str
    cache_bytes: int
    vision: float
    prefill: float
    first_token: float
    per_token: float | None
    peak_bytes: int | None
    choosing: float
    batch: int  # its number of questions


class Further(TypedDict, total=False):
    """What files of earlier versions lack."""

    drew: bool  # whether the plan drew random numbers
    first: Distribution  # of the first new token; under the unpruned plan only
    kl: float | None  # of the first new token, from the unpruned model's


class Metadata(Measurements, Further):
    number: int  # the index of the question
    plan: str
    warm: bool  # not one of the first batches of a process


class Row(TypedDict):
    """A row of LLaVA's answer files."""

    question_id: str | int
    prompt: str
    text: str
    answer_id: str
    model_id: str
    metadata: Metadata


_MOST = 2**63  # of a count


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Turn an OSError, for example of a full disk, into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise _not_writable(path, error) from None


def _not_writable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be written ({error.strerror or error}); correct this, "
        "and the same command continues, or give another --out"
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all: first under another name, then renamed."""
    part = path.with_name(f"{path.name}.writing")
    refuse_special_file(part)
    refuse_special_file(path)
    with name_file_in_errors(path):
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
    lock = FileLock(folder / ".lock", blocking=False)
    refuse_special_file(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:  # an OSError, too
        raise ValueError(
            f"another process writes to {folder}; wait for it, or give another --out"
        ) from None
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_to_append(path: Path) -> Iterator[BinaryIO]:
    """Open a file for append_rows. Raises ValueError if it cannot be written."""
    refuse_special_file(path)
    with name_file_in_errors(path), path.open("ab") as file:
        yield file


def append_rows(file: BinaryIO, rows: Iterable[Row]) -> None:
    """Append rows to a file of open_to_append, and flush it."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    file.flush()


@dataclass(frozen=True)
class AnswerFile:
    """The file of the answers under one plan, with its parts. layers: of the model's decoder."""

    path: Path
    plan: str
    layers: int

    def part(self, rank: int) -> Path:
        """The file to which one of several processes writes."""
        return self.path.with_name(f"{self.path.name}.part-{rank}")

    def merge(self, more: Iterable[Row] = ()) -> dict[int, Row]:
        """Merge the file, its parts and the rows `more`; returns the rows by index of the question.

        Afterwards all rows are in the file in the order of their indices, and the parts are
        deleted. If a question has several rows, the last one stays. Raises ValueError for a line
        that is not an answer under this plan; then all files stay as they are, but for an
        incomplete last line, which is removed.
        """
        parts = sorted(map(Path, glob.glob(f"{glob.escape(str(self.path))}.part-*")))
        found = [row for file in (self.path, *parts) for row in self._read(file)]
        new = list(more)
        rows = {row["metadata"]["number"]: row for row in (*found, *new)}
        in_order = dict(sorted(rows.items()))
        if parts or new or len(rows) < len(found) or list(rows) != list(in_order):
            rows = in_order
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
            write_atomically(self.path, "".join(lines))
            for part in parts:
                part.unlink()
        return rows

    def _read(self, path: Path) -> list[Row]:
        """The rows of a file, or none if it does not exist. An incomplete last line is removed."""
        refuse_special_file(path)
        if not path.exists():
            return []
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        lines = content[:complete].split(b"\n")[:-1]
        rows = [self._row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
        if complete < len(content):
            with name_file_in_errors(path), path.open("rb+") as file:
                file.truncate(complete)
        return rows

    def _row(self, line: bytes, where: str) -> Row:
        try:
            row = parse_json(line)
            reason = find_type_error(row, Row) or self._mismatch(row)
        except ValueError as error:
            reason = str(error)
        if reason:
            raise ValueError(
                f"{where} is not an answer of eval.run under the plan {self.plan}: {reason}; "
                "delete the line, and its question is asked again, or give another --out"
            )
        return cast(Row, row)

    def _mismatch(self, row: Row) -> str | None:
        """Why a row does not belong to this file, or None."""
        told = row["metadata"]
        entering = (told["tokens_entering"], told["image_tokens_entering"])
        counts = [told["number"], told["prompt_tokens"], told["new_tokens"], told["batch"]]
        counts += [told["cache_bytes"], *(n for layers in entering for n in layers)]
        if told["plan"] != self.plan:
            return f"metadata.plan is {told['plan']!r}"
        if strange := [n for n in counts if not 0 <= n < _MOST]:
            return f"metadata has {str(strange[0])[:40]}, but counts are from 0 to 2^63"
        if told["prompt_tokens"] < 1 or told["batch"] < 1:
            return "metadata.prompt_tokens and metadata.batch must be 1 or more"
        if any(len(counts) != self.layers for counts in entering):
            return f"metadata has counts of other than {self.layers} layers"
        return None
