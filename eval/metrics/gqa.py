"""GQA: short answers.

Sources: LLaVA's convert_gqa_for_eval.py with GQA's own comparison, and lmms-eval's exact_match with
ignore_case and ignore_punctuation.
"""

from __future__ import annotations

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def llava_prediction(text: str) -> str:
    """The text that LLaVA's script submits: in lower case, without periods at the end."""
    return text.rstrip(".").lower()


def llava_correct(prediction: str, answer: str) -> bool:
    """Whether the submitted text equals the answer as it is written."""
    return llava_prediction(prediction) == answer


def lmms_correct(prediction: str, answer: str) -> bool:
    """Whether both are equal in lower case without ASCII punctuation; spaces count."""
    return _bare(prediction) == _bare(answer)


def _bare(text: str) -> str:
    # numpy keeps the length of an array's text where lower-casing would add a letter, and drops
    # zero bytes at its end.
    return text.rstrip("\0").lower()[: len(text)].translate(_NO_PUNCTUATION).rstrip("\0")
