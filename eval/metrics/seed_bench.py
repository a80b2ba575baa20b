"""SEED-Bench: the letter of an answer.

Sources: LLaVA's convert_seed_for_submission.py (its predictions are stripped when they are
written) and lmms-eval's tasks/seedbench/utils.py.
"""

from __future__ import annotations


def llava_correct(text: str, letter: str) -> bool:
    """Whether the text is the letter and nothing else."""
    return text.strip() == letter


def lmms_correct(text: str, letter: str) -> bool:
    """Whether the first character is the letter, in either case: "Answer: B" is an A."""
    return text.strip()[:1].lower().strip() == letter.lower().strip()
