"""What a score is made of, question by question, so that parts of it can be scored again.

A question here is what counts as one: in MME an image with its two questions, in MMBench a question
with all its rotations, otherwise a single question of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ENOUGH = 0.5  # a question with at least this credit counts as right


@dataclass(frozen=True, eq=False)
class Credits:
    """The credits of n questions. The score that they make is, over the groups g,

        scale * sum or mean over g of (sum of numerators in g) / (sum of denominators in g)

    For an accuracy there is one group, the numerators are the credits and the denominators 1.
    POPE's mean F1 has a group for each split with 2 tp / (2 tp + fp + fn), and MME's perception is
    the sum of its categories.
    """

    names: tuple[str, ...]  # (n,) of the questions
    members: tuple[tuple[int, ...], ...]  # (n,) indices of the answers that each one consists of
    credit: Array  # (n,) 0..1 (CIDEr-D: 0..10)
    numerator: Array  # (n,)
    denominator: Array  # (n,)
    group: NDArray[np.int64]  # (n,)
    scale: float = 100.0
    mean: bool = False  # over the groups; otherwise their sum
    most: float = 1.0  # numerator that a question can have for a denominator of 1

    @classmethod
    def of(cls, names: Sequence[str], credit: Sequence[float], most: float = 1.0) -> Credits:
        """The credits of single questions, whose mean is the score."""
        values, n = np.array(credit, dtype=np.float64), len(names)
        own = tuple((i,) for i in range(n))
        groups = np.zeros(n, dtype=np.int64)
        return cls(tuple(names), own, values, values, np.ones(n), groups, most=most)

    @classmethod
    def merged(
        cls,
        names: Sequence[str],
        keys: Sequence[Hashable],
        right: Sequence[bool],
        value: Callable[[Sequence[bool]], float],
        groups: Sequence[Hashable] = (),
        scale: float = 100.0,
        most: float = 1.0,
    ) -> Credits:
        """The credits of questions that consist of several answers, those with equal keys.

        Such a question is right if all its answers are. value: its numerator, from which of its
        answers are right; `most` at the highest. groups: those of the answers, by default one; the
        score is their sum.
        """
        found: dict[Hashable, list[int]] = {}
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
        numbers = {g: n for n, g in enumerate(dict.fromkeys(groups))}
        return cls(
            tuple(names[own[0]] for own in found.values()),
            tuple(map(tuple, found.values())),
            np.array([float(all(right[i] for i in own)) for own in found.values()]),
            np.array([value([right[i] for i in own]) for own in found.values()]),
            np.ones(len(found)),
            np.array([numbers[groups[own[0]]] if groups else 0 for own in found.values()]),
            scale,
            most=most,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,) Whether each question counts as right: its credit is at least ENOUGH."""
        return self.credit >= ENOUGH

    @property
    def is_share(self) -> bool:
        """Whether the score is the share of right answers, each of which is right or wrong."""
        return self.counts is not None and bool(
            (self.denominator == 1).all() and (self.numerator == self.credit).all()
        )

    @property
    def counts(self) -> tuple[int, int] | None:
        """(k, n) if the score is k of n questions, those with a denominator; otherwise None."""
        whole = np.isin(self.denominator, (0.0, 1.0)) & np.isin(self.numerator, (0.0, 1.0))
        is_part = (whole & (self.numerator <= self.denominator)).all()
        if not is_part or len(np.unique(self.group)) > 1 or self.most != 1:
            return None
        return int(self.numerator.sum()), int(self.denominator.sum())

    @property
    def score(self) -> float:
        """The score of these questions; NaN if there are none."""
        return float(self.scores(np.ones((1, len(self))))[0])

    def scores(self, counts: NDArray[np.int64] | Array) -> Array:
        """The scores (r,) of r samples, of which each has question i counts[r, i] times."""
        total, groups = np.zeros(len(counts)), np.zeros(len(counts))
        for g in np.unique(self.group):
            mine = self.group == g
            above, below = (counts[:, mine] @ x[mine] for x in (self.numerator, self.denominator))
            there = below > 0  # a group without a denominator is left out, as in POPE's mean
            total += np.divide(above, below, out=np.zeros_like(total), where=there)
            groups += there
        total[groups == 0] = np.nan
        return self.scale * (total / np.maximum(groups, 1) if self.mean else total)

    def select(self, chosen: NDArray[np.bool_]) -> Credits:
        """The credits of the questions for which `chosen` (n,) is true."""
        at = np.flatnonzero(chosen)
        return replace(
            self,
            names=tuple(self.names[i] for i in at),
            members=tuple(self.members[i] for i in at),
            credit=self.credit[at],
            numerator=self.numerator[at],
            denominator=self.denominator[at],
            group=self.group[at],
        )

    def split(self, labels: Sequence[Hashable]) -> dict[Hashable, Credits]:
        """Label -> the credits of the questions that have it, in the order of the first ones.

        labels: those of the answers; a question has the label of its first answer.
        """
        own = [labels[answers[0]] for answers in self.members]
        return {x: self.select(np.array([y == x for y in own])) for x in dict.fromkeys(own)}


def average_of_groups(parts: Sequence[Credits]) -> Credits:
    """The credits of the mean of several scores of different questions."""
    first = parts[0]
    names, members = (
        tuple(x for part in parts for x in getattr(part, name)) for name in ("names", "members")
    )
    credit, above, below = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("credit", "numerator", "denominator")
    )
    group = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Credits(names, members, credit, above, below, group, first.scale, True, first.most)


def average(several: Sequence[Credits]) -> Credits:
    """The mean of the credits of the same questions under several seeds."""
    first, k = several[0], len(several)
    credit, above, below = (
        np.sum([getattr(c, name) for c in several], axis=0) / k
        for name in ("credit", "numerator", "denominator")
    )
    return first if k == 1 else replace(first, credit=credit, numerator=above, denominator=below)
