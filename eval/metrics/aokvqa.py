"""A-OKVQA, multiple choice, as in FastV's inference_aokvqa.py."""

from __future__ import annotations


def correct(text: str, letter: str) -> bool:
    """Whether the letter occurs anywhere: "Cat" is right for C. Answers should be one token."""
    return letter in text
