"""POPE: is there such a thing in the picture, yes or no.

Sources: LLaVA's eval_pope.py and lmms-eval's tasks/pope/utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Counts with yes as the positive, and shares of 1; None: a division by zero."""

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
    """ "no" where the first sentence has the word No, no or not, else "yes": so also for "NO", for
    no answer at all, and for a word that a new line ends."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def lmms_parse(text: str) -> str:
    """What lmms-eval compares with the label: all of the text, in lower case."""
    return text.lower().strip()


def llava_scores(labels: Sequence[str], texts: Sequence[str]) -> Scores:
    """LLaVA's script. yes_ratio: of the predictions. ValueError: a label other than yes or no,
    labels and texts of different number."""
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
    """lmms-eval: an answer counts only if it is yes or no and nothing else, what is undefined is 0,
    and yes_ratio is of the *labels*. ValueError as above."""
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
        raise ValueError(f"POPE has {len(labels)} labels but {len(said)} answers")
    clean = [label.lower().strip() for label in labels]
    for label, given in zip(clean, labels, strict=True):
        if label not in ("yes", "no"):
            raise ValueError(f"{given!r} is no label of POPE; give yes or no")
    return list(zip(clean, said, strict=True))


def _counts(pairs: Sequence[tuple[str, str]]) -> tuple[int, int, int, int]:
    return (
        pairs.count(("yes", "yes")),
        pairs.count(("no", "yes")),
        pairs.count(("no", "no")),
        pairs.count(("yes", "no")),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
