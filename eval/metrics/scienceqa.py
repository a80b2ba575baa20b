"""ScienceQA: the letter of an answer.

Sources: LLaVA's eval_science_qa.py, Simignore's eval_scienceqa.py, lmms-eval's
tasks/scienceqa/utils.py. The caller must check that the letter is one of the question's
choices; otherwise the answer is wrong.
"""

from __future__ import annotations

import re

RULES = ("llava", "simignore")
_OPTIONS = tuple("ABCDE")
_SENTENCE = re.compile(
    r"The answer is ([A-Z])."
)  # the period matches any character, as in the scripts
_BRACKETED = re.compile(r"\(([A-E])\)")


def parse(text: str, rule: str) -> str | None:
    """The letter, or None if the scripts say FAILED. Raises ValueError for an unknown rule.

    "llava" reads the letter alone, "A. ..." or exactly one "The answer is A." with any character
    at its end. "simignore" also reads "(A)...", "A)...", "The correct answer is (A", exactly one
    bracketed letter anywhere, and the first "The correct answer is (A)".
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r} for ScienceQA's answers; give one of {RULES}")
    if text in _OPTIONS:
        return text
    starts = {f"{letter}. ": letter for letter in _OPTIONS}
    if rule == "simignore":
        for letter in _OPTIONS:
            starts |= {f"({letter})": letter, f"{letter})": letter}
            starts[f"The correct answer is ({letter}"] = letter
    for start, letter in starts.items():
        if text.startswith(start):
            return letter
    sentences = _SENTENCE.findall(text)
    if len(sentences) == 1:
        return sentences[0]
    if rule == "llava":
        return None
    bracketed = _BRACKETED.findall(text)
    if len(bracketed) == 1:
        return bracketed[0]
    correct = re.search(r"The correct answer is \(([A-E])\)", text)
    return correct[1] if correct else None


def lmms_correct(text: str, gold_letter: str) -> bool:
    """lmms-eval's rule: the letter in either case, or as a capital with a period after it."""
    gold, text = gold_letter.strip().lower(), text.strip()
    if text.lower() == gold:
        return True
    return text[1:2] == "." and text[0].isupper() and text[0].lower() == gold
