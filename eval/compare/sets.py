"""Which patches two plans keep in common, and what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from string import ascii_uppercase

from .runs import Comparison, Run


@dataclass(frozen=True)
class Difference:
    """The patches that two plans keep, by image."""

    a: Run
    b: Run
    both: list[set[int]]
    only_a: list[set[int]]
    only_b: list[set[int]]
    jaccard: float | None  # both, of those that any of the two keeps; None: they keep nothing
    chance: float | None  # its mean for random sets that keep as many of each image


def subtract(a: Run, b: Run) -> Difference:
    """Compare the sets that two runs have kept in the end (see Run.kept)."""
    assert a.result is not None
    images = range(len(a.result.starts[0]))
    pairs = [(a.kept(i), b.kept(i)) for i in images]
    both, union = ([x & y for x, y in pairs], [x | y for x, y in pairs])
    total, N = sum(map(len, union)), a.result.config.vision.num_patches
    return Difference(
        a,
        b,
        both,
        [x - y for x, y in pairs],
        [y - x for x, y in pairs],
        sum(map(len, both)) / total if total else None,
        expect_jaccard([(len(x), len(y)) for x, y in pairs], N) if total else None,
    )


def list_differences(comparison: Comparison) -> list[Difference]:
    """Every pair of plans that could run, without the unpruned model."""
    pruned = [run for run, result in comparison.answered if result.plan.methods]
    return [subtract(a, b) for a, b in combinations(pruned, 2)]


def expect_jaccard(sizes: Sequence[tuple[int, int]], N: int) -> float:
    """The mean Jaccard index of two random sets that have these numbers of the N patches of each
    image, at least one patch in all. The number of common patches of an image is hypergeometric."""
    common = [1.0]  # probability of each number of common patches
    for a, b in sizes:
        ways = [comb(a, k) * comb(N - a, b - k) / comb(N, b) for k in range(min(a, b) + 1)]
        longer = [0.0] * (len(common) + len(ways) - 1)
        for i, p in enumerate(common):
            for j, q in enumerate(ways):
                longer[i + j] += p * q
        common = longer
    total = sum(a + b for a, b in sizes)
    return sum(p * k / (total - k) for k, p in enumerate(common))


def label_runs(comparison: Comparison) -> dict[str, str]:
    """A short name of each plan: A, B, C, ... in their order; the unpruned model has none."""
    plans = [run.plan for run in comparison.runs[1:]]
    letters = [*ascii_uppercase, *(str(n + 1) for n in range(26, len(plans)))]
    return dict(zip(plans, letters, strict=False))
