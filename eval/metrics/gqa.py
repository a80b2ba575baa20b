"""GQA: one short answer.

Sources: LLaVA's convert_gqa_for_eval.py with GQA's own comparison, and lmms-eval's exact_match with
ignore_case and ignore_punctuation.
"""

from __future__ import annotations

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def llava_prediction(text: str) -> str:
    """What LLaVA's script submits: no periods at the end, no capitals."""
    return text.rstrip(".").lower()


def llava_correct(prediction: str, answer: str) -> bool:
    """The submitted text is the answer as it is written."""
    return llava_prediction(prediction) == answer


def lmms_correct(prediction: str, answer: str) -> bool:
    """Equal without capitals and ASCII punctuation on both sides; spaces count."""
    return _bare(prediction) == _bare(answer)


def _bare(text: str) -> str:
    # numpy keeps the length of the array's text where lower-casing would add a letter, and loses
    # zero bytes at its end.
    return text.rstrip("\0").lower()[: len(text)].translate(_NO_PUNCTUATION).rstrip("\0")
