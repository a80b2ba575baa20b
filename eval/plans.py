"""Plans as a person types them for a command of eval: each is read once, with a name for its files.

A part FILE.py:Class of a plan is a method of the user's own, and reading it runs that file. So only
text that a person typed is read here. Text from elsewhere (files that are read back, arguments of
lmms-eval) goes through `minillava.parse_plan`, which never runs a file.
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

    method_files: the sha256 of each file of the user's own, by its path as typed; None for a plan
    of the package's methods alone.
    """

    text: str
    plan: Plan
    method_files: Mapping[str, str] | None = None


def read_plan(text: str) -> TypedPlan:
    """Read a plan that a person typed; "none" prunes nothing. Runs the files that it names.

    Raises ValueError as parse_plan does.
    """
    # The digest is taken first: a file that is edited meanwhile is then refused at the next resume.
    files = {file: digest(Path(file)) for file in files_of(text) if Path(file).is_file()}
    return TypedPlan(text, parse_plan_with_files("" if text == NONE else text), files or None)


def read_plans(texts: Iterable[str]) -> dict[str, TypedPlan]:
    """Plans by their text, in order, each text once (ValueError as above)."""
    return {text: read_plan(text) for text in dict.fromkeys(texts)}


def files_of(text: str) -> list[str]:
    """The files that a plan names as FILE.py:Class. Nothing is run."""
    found = (SPEC.fullmatch(part.strip()) for part in text.split("+"))
    return [match["file"] for match in found if match]


def digest(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def file_name(text: str) -> str:
    """The name of a plan's files, without their suffix: fastv:k=8,r=.5 -> fastv_k=8,r=.5.

    Plain plans, of the package's methods with numbers and words as values, can be told apart by
    their letters alone. Any other text (paths, blanks, capitals) gets a part of its sha256 behind
    it, since two texts may look alike without the characters that a file name should not have. No
    name is empty or begins with a dash or a dot.
    """
    name = re.sub(r"[^A-Za-z0-9.,=+_-]+", "_", text.replace("/", "-")).strip("._")
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    if not _PLAIN.fullmatch(text):
        return f"{name[: LONGEST - 20].strip('._-') or 'plan'}-{sha256}"
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 20]}-{sha256}"
