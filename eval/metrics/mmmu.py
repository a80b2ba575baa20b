"""MMMU: the letters of multiple-choice answers, and the candidates in open ones.

Sources: the benchmark's eval_utils.py ("official") and lmms-eval's _task_utils/mmmu_mcq_utils.py
and tasks/mmmu/utils.py. Both guess at random if they find no letter. Here the result is None,
which is counted and wrong; `guesses` gives the guesses of the official figure.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

_TRIMMED = ",.!?;:'"
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def letters(options: Sequence[str]) -> list[str]:
    """A, B, ... for each option."""
    return [chr(ord("A") + i) for i in range(len(options))]


def choice(response: str, options: Sequence[str], official: bool = False) -> str | None:
    """The letter that a response chooses, or None if it is unparsed.

    The forms are tried in this order: "(A)", "A " and, for lmms-eval only, "A."; then, in responses
    of more than five words, the text of an option. Of several letters the last in the response
    counts. The official parser also needs a space before the letter in "A ".
    """
    for mark in _TRIMMED:  # one mark after the other: "A.," keeps its period, "A,." loses both
        response = response.strip(mark)
    response = f" {response} "
    options_of = dict(zip(letters(options), options, strict=True))

    def last(form: str) -> Callable[[str], int]:
        return lambda letter: response.rfind(form.format(letter))

    # (form that makes a letter a candidate, form whose last place decides between several)
    forms = [("({})", "({})"), (" {} ", " {} ")]
    if not official:
        forms = [("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")]
    for form, place in forms:
        found = [letter for letter in options_of if form.format(letter) in response]
        if found:
            return max(found, key=last(place))
    if len(response.split()) > 5:
        lower = response.lower()
        found = [letter for letter, text in options_of.items() if text.lower() in lower]
        if found:
            return max(found, key=lambda letter: lower.rfind(options_of[letter].lower()))
    return None


def guesses(seed: int = 42) -> Callable[[Sequence[str]], str]:
    """A function options -> random letter.

    With seed 42, and called for each None of `choice` in the order of the official files, it
    returns the letters of the official script.
    """
    generator = random.Random(seed)
    return lambda options: generator.choice(letters(options))


def numbers(text: str) -> list[str]:
    """The numbers as written: with commas for thousands, then with exponents, then plain ones."""
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def normalise(gold: str | Sequence[str]) -> list[str | float]:
    """Numbers rounded to two decimals, other texts in lower case.

    A single letter becomes two texts, with a space before and after it, so that it is not found
    inside words.
    """
    texts = [gold] if isinstance(gold, str) else gold
    return [form for text in texts for form in _forms(text.strip())]


def _forms(text: str) -> list[str | float]:
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def candidates(response: str) -> list[str | float]:
    """The possible answers in an open response.

    They are, for each line, the shortest text after a word such as "is" (in the last line also
    "="), or the complete response if there is none; and the numbers in these texts.
    """
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    tails = [_tail(line, last=i == len(lines) - 1) for i, line in enumerate(lines)]
    texts = [tail for tail in tails if tail not in ("", *_TRIMMED)] or [response]
    return list(dict.fromkeys(normalise([*texts, *(n for text in texts for n in numbers(text))])))


def _tail(line: str, last: bool) -> str:
    """The shortest text after the last occurrence of an indicator, or "" without any."""
    shortest = ""
    for indicator in (*_INDICATORS, "=") if last else _INDICATORS:
        if indicator in line:
            tail = line.split(indicator)[-1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def open_correct(response: str, gold: str | Sequence[str]) -> bool:
    """Whether a candidate text contains a gold text, or a candidate number equals a gold one."""
    golds = normalise(gold)
    texts = [form for form in golds if isinstance(form, str)]
    return any(
        any(text in said for text in texts) if isinstance(said, str) else said in golds
        for said in candidates(response)
    )
