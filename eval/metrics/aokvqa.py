"""A-OKVQA, multiple choice, as FastV's inference_aokvqa.py counts it."""

from __future__ import annotations


def correct(text: str, letter: str) -> bool:
    """The letter occurs anywhere: "Cat" is right for C. Meant for answers of one token."""
    return letter in text
