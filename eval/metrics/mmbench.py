"""MMBench without a judge model: the choice that an answer names, and groups of rotations.

Sources: lmms-eval's tasks/mmbench/mmbench_evals.py (can_infer, eval_result), and its offline judge
("static") _task_utils/mcq_extract.py, for answers from which can_infer reads no letter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_LETTERS = "ABCDE"  # E even if there are four choices: a judge answers E for "none of these"
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
    """One question with one rotation of its choices. inferred is None if no choice was found."""

    index: int
    gold: str
    inferred: str | None


def infer(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the choice that an answer names, or None.

    It is the only letter that is a word by itself, otherwise the only letter with a mark such as
    "A.", otherwise the only choice whose text is in the answer.
    """
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


# (form that makes a letter a candidate, its weight); "{} " also matches words: "vitamin A "
_CANDIDATES = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_PHRASES = (
    *(
        f"{whose}{noun} is"
        for noun in ("answer", "correct answer", "best answer", "correct option", "best option")
        for whose in ("the ", "")
    ),
    *("the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def extract(text: str, letters: Sequence[str]) -> str | None:
    """The letter that lmms-eval's offline judge reads in an answer that `infer` cannot read.

    Of the letters in one of the forms, the one with the largest weight counts; of several with that
    weight, the last. Without any form, the last capital of these letters counts: "Cat" is a C. None
    if there is no such letter.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    lower = text.lower()
    found = [
        (weight, text.rfind(form.format(letter)), letter)
        for form, weight in _CANDIDATES
        for letter in letters
        if form.format(letter) in text
    ]
    for phrase in _PHRASES:
        if (at := lower.find(phrase)) >= 0:
            places = ((text.find(letter, at + len(phrase)), letter) for letter in letters)
            found += [(7, place, letter) for place, letter in places if place >= 0]
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text), letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else None


def circular(rows: Iterable[Row]) -> tuple[int, int]:
    """The number of questions that are right in every rotation, and the number of questions.

    The rotations of question i have the indices i, i + 1,000,000, i + 2,000,000 ...
    """
    groups: dict[int, list[bool]] = defaultdict(list)
    for row in rows:
        groups[question_of(row)].append(row.inferred == row.gold)
    return sum(map(all, groups.values())), len(groups)


def question_of(row: Row) -> int:
    """The index of the question that a row is a rotation of."""
    return row.index % _ROTATION
