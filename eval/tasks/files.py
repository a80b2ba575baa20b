"""Read benchmark files as they are distributed into plain rows. Errors name the file and line."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..typed import refuse_special_file

Row = dict[str, Any]


def read_text(path: Path) -> str:
    """The text of a file, with its line ends as they are."""
    refuse_special_file(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); download it again") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); give a file") from None


def read_json(path: Path) -> Any:
    """Any JSON value. Raises ValueError with the line of the mistake."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; download or create it again")
    return _parse_json(text, path, 1)


def _parse_json(text: str, path: Path, line: int) -> Any:
    """A JSON value whose text begins in this line. NaN, which pandas writes for a missing value, is
    None."""
    try:
        return json.loads(text, parse_constant=_missing_value)
    except json.JSONDecodeError as error:
        line, why = line + error.lineno - 1, f"not valid JSON ({error.msg})"
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = str(error)
    raise ValueError(f"{path}, line {line}: {why}; download or create the file again")


def _missing_value(constant: str) -> None:
    if constant != "NaN":
        raise ValueError(f"{constant} is not a number of JSON")


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a file with one on each line. Empty lines are skipped."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = _parse_json(line, path, number)
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
    return list(rows)


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV or TSV file with a header. Values are text, with quotes as in pandas."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # fields contain images in base64
    delimiter = "\t" if path.suffix == ".tsv" else ","
    lines = io.StringIO(read_text(path), newline="\n")  # no other character ends a line
    reader = csv.reader(lines, delimiter=delimiter)
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
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; put the cell in quotes, or download the "
            "file again"
        ) from None
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


def text_field(row: Any, name: str, path: Path, number: object) -> str:
    """A required field that is text (ValueError otherwise)."""
    value = field(row, name, path, number)
    if not isinstance(value, str):
        raise _wrong(value, name, path, number, "text")
    return value


def list_field(row: Any, name: str, path: Path, number: object) -> list[Any]:
    """A required field that is a list (ValueError otherwise)."""
    value = field(row, name, path, number)
    if not isinstance(value, list):
        raise _wrong(value, name, path, number, "a list")
    return value


def options_field(row: Any, name: str, path: Path, number: object) -> list[str]:
    """A required list of answer options, which are texts or numbers, as texts (ValueError
    otherwise)."""
    values = list_field(row, name, path, number)
    return [option_field({name: value}, name, path, number) for value in values]


def option_field(row: Any, name: str, path: Path, number: object) -> str:
    """A required answer option, which is text or a number, as text (ValueError otherwise)."""
    value = field(row, name, path, number)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong(value, name, path, number, "text or a number")
    return str(value)


def id_field(row: Any, name: str, path: Path, number: object) -> str | int:
    """A required field that identifies a row: text or a whole number, also 3.0 for 3.

    Raises ValueError otherwise.
    """
    value = field(row, name, path, number)
    found = whole_number(value)
    if found is None and not isinstance(value, str):
        raise _wrong(value, name, path, number, "text or a whole number")
    return value if found is None else found


def int_field(row: Any, name: str, path: Path, number: object) -> int:
    """A required field that is a whole number, also as text such as "3" or "3.0" in CSV files."""
    value = field(row, name, path, number)
    is_text = isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,30}(\.0*)?\s*", value)
    found = int(value.partition(".")[0]) if is_text else whole_number(value)
    if found is None:
        raise _wrong(value, name, path, number, "a whole number")
    return found


def choice_field(row: Any, name: str, choices: int, path: Path, number: object) -> int | None:
    """The index of the right choice, from 0; None if the row has none (ValueError if it is another
    value)."""
    if row.get(name) is None:
        return None
    value = int_field(row, name, path, number)
    if not 0 <= value < choices:
        raise _wrong(value, name, path, number, f"from 0 to {choices - 1}")
    return value


def whole_number(value: object) -> int | None:
    """An int of an int, or of a float or decimal number without a fraction; otherwise None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return None


def _wrong(value: object, name: str, path: Path, number: object, wanted: str) -> ValueError:
    return ValueError(
        f"{path}: {number}: {name} is {repr(value)[:60]}, but must be {wanted}; give the official "
        "file"
    )


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
