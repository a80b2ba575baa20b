"""Benchmark files as distributed -> plain rows, with errors that name the file and line."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .base import ImageSource

Row = dict[str, Any]


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); give a file") from None


def read_json(path: Path) -> Any:
    """Any json value. Raises ValueError with the line where it breaks off."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; fetch or make it again")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: no valid json ({error.msg}); is the file whole?"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; is it the right file?") from None


def read_jsonl(path: Path) -> list[Row]:
    """One object a line; empty lines are passed over."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            why = getattr(error, "msg", "nested too deeply")
            raise ValueError(
                f"{path}, line {number}: no valid json ({why}); is the file whole?"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {type(row).__name__}, not an object")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; fetch or make it again")
    return rows


def json_rows(path: Path) -> list[Row]:
    """Objects of a JSONL file, or of a json list."""
    if read_text(path).lstrip()[:1] != "[":
        return read_jsonl(path)
    rows = read_json(path)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: entry {i} is {type(row).__name__}, not an object")
    return rows


def read_table(path: Path) -> list[Row]:
    """A csv or tsv file with a head line; all values are text, quotes as pandas reads them."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # pictures in base64 stand in fields
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(read_text(path).splitlines(keepends=True), delimiter=delimiter)
    rows: list[Row] = []
    try:
        head = next(reader, [])
        for row in reader:
            if len(row) != len(head):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} fields for {len(head)} columns; "
                    "is the file whole?"
                )
            rows.append(dict(zip(head, row, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty; fetch or make it again")
    return rows


def tab_rows(path: Path, fields: tuple[int, ...]) -> list[list[str]]:
    """Lines of tab-separated fields, of a number that is allowed. ValueError names the line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = line.rstrip("\r").split("\t")
        if len(row) not in fields:
            wanted = " or ".join(map(str, fields))
            raise ValueError(
                f"{path}, line {number}: {len(row)} tab-separated fields, not {wanted}; is the "
                "file whole?"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; fetch or make it again")
    return rows


def field(row: Any, name: str, path: Path | None, number: object) -> Any:
    """A row's field that must be there. number: how the row is called."""
    if not isinstance(row, Mapping) or row.get(name) is None:
        raise ValueError(f"{path}: {number} has no {name!r}; is it the right file?")
    return row[name]


def section(values: Any, name: str, path: Path, kind: type = list) -> Any:
    """A named part of a json object, of the kind it has to be."""
    if not isinstance(values, dict) or not isinstance(values.get(name), kind):
        what = "list" if kind is list else "object"
        raise ValueError(f"{path} has no {what} {name!r}; is it the right file?")
    return values[name]


def first_existing(folder: Path, *names: str) -> Path | None:
    """The first of these files or folders that exists."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def image_folder(folder: Path, *names: str) -> Path:
    """The first of these folders that exists; none does: the first, for the error to name."""
    return first_existing(folder, *names) or folder / names[0]


# ---------------------------------------------------------------- Hugging Face datasets


@dataclass(frozen=True)
class Table:
    """Rows of a `datasets` folder or of parquet files. Pictures are decoded as they are opened."""

    path: Path
    rows: list[Row]  # without pictures
    stored: Callable[[int, str], list[Any]]  # row, column: its pictures as they are stored
    decode: Callable[[Any], Image.Image]

    def image(self, i: int, column: str = "image", number: int = 0) -> ImageSource:
        return ImageSource(
            f"{self.path}, row {i}, {column}",
            lambda: self.decode(self.stored(i, column)[number]),
        )

    def images_in(self, i: int, column: str = "image") -> int:
        """How many pictures a row has in a column, 0 if there is no such column."""
        return len(self.stored(i, column))


def find_table(folder: Path, *names: str) -> Table | None:
    """The rows of a split: `folder` itself or folder/NAME as saved by save_to_disk, or parquet
    files NAME*.parquet there, in data/, or in a folder NAME. None where there is none of these."""
    for place in (folder, *(folder / name for name in names)):
        if (place / "dataset_info.json").is_file() and (place / "state.json").is_file():
            return _table(place, partial(_saved, place=place))
    for name in names:
        patterns = (f"{name}*.parquet", f"data/{name}*.parquet", f"{name}/*.parquet")
        for pattern in patterns:
            files = sorted(map(str, folder.glob(pattern)))
            if files:
                return _table(folder, partial(_parquet, files=files))
    return None


def _saved(datasets: Any, place: Path) -> Any:
    return datasets.load_from_disk(str(place))


def _parquet(datasets: Any, files: Sequence[str]) -> Any:
    return datasets.load_dataset("parquet", data_files=list(files), split="train")


def _table(path: Path, read: Callable[[Any], Any]) -> Table:
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise ValueError(
            f"{path} holds arrow or parquet files, which need the library datasets; "
            "pip install 'minillava[eval]'"
        ) from None
    datasets.logging.set_verbosity(logging.CRITICAL)  # its failures are told below, once
    datasets.disable_progress_bars()
    try:
        rows = read(datasets)
        pictures = [name for name, kind in rows.features.items() if "Image(" in repr(kind)]
        for name in pictures:
            plain = datasets.Image(decode=False)
            listed = not isinstance(rows.features[name], datasets.Image)
            rows = rows.cast_column(name, datasets.Sequence(plain) if listed else plain)
        plain_rows = [dict(row) for row in rows.remove_columns(pictures)]
    except Exception as error:  # the library raises whatever its readers stumble over
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from None

    def stored(i: int, column: str) -> list[Any]:
        if column not in pictures:
            return []
        found = rows[i][column]
        return found if isinstance(found, list) else [found] if found else []

    return Table(path, plain_rows, stored, datasets.Image().decode_example)
