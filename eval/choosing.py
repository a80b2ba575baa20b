"""Which plan is the cheapest whose loss is surely below a bound: the rule, on arrays.

The loss of a plan is the mean over questions of d = credit of the unpruned answer - credit of the
plan's, which is from -1 to 1; for answers that are right or wrong d is -1, 0 or 1. Questions come
in a random order, and a plan may be looked at after any number of them.

A plan is called safe when there is enough evidence against "its loss is the bound or more". The
evidence is a test martingale, the capital of somebody who bets on every question that the plan
loses less (Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B
86, 2024, arXiv 2010.09686): the mean over shares c of the product of 1 + c (bound - d) / (1 -
bound). If the loss is the bound or more, its mean never rises above 1. So by Ville's inequality
(1939) it ever reaches 1 / level with a probability of at most `level`, however often one looks and
whatever decides how many questions are asked. With M plans the level is (1 - confidence) / M
(Bonferroni): with the probability `confidence` no plan at all whose loss is the bound or more is
called safe, so that the cheapest safe plan can be taken. (Risk control over a grid of settings, as
in Learn then Test, arXiv 2110.01052.) "Too lossy" is the same claim in the other direction.

Questions are given out by successive halving (Karnin, Koren and Somekh, ICML 2013; Jamieson and
Talwalkar, arXiv 1502.07943): of the plans with equally many answers, the better half goes on with
twice as many. What was set aside is taken up again when the others turn out worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .credits import Array

SAFE, LOSSY, OPEN = "safe", "too lossy", "undecided"
HALVINGS = 4  # the first sample is 1/16 of the questions
SHARE = 1 / 3  # of the answers of the full grid that are asked at most
_BETS = 1 / (1 + np.exp(-np.linspace(-4.0, 4.0, 17)))  # shares c of the largest possible bet


@dataclass(frozen=True)
class Rule:
    """What is asked for. bound: of the loss, as a share of 1: 0.01 is one point."""

    bound: float
    confidence: float
    plans: int  # M candidates; the unpruned model is not one of them
    questions: int  # there are so many
    share: float = SHARE

    def __post_init__(self) -> None:
        if not 0 < self.bound < 1:
            raise ValueError(
                f"a loss of {100 * self.bound:g} points must be above 0 and below 100, such as 1.0"
            )
        if not 0.5 <= self.confidence < 1:
            raise ValueError(
                f"a confidence of {self.confidence:g} must be from 0.5 to below 1, such as 0.95"
            )
        if self.plans < 1:
            raise ValueError("there are no plans to choose from; give one that prunes")

    @property
    def level(self) -> float:
        """The error that is allowed for each plan, over all looks."""
        return (1 - self.confidence) / self.plans

    @property
    def first(self) -> int:
        """Questions of the first sample, which every plan is asked."""
        return -(-self.questions // 2**HALVINGS)

    @property
    def grid(self) -> int:
        """Answers of the full grid, those of the unpruned model among them."""
        return (self.plans + 1) * self.questions

    @property
    def most(self) -> int:
        """Answers that may be asked: a share of the grid, but enough to decide on one plan."""
        one = self.plans * self.first + 2 * self.questions - self.first
        return max(int(self.share * self.grid), one)

    def describe_too_few(self) -> str | None:
        """A sentence if no plan could be safe with these questions, even without any loss."""
        if evidence(np.zeros(self.questions), self.bound) >= math.log(1 / self.level):
            return None
        return (
            f"{self.questions} questions are too few to be {100 * self.confidence:g} % sure that "
            f"the loss of one of {self.plans} plans is below {100 * self.bound:g} points: it takes "
            f"at least {self.least_questions()}, all without a loss"
        )

    def least_questions(self) -> int:
        """The fewest questions after which a plan that loses nothing is called safe."""
        low, high = 0, 1
        while evidence(np.zeros(high), self.bound) < math.log(1 / self.level):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            enough = evidence(np.zeros(middle), self.bound) >= math.log(1 / self.level)
            low, high = (low, middle) if enough else (middle, high)
        return high


@dataclass(frozen=True)
class Standing:
    """What is known of a plan. low, high: bounds of its loss, each at the level of the rule."""

    verdict: str  # SAFE, LOSSY or OPEN
    questions: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """The outcome. chosen: the cheapest safe plan, or None if no plan is surely safe."""

    chosen: int | None
    standings: tuple[Standing, ...]
    undecided: tuple[int, ...]  # plans that are cheaper than the chosen one, and may be safe too
    asked: int  # answers, those of the unpruned model among them
    spent: bool  # the answers that may be asked were used up

    @property
    def settled(self) -> bool:
        """Whether every plan that is cheaper than the chosen one surely loses too much."""
        return not self.undecided


@dataclass(frozen=True)
class Step:
    """What to ask next: these plans, until each has answered the first n questions."""

    plans: tuple[int, ...]
    n: int


# ---------------------------------------------------------------- evidence


def evidence(d: Array, bound: float) -> float:
    """The logarithm of the capital that betting on "the loss is below the bound" has made.

    d: (n,) differences from -1 to 1. bound: above -1 and below 1.
    """
    return _log_capital(*np.unique(d, return_counts=True), bound)


def _log_capital(values: Array, counts: NDArray[np.int64], bound: float) -> float:
    """As `evidence`, from the different values (k,) and how often each is there (k,)."""
    factors = 1 + np.outer(_BETS, bound - values) / (1 - bound)  # (17, k)
    capital = np.log(factors) @ counts  # (17,)
    most = capital.max()
    return float(most + np.log(np.exp(capital - most).mean()))


def upper_bound(d: Array, level: float) -> float:
    """The bound of the loss that holds with 1 - level, for any number of looks at d (n,)."""
    values, counts = np.unique(d, return_counts=True)
    low, high = -1.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if _log_capital(values, counts, middle) < math.log(1 / level):  # it grows with the bound
            low = middle
        else:
            high = middle
    return high


def judge(d: Array, rule: Rule) -> str:
    """The verdict on a plan from its differences (n,)."""
    enough = math.log(1 / rule.level)
    if evidence(d, rule.bound) >= enough:
        return SAFE
    return LOSSY if evidence(-d, -rule.bound) >= enough else OPEN


def describe(d: Array, rule: Rule) -> Standing:
    """What is known of a plan from its differences (n,)."""
    low, high = -upper_bound(-d, rule.level), upper_bound(d, rule.level)
    return Standing(judge(d, rule), len(d), float(d.mean()), low, high)


# ---------------------------------------------------------------- what to ask next


def find_contenders(
    rule: Rule, costs: Sequence[float], unpruned: float, data: Sequence[Array]
) -> tuple[int | None, list[int]]:
    """The cheapest safe plan or None, and the undecided plans that are cheaper.

    costs: of each plan; unpruned: of the unpruned model, which is safe itself. data: the
    differences of each plan so far.
    """
    verdicts = [judge(d, rule) for d in data]
    order = sorted(range(len(data)), key=lambda p: (costs[p], p))
    cheaper = [p for p in order if costs[p] < unpruned]
    safe = next((p for p in cheaper if verdicts[p] == SAFE), None)
    before = cheaper if safe is None else cheaper[: cheaper.index(safe)]
    return safe, [p for p in before if verdicts[p] == OPEN]


def count_asked(data: Sequence[Array]) -> int:
    """Answers so far, with those of the unpruned model."""
    return sum(map(len, data)) + max(map(len, data))


def next_step(
    rule: Rule, costs: Sequence[float], unpruned: float, data: Sequence[Array]
) -> Step | None:
    """What to ask next; None if all is known, or if nothing more may be asked.

    The best plan is the cheapest of those whose loss so far is within the bound; without any, the
    one with the least loss. Of the contenders that have as many answers as the best, the better
    half goes on, as far as the answers that may be asked allow. While no plan is safe, enough of
    them are kept for the surest one, which has the most evidence, to answer all questions. It
    depends on the data alone, so an interrupted choice goes on as it would have.
    """
    safe, contenders = find_contenders(rule, costs, unpruned, data)
    able = [p for p in contenders if len(data[p]) < rule.questions]
    if not able:
        return None
    ranked = sorted(able, key=lambda p: (max(0.0, data[p].mean() - rule.bound), costs[p], p))
    level = [p for p in ranked if len(data[p]) == len(data[ranked[0]])]
    step = _go_on(rule, data, level)
    if safe is not None or step is None:
        return step
    surest = max(able, key=lambda p: (evidence(data[p], rule.bound), costs[p]))
    deepest, size = max(map(len, data)), len(data[level[0]])
    price = len(step.plans) * (step.n - size) + max(0, step.n - deepest)
    reserve = 2 * rule.questions - len(data[surest]) - max(deepest, step.n)
    if count_asked(data) + price + reserve > rule.most:
        return _go_on(rule, data, [surest])
    return step


def _go_on(rule: Rule, data: Sequence[Array], level: Sequence[int]) -> Step | None:
    """The better half of plans with equally many answers, the best first, goes on with twice as
    many; or fewer plans or answers, if no more may be asked."""
    size, deepest = len(data[level[0]]), max(map(len, data))
    left = rule.most - count_asked(data)
    affordable = size + left if size + left <= deepest else (size + left + deepest) // 2
    n = min(rule.questions, 2 * size, affordable)  # at least the best plan goes on until n
    if n <= size:
        return None
    room = (left - max(0, n - deepest)) // (n - size)
    return Step(tuple(level[: min(-(-len(level) // 2), room)]), n)


def race(
    rule: Rule,
    costs: Sequence[float],
    unpruned: float,
    first: Sequence[Array],
    ask: Callable[[Step], Sequence[Array]],
) -> Choice:
    """Ask until the cheapest safe plan is known, or nothing more may be asked.

    first: the differences of each plan on the first sample. ask: gives the differences (step.n,) of
    each plan of a step, which begin with those that are known.
    """
    data = list(first)
    while step := next_step(rule, costs, unpruned, data):
        for p, d in zip(step.plans, ask(step), strict=True):
            data[p] = d
    safe, contenders = find_contenders(rule, costs, unpruned, data)
    standings = tuple(describe(d, rule) for d in data)
    spent = any(len(data[p]) < rule.questions for p in contenders)
    return Choice(safe, standings, tuple(contenders), count_asked(data), spent)


def choose(
    unpruned_credits: Array,
    credits: Array,
    costs: Sequence[float],
    unpruned: float,
    bound: float,
    confidence: float = 0.95,
    share: float = SHARE,
) -> Choice:
    """The choice among M plans whose answers to all N questions are there, in a random order.

    unpruned_credits: (N,) of the unpruned model, right or wrong or from 0 to 1; credits: (M, N).
    Only those answers are read that the command would have asked for.
    """
    d = np.asarray(unpruned_credits, dtype=np.float64) - np.asarray(credits, dtype=np.float64)
    rule = Rule(bound, confidence, len(d), d.shape[1], share)
    first = [row[: rule.first] for row in d]
    return race(rule, costs, unpruned, first, lambda step: [d[p][: step.n] for p in step.plans])
