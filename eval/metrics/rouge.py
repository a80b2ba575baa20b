"""ROUGE-L, and FastV's normalisation of OCR-VQA's answers before it.

Sources: FastV's inference_ocrvqa.py, pycocoevalcap's rouge.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import vqa

_BETA = 1.2


def clean(text: str) -> str:
    """VQAv2's normaliser, but only a single comma between digits makes a number."""
    return vqa.normalise(text, r"\d,\d")


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L, 0..1, of texts that are split at single spaces: an empty text has one empty token.

    Precision is the best over all references, and so is recall, independently of it. Raises
    ValueError without references.
    """
    if not references:
        raise ValueError("ROUGE-L needs at least one reference")
    said = candidate.split(" ")
    golds = [reference.split(" ") for reference in references]
    common = [_common(said, gold) for gold in golds]
    precision = max(common) / len(said)
    recall = max(n / len(gold) for n, gold in zip(common, golds, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0
        for j, y in enumerate(b):
            above = row[j + 1]
            row[j + 1] = corner + 1 if x == y else max(above, row[j])
            corner = above
    return row[-1]
