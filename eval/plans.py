"""Read the plans that a person types for a command of eval, and name the files of their results.

A part FILE.py:Class of a plan is a user's own method, and reading the plan runs that file. So only
text that a person typed may be read here. Text from other places (result files, arguments of
lmms-eval) is read by `minillava.parse_plan`, which never runs a file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minillava.pruning import parse_plan_with_files
from minillava.pruning.base import Plan
from minillava.pruning.user_methods import SPEC

NONE = "none"  # the plan of the unpruned model
LONGEST = 120  # characters of a file name, without its suffix

_NUMBER = r"-?(\d+(\.\d+)?|\.\d+)"
_VALUE = rf"([a-z]+|{_NUMBER}(/{_NUMBER})*)"
_METHOD = rf"[a-z][a-z0-9-]*(:[a-z_]+={_VALUE}(,[a-z_]+={_VALUE})*)?"
_PLAIN = re.compile(rf"{_METHOD}(\+{_METHOD})*", re.ASCII)


@dataclass(frozen=True)
class TypedPlan:
    """A plan with the text that it was read from.

    method_files: path as typed -> sha256 of each user's own method file; None for a plan with the
    package's methods only.
    """

    text: str
    plan: Plan
    method_files: Mapping[str, str] | None = None


def read_plan(text: str) -> TypedPlan:
    """Read a plan that a person typed, and run the method files that it names.

    "none" means no pruning. Raises ValueError for a mistake in the plan or in a file.
    """
    # The digest comes first: if the file is edited in between, the next resume refuses it.
    files = {file: digest_file(Path(file)) for file in files_of(text) if Path(file).is_file()}
    return TypedPlan(text, parse_plan_with_files("" if text == NONE else text), files or None)


def read_plans(texts: Iterable[str]) -> dict[str, TypedPlan]:
    """Read plans; returns them by text, in order and without repetitions (ValueError as above)."""
    return {text: read_plan(text) for text in dict.fromkeys(texts)}


def files_of(text: str) -> list[str]:
    """The files that a plan names as FILE.py:Class. No file is run."""
    found = (SPEC.fullmatch(part.strip()) for part in text.split("+"))
    return [match["file"] for match in found if match]


def digest_file(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def file_name(text: str) -> str:
    """The name of a plan's files, without their suffix: fastv:k=8,r=.5 -> fastv_k=8,r=.5.

    A plain plan has only names of methods and options, numbers, and words as values. Two of them
    have different names by their letters alone. Any other text (with a path, blanks or capitals)
    ends with a part of its sha256, because two texts may be equal without the characters that do
    not belong in a file name. No name is empty, and none begins with a dash or a dot.
    """
    name = re.sub(r"[^A-Za-z0-9.,=+_-]+", "_", text.replace("/", "-")).strip("._")
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    if not _PLAIN.fullmatch(text):
        return f"{name[: LONGEST - 20].strip('._-') or 'plan'}-{sha256}"
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 20]}-{sha256}"
