"""Read files that a person or another program may have damaged, and check the types of values.

`find_type_error` compares a JSON value with the annotations of a dataclass or TypedDict. For
{"number": "3"} and a TypedDict with `number: int` it returns "number is '3', but must be int".
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

_SHOWN = 60  # characters of a value in messages


def refuse_special_file(path: Path) -> None:
    """Raise ValueError if the path is there, but is a folder, a pipe or another special file.

    Opening a named pipe would wait for its writer.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a special file"
        raise ValueError(f"{path} is {kind}, but must be a plain file; remove or rename it")


def parse_json(text: str | bytes) -> Any:
    """Any JSON value. Raises ValueError, one line, also for NaN, 1e400 and for deep nesting."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg})") from None


def _refuse_constant(text: str) -> None:
    raise ValueError(f"it has {text}, which is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"its number {text[:_SHOWN]} is too large")
    return value


def find_type_error(value: object, kind: Any, name: str = "it") -> str | None:
    """Why a JSON value does not have a type, or None if it has. name: of the value, in the reason.

    kind: str, int, float (integers too; both in the range of floats), bool, None, Any, a union, a
    list, tuple, Sequence or Mapping with the type of its values, a dataclass or a TypedDict. An
    object may have entries that its TypedDict does not name, but none that its dataclass does not
    name.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        reasons = [find_type_error(value, option, name) for option in args]
        return None if None in reasons else _wrong_type(value, kind, name)
    if kind is Any:
        return None
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _find_entry_error(value, kind, name)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            return _wrong_type(value, kind, name)
        inner = ((f"{name}.{key}", entry, args[1]) for key, entry in value.items())
    elif origin is not None:
        if not isinstance(value, list):
            return _wrong_type(value, kind, name)
        inner = ((f"{name}[{i}]", entry, args[0]) for i, entry in enumerate(value))
    else:
        return None if _is_plain(value, kind) else _wrong_type(value, kind, name)
    return next((reason for n, v, k in inner if (reason := find_type_error(v, k, n))), None)


def _find_entry_error(value: object, kind: Any, name: str) -> str | None:
    if not isinstance(value, dict):
        return _wrong_type(value, kind, name)
    hints, strict = _hints_of(kind), dataclasses.is_dataclass(kind)
    optional = (
        {f.name for f in dataclasses.fields(kind) if _has_default(f)}
        if strict
        else kind.__optional_keys__
    )
    for entry, inner in hints.items():
        if entry in value:
            full = entry if name == "it" else f"{name}.{entry}"
            if reason := find_type_error(value[entry], inner, full):
                return reason
        elif entry not in optional:
            return f"{name} has no {entry}"
    more = value.keys() - hints.keys() if strict else ()
    return f"{name} has {min(more)}, which is not known" if more else None


@lru_cache
def _hints_of(kind: type) -> dict[str, Any]:
    """get_type_hints, once for each type: files have a row for each of thousands of questions."""
    return get_type_hints(kind)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _is_plain(value: object, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if kind in (int, float):
        numbers = int if kind is int else int | float
        most = sys.float_info.max  # comparing also works for integers that no float can hold
        return isinstance(value, numbers) and -most <= value <= most
    return isinstance(value, kind)


def _wrong_type(value: object, kind: Any, name: str) -> str:
    wanted = str(kind) if get_origin(kind) or not hasattr(kind, "__name__") else kind.__name__
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return f"{name} is {shown}, but must be {wanted.removeprefix('collections.abc.')}"
