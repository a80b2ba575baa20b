"""Check the metrics against cases with known results: `python -m eval.check FILE.json...`.

    python -m eval.check vqa_normalise.json cider_edge.json
    python -m eval.check *.json --json

A file's name begins with the kind of its cases: mme_parse_2.json has cases of mme_parse. A file
with another name is recognised by the fields of its first case. Every field of a case that our
metrics can compute is compared, numbers to 1e-9. A case is right if all its fields are. BLEU is not
computed. The exit code is 0 if all cases are right, 1 if some are not, and 2 for a file without
known cases.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillava.app.command import CommandParser, parse_path, run_command

from .check_kinds import CORPUS, KINDS, UNORDERED, Case, Kind, Result
from .metrics import ptb

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Miss:
    """A field whose value differs. case: the number of the case, from 1, and its name if any."""

    case: str
    field: str
    expected: Any
    came: Any


@dataclass(frozen=True)
class Checked:
    """The result of a file. tokeniser: the one that made the tokens of captions."""

    file: str
    kind: str
    right: int
    total: int
    misses: tuple[Miss, ...]
    not_compared: tuple[str, ...] = ()
    tokeniser: str | None = None


# Files.


def check(path: Path) -> Checked:
    """Check the cases of a file.

    Raises ValueError, one line, if the file cannot be read, if its kind is unknown, or if a case
    lacks a field or has a field of the wrong type.
    """
    document, cases = _load(path)
    name, kind = _kind(path, document, cases)
    for i, case in enumerate(cases, 1):
        _validate(case, kind, f"case {i} of {path}", name)
    try:
        results = kind.compute(cases)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = [f"{i} ({c['name']})" if "name" in c else str(i) for i, c in enumerate(cases, 1)]
    misses = [
        [Miss(case_name, *found) for found in _compare(kind, case, result)]
        for case_name, case, result in zip(names, cases, results, strict=True)
    ]
    if kind.totals:
        known = {n: v for n, v in kind.totals(results).items() if n in document}
        if known:
            wrong = [(n, document[n], v) for n, v in known.items() if not _same(document[n], v)]
            misses.append([Miss("whole file", *found) for found in wrong])
    compared = {*kind.needs, *kind.gives, *kind.further}
    return Checked(
        str(path),
        name,
        right=sum(not found for found in misses),
        total=len(misses),
        misses=tuple(miss for found in misses for miss in found),
        not_compared=tuple(sorted({f for case in cases for f in case} - compared - _LABELS)),
        tokeniser=ptb.tokenise([])[1] if kind.captions else None,
    )


_LABELS = {"name", "id", "subject", "options"}  # fields for the reader only


def _load(path: Path) -> tuple[Mapping[str, Any], list[Case]]:
    if path.exists() and not path.is_file():  # a pipe would wait for its writer
        raise ValueError(f"{path} cannot be read: it is not a plain file; give files of cases")
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give files of cases") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give files of cases") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not a JSON file; give files of cases") from None
    if isinstance(document, list):
        document = {"cases": document}
    where = next((k for k in _CONTAINERS if isinstance(document, dict) and k in document), None)
    cases = document[where] if where else None
    if not isinstance(cases, list) or not cases or not all(isinstance(c, dict) for c in cases):
        raise ValueError(
            f"{path} has no list of cases; it needs one under {', '.join(_CONTAINERS)}"
        )
    return document, cases


_CONTAINERS = ("cases", "items", "rows")


def _kind(path: Path, document: Mapping[str, Any], cases: Sequence[Case]) -> tuple[str, Kind]:
    if "items" in document and "cases" not in document:
        return "cider", CORPUS
    named = [name for name in KINDS if path.stem.startswith(name)]
    if named:
        name = max(named, key=len)
        return name, KINDS[name]
    fitting = [n for n, kind in KINDS.items() if {*kind.needs, *kind.gives} <= cases[0].keys()]
    if not fitting:
        raise ValueError(
            f"{path} is of no known kind by its name or its fields; kinds are {', '.join(KINDS)}"
        )
    name = max(fitting, key=lambda n: len(KINDS[n].needs) + len(KINDS[n].gives))
    return name, KINDS[name]


def _validate(case: Case, kind: Kind, where: str, name: str) -> None:
    lacking = [field_ for field_ in (*kind.needs, *kind.gives) if field_ not in case]
    if lacking:
        fields = ", ".join((*kind.needs, *kind.gives))
        raise ValueError(f"{where} has no {lacking[0]}; a case of {name} has {fields}")
    for field_, fits in kind.needs.items():
        if not fits(case[field_]):
            shown = json.dumps(case[field_])[:60]
            raise ValueError(f"{where} has a {field_} that is not of {name}: {shown}")
    for field_, fits in kind.forms.items():
        if field_ in case and not fits(case[field_]):
            raise ValueError(f"{where} has a {field_} that is not of {name}")


def _compare(kind: Kind, case: Case, result: Result) -> list[tuple[str, Any, Any]]:
    """(field, expected value, our value) of each field that differs."""
    wrong = []
    for name in (*kind.gives, *kind.further):
        source = name if name in case else kind.further.get(name)
        if source is None:
            continue
        expected, came = case[source], result[name]
        if name in UNORDERED and isinstance(expected, list) and isinstance(came, list):
            expected, came = _ordered(expected), _ordered(came)
        if not _same(expected, came):
            wrong.append((name, expected, came))
    return wrong


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Sort numbers, then texts; other lists stay unchanged."""
    if not all(isinstance(value, str | int | float) for value in values):
        return list(values)
    return sorted(values, key=lambda v: (isinstance(v, str), v))


