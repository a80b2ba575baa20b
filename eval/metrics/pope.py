"""POPE: is an object in the image, yes or no.

Sources: LLaVA's eval_pope.py and lmms-eval's tasks/pope/utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Counts with yes as the positive class, and shares 0..1; None for a division by zero."""

    tp: int
    fp: int
    tn: int
    fn: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float | None


def parse(text: str) -> str:
    """ "no" if the first sentence has the word No, no or not, otherwise "yes".

    So "NO", an empty answer and a "no" before a line break are a "yes".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def lmms_parse(text: str) -> str:
    """The text that lmms-eval compares with the label: all of it, in lower case."""
    return text.lower().strip()


def llava_scores(labels: Sequence[str], texts: Sequence[str]) -> Scores:
    """The scores of LLaVA's script. yes_ratio is that of the predictions.

    Raises ValueError for a label other than yes or no, and for unequal numbers of labels and texts.
    """
    pairs = _pairs(labels, [parse(text) for text in texts])
    tp, fp, tn, fn = _counts(pairs)
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    f1 = None
    if precision is not None and recall is not None:
        f1 = _ratio(2 * precision * recall, precision + recall)
    return Scores(
        tp,
        fp,
        tn,
        fn,
        accuracy=_ratio(tp + tn, len(pairs)),
        precision=precision,
        recall=recall,
        f1=f1,
        yes_ratio=_ratio(tp + fp, len(pairs)),
    )


def lmms_scores(labels: Sequence[str], texts: Sequence[str]) -> Scores:
    """The scores of lmms-eval, where an answer counts only if it is yes or no and nothing else.

    Undefined scores are 0, and yes_ratio is that of the *labels*. ValueError as for llava_scores.
    """
    pairs = _pairs(labels, [lmms_parse(text) for text in texts])
    tp, fp, tn, fn = _counts(pairs)
    precision, recall = _ratio(tp, tp + fp) or 0.0, _ratio(tp, tp + fn) or 0.0
    return Scores(
        tp,
        fp,
        tn,
        fn,
        accuracy=_ratio(tp + tn, len(pairs)),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall) or 0.0,
        yes_ratio=_ratio(sum(label == "yes" for label, _ in pairs), len(pairs)) or 0.0,
    )


def _pairs(labels: Sequence[str], said: Sequence[str]) -> list[tuple[str, str]]:
    if len(labels) != len(said):
        raise ValueError(
            f"POPE has {len(labels)} labels but {len(said)} answers; give one for each"
        )
    clean = [label.lower().strip() for label in labels]
    for label, given in zip(clean, labels, strict=True):
        if label not in ("yes", "no"):
            raise ValueError(f"{given!r} is not a label of POPE; give yes or no")
    return list(zip(clean, said, strict=True))


def _counts(pairs: Sequence[tuple[str, str]]) -> tuple[int, int, int, int]:
    return (
        pairs.count(("yes", "yes")),
        pairs.count(("no", "yes")),
        pairs.count(("no", "no")),
        pairs.count(("yes", "no")),
    )


def _ratio(part: float, total: float) -> float | None:
    return part / total if total else None
