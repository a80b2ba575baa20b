"""Parts of a benchmark's questions: those that tell plans apart.

Most questions of the usual benchmarks can be answered from a small picture, so that all plans get
them right (VTC-Bench, arXiv 2510.07143). A question is `hard` if it is wrong under plain
downsampling to as many image tokens as the plan that is judged leaves, and `easy` otherwise:
downsampling of the picture (`downsample`), or where that was not asked of its features (`pool`). It
`needs-picture` if it is wrong without the picture, and is `picture-free` otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import comparison, downsample
from .answers import Answers
from .statistics import CONFIDENCE, Difference, Estimate, compare, estimate

DOWNSAMPLED = (downsample.NAME, "pool")  # in the order in which they are taken
WITHOUT_PICTURE = "text-only"
NEAR = 0.1  # share by which the image tokens of a plan and of its downsampling may differ
SUBSETS = ("hard", "easy", "needs-picture", "picture-free", "hard and needs-picture")

Chosen = NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """A plan's score on a part of the questions, and its difference to the unpruned model there."""

    plan: str
    subset: str
    judge: str  # the plan or plans whose answers make the subset
    estimate: Estimate
    questions: int
    against: Difference | None  # None without unpruned answers


def find_judge(answers: Answers, plans: Sequence[Answers]) -> Answers:
    """The downsampling plan among `plans` with as many image tokens a layer as `answers`.

    Raises ValueError if there is none.
    """
    tokens = answers.result.costs.image_tokens
    for name in DOWNSAMPLED:
        there = [p for p in plans if p.plan.partition(":")[0] == name]
        best = min(there, key=lambda p: abs(_budget(p) - tokens), default=None)
        if best is not None and abs(_budget(best) - tokens) <= NEAR * tokens:
            return best
    raise ValueError(
        f"{answers.plan} leaves {tokens:.1f} image tokens a layer, and there are no answers under "
        f"{' or '.join(DOWNSAMPLED)} with as many; ask "
        f"{DOWNSAMPLED[0]}:keep={max(1, round(tokens))} with eval.run, or name a plan with --judge"
    )


def _budget(answers: Answers) -> float:
    """The image tokens a layer of a downsampling plan."""
    return downsample.budget_of(answers.plan) or answers.result.costs.image_tokens


def subsets(judge: Answers | None, blind: Answers | None) -> dict[str, Chosen]:
    """Subset -> which questions it has (n,). Without one of the plans, its subsets are missing."""
    found: dict[str, Chosen] = {}
    if judge is not None:
        found |= {"hard": ~judge.credits.right, "easy": judge.credits.right}
    if blind is not None:
        found |= {"needs-picture": ~blind.credits.right, "picture-free": blind.credits.right}
    if judge is not None and blind is not None:
        found["hard and needs-picture"] = found["hard"] & found["needs-picture"]
    return found


def split(
    answers: Answers,
    judge: Answers | None,
    blind: Answers | None,
    unpruned: Answers | None,
    confidence: float = CONFIDENCE,
) -> list[Part]:
    """The scores of a plan on each subset."""
    for other in (judge, blind, unpruned):
        if other is not None:
            answers.compare(other)  # refuses answers that cannot be paired
    judges = {
        "hard": [judge],
        "easy": [judge],
        "needs-picture": [blind],
        "picture-free": [blind],
        "hard and needs-picture": [judge, blind],
    }
    found = []
    for name, chosen in subsets(judge, blind).items():
        mine = answers.credits.select(chosen)
        against = None
        if unpruned is not None and unpruned is not answers and len(mine):
            against = compare(unpruned.credits.select(chosen), mine, confidence)
        by = " and ".join(f"`{j.plan}`" for j in judges[name] if j is not None)
        score = estimate(mine, confidence) if len(mine) else Estimate(float("nan"), None, None)
        found.append(Part(answers.plan, name, by, score, len(mine), against))
    return found


def members_of(answers: Answers, chosen: Chosen) -> list[int]:
    """The indices of the questions of a subset, with all rotations or pairs of each."""
    picked = answers.credits.select(chosen)
    return sorted(i for own in picked.members for i in own)


def format_parts(parts: Sequence[Part], metric: str, confidence: float = CONFIDENCE) -> str:
    """The parts as a Markdown table."""
    percent = f"{100 * confidence:g} %"
    head = ["plan", "questions", "by the answers of", "n", metric, percent]
    head += ["minus unpruned", percent, ""]
    rows = [
        [
            f"`{part.plan}`",
            part.subset,
            part.judge,
            str(part.questions),
            f"{part.estimate.value:.2f}" if part.questions else "-",
            str(part.estimate),
            *_cells(part.against),
        ]
        for part in parts
    ]
    return comparison.format_rows(head, rows, left=3)


def _cells(against: Difference | None) -> list[str]:
    return ["-", "-", ""] if against is None else comparison.format_difference(against)