def _same(expected: Any, came: Any) -> bool:
    """Whether values are equal: numbers to 1e-9, true and false as 1 and 0, expected fields of
    objects.
    """
    if isinstance(expected, dict):
        return isinstance(came, dict) and all(
            name in came and _same(value, came[name]) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(came, list)
            and len(expected) == len(came)
            and all(map(_same, expected, came))
        )
    if isinstance(expected, int | float) and isinstance(came, int | float):
        both_nan = math.isnan(expected) and math.isnan(came)
        return both_nan or math.isclose(expected, came, rel_tol=0, abs_tol=_TOLERANCE)
    return type(expected) is type(came) and expected == came


def format_report(checked: Sequence[Checked]) -> str:
    """A line for each file, followed by its misses, and the total at the end."""
    lines = []
    for file in checked:
        remarks = [file.kind]
        if file.tokeniser:
            remarks.append(f"tokens by {file.tokeniser}")
        if file.not_compared:
            remarks.append(f"not compared: {', '.join(file.not_compared)}")
        lines.append(f"{file.file}: {file.right}/{file.total} ({'; '.join(remarks)})")
        for miss in file.misses:
            expected, came = (json.dumps(v, ensure_ascii=False) for v in (miss.expected, miss.came))
            lines.append(f"  case {miss.case}, {miss.field}: expected {expected}, came {came}")
    right, total = (sum(getattr(file, n) for file in checked) for n in ("right", "total"))
    return "\n".join([*lines, f"total: {right}/{total}"])


def as_json(checked: Sequence[Checked]) -> str:
    return json.dumps(
        {
            "right": sum(file.right for file in checked),
            "total": sum(file.total for file in checked),
            "files": [dataclasses.asdict(file) for file in checked],
        },
        indent=2,
        ensure_ascii=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 1 or 2 as above, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.check", description="Check the metrics against known results."
    )
    parser.add_argument("files", metavar="FILE.json", nargs="+", type=parse_path)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )
    checked: list[Checked] = []

    def act() -> None:
        given = parser.parse_args(arguments)
        checked.extend(check(path) for path in given.files)
        print(as_json(checked) if given.json else format_report(checked), flush=True)

    code = run_command(act)
    return code or int(any(file.right != file.total for file in checked))


if __name__ == "__main__":
    sys.exit(main())
