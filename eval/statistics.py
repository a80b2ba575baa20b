"""Intervals of scores, and paired comparisons of two plans on the same questions.

A share of right answers has Wilson's interval, and a difference of two such shares on the same
questions has Tango's (Statistics in Medicine 17, 1998), which is the score interval of paired
answers as Wilson's is of one share. All other scores, such as VQA's soft accuracy, F1, MME's sums
and CIDEr-D, have the percentile interval of a bootstrap over questions. For CIDEr-D the document
frequencies stay those of all images. Questions about one picture count as independent. Samples of
questions that all have the same credit do not vary; such a score has the interval that Wilson's and
Tango's would be for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from .credits import Array, Credits

CONFIDENCE = 0.95
MOST_CONFIDENCE = 0.999  # five samples of the bootstrap are beyond each end
SAMPLES = 10_000  # of the bootstrap
_CELLS = 10_000_000  # counts that a bootstrap draws at most: about a second
_BLOCK = 2_000_000  # counts that are in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A score with its interval. low and high are None if there are too few questions for it."""

    value: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        """The interval as text: "61.4 to 70.2", or "-"."""
        return "-" if self.low is None else f"{self.low:.1f} to {self.high:.1f}"


@dataclass(frozen=True)
class Difference:
    """The second of two plans minus the first, on the same questions.

    lost: questions that are right under the first and wrong under the second plan; gained: the
    reverse. p: of McNemar's exact test on these two counts. distinguishable: the interval excludes
    0 and, where the score is a share of right answers, p is below 1 - confidence.
    """

    estimate: Estimate
    questions: int
    lost: int
    gained: int
    p: float
    distinguishable: bool


def least_questions(confidence: float) -> int:
    """The fewest questions with which two plans can differ at this confidence: 6 at 0.95.

    With fewer, even if one plan is right on all questions and the other on none, McNemar's exact p,
    which is then 2 / 2^n, is not below 1 - confidence.
    """
    return math.ceil(math.log2(2 / (1 - confidence)) - 1e-9)


def describe_too_few(questions: int, confidence: float) -> str | None:
    """A sentence if there are too few questions for an interval; otherwise None."""
    least = least_questions(confidence)
    if questions >= least:
        return None
    are = "question is" if questions == 1 else "questions are"
    return (
        f"{questions} {are} too few for a confidence of {100 * confidence:g} %: it takes at least "
        f"{least}, so there are no intervals"
    )


def estimate(credits: Credits, confidence: float = CONFIDENCE) -> Estimate:
    """The score of these credits with its interval."""
    value, n = credits.score, int((credits.denominator > 0).sum())
    if math.isnan(value) or n < least_questions(confidence):
        return Estimate(value, None, None)
    if (counts := credits.counts) is not None:
        found = stats.binomtest(*counts).proportion_ci(confidence, "wilson")
        return Estimate(value, credits.scale * found.low, credits.scale * found.high)
    low, high = _bounds(resample(credits), confidence)
    if low == high:
        apart, top = _unseen(credits, confidence), _largest(credits)
        low, high = max(0.0, low - apart), min(top, high + apart)
    return Estimate(value, low, high)


