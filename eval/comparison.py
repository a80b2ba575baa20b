"""Tables of plans compared on the same questions, as text."""

from __future__ import annotations

import statistics as numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .answers import Answers
from .plans import NONE
from .statistics import CONFIDENCE, Difference, describe_too_few

ALL_PAIRS = 6  # plans; of more, each is compared with the first only
SAME = "not distinguishable"
EACH_ALONE = (
    "each comparison is judged by itself: of 20 pairs of equal plans, about one is called different"
)


@dataclass(frozen=True)
class Pair:
    """Two plans and their difference, the second minus the first."""

    first: str
    second: str
    difference: Difference


def unpruned_first(plans: Sequence[Answers]) -> list[Answers]:
    """The plans with the unpruned one, if there is one, in front."""
    return sorted(plans, key=lambda answers: answers.plan != NONE)


def compare_all(
    plans: Sequence[Answers], confidence: float = CONFIDENCE, all_pairs: bool | None = None
) -> list[Pair]:
    """Compare each plan with the first, and all pairs if asked or if there are few plans."""
    if all_pairs is None:
        all_pairs = len(plans) <= ALL_PAIRS
    return [
        Pair(a.plan, b.plan, b.compare(a, confidence))
        for i, a in enumerate(plans if all_pairs else plans[:1])
        for b in plans[i + 1 :]
    ]


def format_pairs(pairs: Sequence[Pair], metric: str, confidence: float = CONFIDENCE) -> str:
    """The comparisons as a Markdown table with notes below."""
    percent = f"{100 * confidence:g} %"
    rows = [
        [
            f"`{pair.second}`",
            f"`{pair.first}`",
            value,
            interval,
            str(pair.difference.lost),
            str(pair.difference.gained),
            f"{pair.difference.p:.2g}",
            said,
        ]
        for pair in pairs
        for value, interval, said in [format_difference(pair.difference)]
    ]
    head = ["plan", "minus", metric, percent, "right to wrong", "wrong to right", "McNemar's p", ""]
    notes = [EACH_ALONE] if len(pairs) > 1 else []
    if pairs and (few := describe_too_few(pairs[0].difference.questions, confidence)):
        notes.append(few)
    return "\n\n".join([format_rows(head, rows, left=2), *notes])


def format_seeds(plans: Sequence[Answers], metric: str) -> str:
    """The scores of plans that draw at random over their seeds; empty if none has several."""
    return format_spread(
        {a.plan: {s.result.run.seed: s.credits.score for s in a.seeds} for a in plans}, metric
    )


def format_spread(plans: Mapping[str, Mapping[int, float]], metric: str) -> str:
    """Plan -> seed -> score as a Markdown table, without the plans that have one seed only."""
    rows = [
        [
            f"`{plan}`",
            ", ".join(map(str, scores)),
            f"{numbers.mean(scores.values()):.2f}",
            f"{numbers.stdev(scores.values()):.2f}",
            f"{min(scores.values()):.2f} to {max(scores.values()):.2f}",
        ]
        for plan, scores in plans.items()
        if len(scores) > 1
    ]
    head = ["plan", "seeds", f"mean {metric}", "standard deviation", "lowest to highest"]
    return format_rows(head, rows) if rows else ""


def format_agreement(plans: Sequence[Answers], confidence: float = CONFIDENCE) -> str:
    """How often plans answer as the unpruned model does, and the KL of their first token.

    Empty without the unpruned model. plans: the unpruned one first.
    """
    if plans[0].plan != NONE or len(plans) < 2:
        return ""
    rows = []
    for answers in plans[1:]:
        same, kl = answers.agreement(plans[0], confidence), answers.mean_kl
        cells = [f"{same.value:.2f}", str(same), "-" if kl is None else f"{kl:.3g}"]
        rows.append([f"`{answers.plan}`", *cells])
    head = ["plan", "same answer as unpruned, %", f"{100 * confidence:g} %", "KL of first token"]
    table = format_rows(head, rows)
    if any(answers.mean_kl is None for answers in plans[1:]):
        table += (
            f"\n\nKL: mean in nats; - where {NONE} was not asked before the plan, by this version"
        )
    return table


def format_rows(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table. left: the number of columns that are not numbers."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|---" * left + "|---:" * (len(head) - left) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def format_difference(d: Difference) -> list[str]:
    """The cells of a difference: value, interval, and whether the plans can be told apart."""
    bounds, said = d.estimate.bounds, "" if d.distinguishable else SAME
    interval = "-" if bounds is None else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"
    return [f"{d.estimate.value:+.2f}", interval, said]
