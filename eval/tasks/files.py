"""Read benchmark files as they are distributed into plain rows. Errors name the file and line."""

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
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); download it again") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); give a file") from None


def read_json(path: Path) -> Any:
    """Any JSON value. Raises ValueError with the line of the mistake."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; download or create it again")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); download the file again"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; give the official file") from None


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a file with one on each line. Empty lines are skipped."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            why = getattr(error, "msg", "nested too deeply")
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({why}); download the file again"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {type(row).__name__}, not an object")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; download or create it again")
    return rows


def json_rows(path: Path) -> list[Row]:
    """The objects of a JSONL file or of a JSON list."""
    if read_text(path).lstrip()[:1] != "[":
        return read_jsonl(path)
    rows = read_json(path)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: entry {i} is {type(row).__name__}, not an object")
    return rows


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV or TSV file with a header. Values are text, with quotes as in pandas."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # fields contain images in base64
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(read_text(path).splitlines(keepends=True), delimiter=delimiter)
    rows: list[Row] = []
    try:
        head = next(reader, [])
        for row in reader:
            if len(row) != len(head):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} fields for {len(head)} columns; "
                    "download the file again"
                )
            rows.append(dict(zip(head, row, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty; download or create it again")
    return rows


def tab_rows(path: Path, fields: tuple[int, ...]) -> list[list[str]]:
    """Rows of tab-separated fields. fields: the allowed numbers of fields.

    Raises ValueError with the line that has another number.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = line.rstrip("\r").split("\t")
        if len(row) not in fields:
            wanted = " or ".join(map(str, fields))
            raise ValueError(
                f"{path}, line {number}: {len(row)} tab-separated fields, not {wanted}; download "
                "the file again"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; download or create it again")
    return rows


def field(row: Any, name: str, path: Path | None, number: object) -> Any:
    """A required field of a row (ValueError if it is missing). number: its name in messages."""
    if not isinstance(row, Mapping) or row.get(name) is None:
        raise ValueError(f"{path}: {number} has no {name!r}; give the official file")
    return row[name]


def section(values: Any, name: str, path: Path, kind: type = list) -> Any:
    """A list or object in a JSON object, by its name (ValueError if it is missing)."""
    if not isinstance(values, dict) or not isinstance(values.get(name), kind):
        what = "list" if kind is list else "object"
        raise ValueError(f"{path} has no {what} {name!r}; give the official file")
    return values[name]


def first_existing(folder: Path, *names: str) -> Path | None:
    """The first of these files or folders that exists, or None."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def image_folder(folder: Path, *names: str) -> Path:
    """The first of these folders that exists, otherwise the first, for the error message."""
    return first_existing(folder, *names) or folder / names[0]


# ---------------------------------------------------------------- Hugging Face datasets


@dataclass(frozen=True)
class Table:
    """The rows of a `datasets` folder or of parquet files. Images are decoded when opened."""

    path: Path
    rows: list[Row]  # without images
    stored: Callable[[int, str], list[Any]]  # (row, column) -> its images as they are stored
    decode: Callable[[Any], Image.Image]

    def image(self, i: int, column: str = "image", number: int = 0) -> ImageSource:
        return ImageSource(
            f"{self.path}, row {i}, {column}",
            lambda: self.decode(self.stored(i, column)[number]),
        )

    def count_images(self, i: int, column: str = "image") -> int:
        """The number of images of a row in a column; 0 if there is no such column."""
        return len(self.stored(i, column))


def find_table(folder: Path, *names: str) -> Table | None:
    """The rows of a split, or None if there are no files of it.

    It is looked for in `folder` and folder/NAME as saved by save_to_disk, and as parquet files
    NAME*.parquet in `folder` and in data/, or any in folder/NAME.
    """
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
            f"{path} holds arrow or parquet files, which need the package datasets; "
            "pip install 'minillava[eval]'"
        ) from None
    datasets.logging.set_verbosity(logging.CRITICAL)  # its failures are reported once, below
    datasets.disable_progress_bars()
    try:
        rows = read(datasets)
        columns = [name for name, kind in rows.features.items() if "Image(" in repr(kind)]
        for name in columns:
            plain = datasets.Image(decode=False)
            listed = not isinstance(rows.features[name], datasets.Image)
            rows = rows.cast_column(name, datasets.Sequence(plain) if listed else plain)
        plain_rows = [dict(row) for row in rows.remove_columns(columns)]
    except Exception as error:  # the library raises errors of many types
        raise ValueError(f"{path} cannot be read ({error}); download it again") from None

    def stored(i: int, column: str) -> list[Any]:
        if column not in columns:
            return []
        found = rows[i][column]
        return found if isinstance(found, list) else [found] if found else []

    return Table(path, plain_rows, stored, datasets.Image().decode_example)