def compare(first: Credits, second: Credits, confidence: float = CONFIDENCE) -> Difference:
    """The difference of two plans. Raises ValueError if their questions are not the same."""
    if first.names != second.names:
        raise ValueError(
            f"answers to {len(first)} questions cannot be paired with answers to {len(second)} "
            "others; ask both plans the same questions"
        )
    n, value = len(first), second.score - first.score
    lost, gained = (first.right & ~second.right).sum(), (~first.right & second.right).sum()
    p = mcnemar(int(lost), int(gained))
    found, shares = Estimate(value, None, None), first.is_share and second.is_share
    if n >= least_questions(confidence) and not math.isnan(value):
        if shares:
            low, high = paired_interval(int(lost), int(gained), n, confidence)
            found = Estimate(value, first.scale * low, first.scale * high)
        else:
            low, high = _bounds(resample(second, first), confidence)
            apart = _unseen(first, confidence) if low == high else 0.0
            top = _largest(first)
            found = Estimate(value, max(-top, low - apart), min(top, high + apart))
    bounds = found.bounds
    differs = bounds is not None and not bounds[0] <= 0 <= bounds[1]
    if shares:
        differs = differs and p < 1 - confidence
    return Difference(found, n, int(lost), int(gained), p, differs)


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p of McNemar's test; 1 if no question changed."""
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def paired_interval(
    lost: int, gained: int, questions: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Tango's interval of the difference of two shares on the same questions, -1..1."""
    z, n = float(stats.norm.ppf((1 + confidence) / 2)), questions

    def score(delta: float) -> float:
        """(gained - lost - n delta) in standard deviations, if the true difference is delta."""
        b = (2 * n - gained + lost) * delta - lost - gained
        root = math.sqrt(max(b * b + 8 * n * lost * delta * (1 - delta), 0.0))
        fewer = (root - b) / (4 * n)  # share of lost questions, most likely under delta
        variance = n * (2 * fewer + delta * (1 - delta))
        apart = gained - lost - n * delta
        return apart / math.sqrt(max(variance, 1e-12))

    found, end = (gained - lost) / n, 1 - 1e-12
    low = optimize.brentq(lambda d: score(d) - z, -end, found) if lost < n else -1.0
    high = optimize.brentq(lambda d: score(d) + z, found, end) if gained < n else 1.0
    return float(low), float(high)


def resample(credits: Credits, minus: Credits | None = None) -> Array:
    """Scores of bootstrap samples of the questions, less those of `minus` on the same samples.

    Questions of one group stay in it: each sample has as many of them. Questions with equal credits
    are drawn together, as counts of a multinomial distribution. It is the same bootstrap, and
    10,000 answers that are right or wrong take milliseconds.
    """
    both = [credits] if minus is None else [credits, minus]
    columns = [x for c in both for x in (c.numerator, c.denominator)]
    kinds, each = np.unique(
        np.column_stack([credits.group, *columns]), axis=0, return_counts=True
    )  # (k, 1 + 2 * len(both)), (k,)
    small = [
        replace(
            c,
            credit=kinds[:, 1],
            numerator=kinds[:, 1 + 2 * i],
            denominator=kinds[:, 2 + 2 * i],
            group=kinds[:, 0].astype(np.int64),
        )
        for i, c in enumerate(both)
    ]
    rng, found = np.random.default_rng(0), list[Array]()
    left = max(1000, min(SAMPLES, _CELLS // len(kinds)))
    while left > 0:
        block = min(left, max(1, _BLOCK // len(kinds)))
        counts = np.zeros((block, len(kinds)))
        for g in np.unique(kinds[:, 0]):
            mine = kinds[:, 0] == g
            n = int(each[mine].sum())
            counts[:, mine] = rng.multinomial(n, each[mine] / n, size=block)
        scores = [c.scores(counts) for c in small]
        found.append(scores[0] - scores[1] if minus is not None else scores[0])
        left -= block
    return np.concatenate(found)


def _bounds(values: Array, confidence: float) -> tuple[float, float]:
    low, high = np.nanquantile(values, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def _unseen(credits: Credits, confidence: float) -> float:
    """How far a score may be from one that no sample of the questions changes.

    Of n questions with the same credit, Wilson's interval leaves z^2 / (n + z^2) for questions with
    another credit, which differ by `most`. The groups are independent: their squares add up.
    """
    z2 = float(stats.norm.ppf((1 + confidence) / 2)) ** 2
    _, sizes = np.unique(credits.group[credits.denominator > 0], return_counts=True)
    apart = credits.scale * credits.most * np.sqrt(np.sum((z2 / (sizes + z2)) ** 2))
    return float(apart / len(sizes) if credits.mean else apart)


def _largest(credits: Credits) -> float:
    """The highest score that is possible."""
    groups = 1 if credits.mean else len(set(credits.group.tolist()))
    return credits.scale * credits.most * groups
