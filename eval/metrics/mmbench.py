"""MMBench without a judge: the choice an answer names, and groups of rotated choices.

Source: lmms-eval's tasks/mmbench/mmbench_evals.py (can_infer, eval_result).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LETTERS = "ABCDE"  # E also where there are four choices: a judge says E for "none of these"
_FORMS = (
    "{}.",
    "{},",
    "{}:",
    "{})",
    "{}).",
    "({})",
    "({}).",
    ":{}",
    ":{},",
    ":{}.",
    ":{})",
    ":{}).",
)
_ROTATION = 1_000_000


@dataclass(frozen=True)
class Row:
    """One question with its choices in one order. inferred None: no choice was found."""

    index: int
    gold: str
    inferred: str | None


def infer(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of a choice: from one letter that stands alone, else one with the same mark, else
    the one choice whose text is in the answer. None where none or several are."""
    return _letter(text) or _text(text, choices)


def _letter(text: str) -> str | None:
    if "Failed to obtain answer via API" in text:
        return None
    words = set(text.split())
    alone = [letter for letter in _LETTERS if letter in words]
    article = "A" in words and len(text.split()) > 3
    if len(alone) == 1 and not article:
        return alone[0]
    for form in _FORMS:
        found = [letter for letter in _LETTERS if form.format(letter) in words]
        if len(found) == 1:
            return found[0]
    return None


def _text(text: str, choices: Mapping[str, str]) -> str | None:
    found = [letter for letter, choice in choices.items() if choice.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def circular(rows: Iterable[Row]) -> tuple[int, int]:
    """Number of questions that are right in every rotation of their choices, number of questions.

    The rotations of question i have the indices i, i + 1,000,000, i + 2,000,000 ...
    """
    groups: dict[int, list[bool]] = defaultdict(list)
    for row in rows:
        groups[row.index % _ROTATION].append(row.inferred == row.gold)
    return sum(map(all, groups.values())), len(groups)
