"""Read a checkpoint's JSON files entry by entry, with errors that name the entry.

Every value is read by type and within bounds, so whatever a file contains is either used as it was
meant or refused with a ValueError of one short line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .error_text import cut, cut_path, shorten
from .regular_files import MB, is_present, read_bytes

MAX_INTEGER = 10**7  # larger than any size in a checkpoint
SMALL_FILE = 16 * MB  # more than any of a checkpoint's JSON files but tokenizer.json


@dataclass(frozen=True)
class Only:
    """In a table of entries: one that is computed for these values alone; None means absent."""

    values: tuple[Any, ...]
    todo: str = ""  # what to do about another value


@dataclass(frozen=True)
class Followed:
    """In a table of entries: one that is read and followed."""


@dataclass(frozen=True)
class Unused:
    """In a table of entries: one that changes no answer, with the reason."""

    reason: str


Table = Mapping[str, Only | Followed | Unused]


class Entries:
    """One object of a JSON file, whose entries are read by type and checked.

    An entry that is null counts as absent and gets the default. `seen` collects the keys read.
    """

    def __init__(self, source: str, section: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.name = section
        self.values = values
        self.seen: set[str] = set()

    def where(self, key: str) -> str:
        """The place of an entry as errors show it: "config.json: text_config.hidden_size"."""
        return f"{cut_path(self.source)}: {cut(self.name + key)}"

    def error(self, key: str, value: object, allowed: str, todo: str = "") -> ValueError:
        todo = todo or "use a LLaVA-1.5 checkpoint such as llava-hf/llava-1.5-7b-hf"
        return ValueError(f"{self.where(key)} is {shorten(value)}, but must be {allowed}; {todo}")

    def check(self, table: Table) -> None:
        """Raises ValueError for an entry that has a value the table does not allow."""
        for key, rule in table.items():
            if isinstance(rule, Only):
                self.only(key, rule.values, None, rule.todo)

    def section(self, key: str, default: Mapping[str, Any]) -> Entries:
        """The object under `key`."""
        self.seen.add(key)
        value = self.values.get(key)
        if not isinstance(value, Mapping | None):
            raise self.error(key, value, "an object", "correct the file")
        return Entries(self.source, f"{self.name}{key}.", default if value is None else value)

    def only(self, key: str, allowed: tuple[Any, ...], default: Any, todo: str = "") -> Any:
        """An entry that may only have one of the values in `allowed`."""
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        # Types must agree too, since True == 1 in Python.
        if not any(value == a and type(value) in (type(a), float) for a in allowed):
            known = " or ".join("absent" if a is None else shorten(a) for a in allowed)
            raise self.error(key, value, known, todo)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.only(key, (False, True), default, "correct the file"))

    def integer(self, key: str, default: int, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or not minimum <= value <= maximum:
            allowed = f"one whole number of at least {minimum}, at most {maximum}"
            raise self.error(key, value, allowed)
        return value

    def number(
        self, key: str, default: float | None, maximum: float, minimum: float = 0.0
    ) -> float:
        """A number above 0 within the two bounds. With the default None it is required."""
        self.seen.add(key)
        value: Any = self.values.get(key)
        value = default if value is None else value
        # The bounds are compared before float(), which fails for a whole number of 400 digits.
        if type(value) not in (int, float) or not value > 0 or not minimum <= value <= maximum:
            least = f"of at least {minimum:g}" if minimum else "above 0"
            raise self.error(key, value, f"a number {least}, at most {maximum:g}")
        return float(value)

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids, written as one or as a list; () if the entry is absent."""
        self.seen.add(key)
        value = self.values.get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in found):
            allowed = f"a token id or a list of token ids from 0 to {vocab_size - 1}"
            raise self.error(key, value, allowed)
        return tuple(found)

    def multiple(self, key: str, value: int, of: str, divisor: int) -> None:
        if value % divisor:
            raise self.error(key, value, f"a multiple of {of}={divisor}", "correct the file")


def read_entries(path: str | Path) -> Entries:
    """The entries of a JSON file, or no entries if it is not there. Raises as read_json does."""
    return Entries(str(path), "", read_json(path) if is_present(path) else {})


def read_json(path: str | Path, limit: int = SMALL_FILE) -> dict[str, Any]:
    """Read a JSON file of at most `limit` bytes that contains an object.

    Raises ValueError if it does not, or if it is not a regular file.
    """
    name = cut_path(path)
    data = read_bytes(path, limit)
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is not valid json ({cut(str(error))}); download the file again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{name} contains {type(content).__name__}, but must be an object; download it again"
        )
    return content
