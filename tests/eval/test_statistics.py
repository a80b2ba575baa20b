"""Intervals and paired comparisons: against scipy, against numbers of statsmodels, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from eval.credits import Credits, average
from eval.predictions import Prediction
from eval.score import Scored, find_task, score
from eval.statistics import (
    compare,
    describe_too_few,
    estimate,
    least_questions,
    mcnemar,
    paired_interval,
    resample,
)
from eval.tasks.base import Answer, ImageSource, Item, Task


def shares(right: int, n: int) -> Credits:
    return Credits.of([str(i) for i in range(n)], [i < right for i in range(n)])


def pair(lost: int, gained: int, both: int, neither: int) -> tuple[Credits, Credits]:
    first = [1.0] * (lost + both) + [0.0] * (gained + neither)
    second = [0.0] * lost + [1.0] * (both + gained) + [0.0] * neither
    names = [str(i) for i in range(len(first))]
    return Credits.of(names, first), Credits.of(names, second)


@pytest.mark.parametrize(
    ("right", "n", "confidence", "low", "high"),
    [  # statsmodels 0.15, proportion_confint(method="wilson")
        (0, 12, 0.95, 0.0, 0.2424940067),
        (80, 80, 0.95, 0.9541818705, 1.0),
        (297, 450, 0.95, 0.6150426442, 0.7022487737),
        (1454, 2017, 0.95, 0.7008907546, 0.7400146891),
        (13, 40, 0.99, 0.1714851243, 0.5283105005),
        (7300, 10000, 0.95, 0.7212114574, 0.7386119033),
    ],
)
def test_shares_have_wilsons_interval(
    right: int, n: int, confidence: float, low: float, high: float
) -> None:
    found = estimate(shares(right, n), confidence)
    assert found.value == pytest.approx(100 * right / n)
    assert found.bounds == pytest.approx((100 * low, 100 * high), abs=1e-6)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [  # statsmodels 0.15, mcnemar(exact=True)
        (7, 0, 0.015625),
        (3, 9, 0.14599609375),
        (20, 25, 0.5514843298025198),
        (0, 0, 1.0),
        (621, 408, 3.3098065593620895e-11),
        (1, 6, 0.125),
    ],
)
def test_mcnemars_exact_p(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_the_interval_of_a_paired_difference() -> None:
    # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): 7 and 1 of 21 pairs changed
    assert paired_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z2 = stats.norm.ppf(0.975) ** 2
    bound = z2 / (450 + z2)
    assert paired_interval(0, 0, 450) == pytest.approx((-bound, bound))
    assert paired_interval(9, 0, 9)[0] == -1
    low, high = paired_interval(3, 9, 450)
    assert paired_interval(9, 3, 450) == pytest.approx((-high, -low))


def test_a_paired_difference_is_near_scipys_bootstrap() -> None:
    first, second = pair(60, 25, 250, 65)
    found = compare(first, second)
    change = 100 * (second.credit - first.credit)
    theirs = stats.bootstrap((change,), np.mean, method="percentile", random_state=0)
    assert found.estimate.bounds == pytest.approx(theirs.confidence_interval, abs=0.3)
    assert (found.lost, found.gained, found.questions) == (60, 25, 400)
    assert found.distinguishable


@pytest.mark.parametrize(("lost", "gained", "differ"), [(5, 0, False), (6, 0, True), (9, 8, False)])
def test_plans_differ_only_if_interval_and_test_say_so(
    lost: int, gained: int, differ: bool
) -> None:
    found = compare(*pair(lost, gained, 50, 20))
    assert found.distinguishable is differ
    assert found.estimate.value == pytest.approx(100 * (gained - lost) / (lost + gained + 70))


def test_soft_credits_have_the_interval_of_scipys_bootstrap() -> None:
    rng = np.random.default_rng(1)
    soft = rng.choice([0, 0.3, 0.6, 0.9, 1], 700)
    other = np.clip(soft + rng.choice([-0.3, 0, 0.3], 700), 0, 1)
    names = [str(i) for i in range(700)]
    ours, theirs = Credits.of(names, soft), Credits.of(names, other)
    for found, values in (
        (estimate(ours).bounds, soft),
        (compare(ours, theirs).estimate.bounds, other - soft),
    ):
        expected = stats.bootstrap((100 * values,), np.mean, method="percentile", random_state=0)
        assert found == pytest.approx(expected.confidence_interval, abs=0.15)


def test_questions_with_equal_credits_are_drawn_as_often_as_single_ones() -> None:
    """The counts are multinomial: mean and variance of the bootstrap distribution."""
    soft = np.array([0.0, 0.5, 0.5, 1.0, 1.0, 1.0])
    found = resample(Credits.of([str(i) for i in range(6)], soft))
    assert found.mean() == pytest.approx(100 * soft.mean(), abs=0.6)
    assert found.std() == pytest.approx(100 * soft.std() / 6**0.5, rel=0.03)


def test_the_mean_over_seeds_is_taken_question_by_question() -> None:
    a, b = pair(1, 1, 1, 1)
    mean = average([a, b])
    assert mean.credit.tolist() == [0.5, 1, 0.5, 0]
    assert mean.score == pytest.approx((a.score + b.score) / 2)
    assert not mean.is_share
    assert mean.right.tolist() == [True, True, True, False]


def test_too_few_questions_are_said() -> None:
    assert [least_questions(c) for c in (0.9, 0.95, 0.99, 0.999)] == [5, 6, 8, 11]
    for confidence in (0.95, 0.99):
        n = least_questions(confidence)
        assert mcnemar(n, 0) < 1 - confidence <= mcnemar(n - 1, 0)
        assert describe_too_few(n, confidence) is None
        few = describe_too_few(n - 1, confidence)
        assert few is not None
        assert f"at least {n}" in few
    assert estimate(shares(3, 5)).bounds is None
    assert not compare(*pair(5, 0, 0, 0)).distinguishable


def test_answers_to_other_questions_are_never_paired() -> None:
    with pytest.raises(ValueError, match="answers to 5 questions cannot be paired"):
        compare(shares(3, 5), shares(3, 6))


def test_ten_thousand_answers_are_drawn_as_their_few_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 pairs of four credits, 10,000 samples: not 10,000 questions times 10,000 samples."""
    drawn: list[int] = []

    class Counting:
        real = np.random.default_rng(0)

        def multinomial(self, n: int, p: Any, size: int) -> Any:
            drawn.append(size * len(p))
            return self.real.multinomial(n, p, size=size)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counting())
    names = [str(i) for i in range(10_000)]
    first, second = (
        Credits.of(names, Counting.real.choice([0, 0.3, 0.6, 1], 10_000)) for _ in range(2)
    )
    assert compare(first, second).estimate.bounds is not None
    assert sum(drawn) == 16 * 10_000


# ---------------------------------------------------------------- what tasks' scores are made of


def test_mmes_credits_make_its_sums() -> None:
    task, _ = find_task("mme", "llava")
    images = [("count", "a"), ("count", "b"), ("OCR", "c"), ("code_reasoning", "d")]
    rows = [(category, image, gold) for category, image in images for gold in ("yes", "no")]
    said = ["yes", "no", "yes", "yes", "no", "yes", "yes", "no"]
    answers = [
        Answer(Item(f"{c}/{i}", f"{i} {gold}?", (), {"answer": gold, "category": c}), text)
        for (c, i, gold), text in zip(rows, said, strict=True)
    ]
    found = task.score(answers, "llava")
    assert found.credits is not None
    assert found.value == found.credits.score == 125
    assert found.parts["cognition"].score == found.more["cognition"] == 200
    assert found.parts["perception + cognition"].score == 325
    assert {name: part.score for name, part in found.parts.items()} == found.more
    assert found.credits.members == ((0, 1), (2, 3), (4, 5))
    assert found.credits.right.tolist() == [True, False, False]


@pytest.mark.parametrize("protocol", ["llava", "lmms"])
def test_popes_credits_make_the_mean_f1_and_all_figures_of_splits(protocol: str) -> None:
    task, _ = find_task("pope", protocol)
    rng = np.random.default_rng(3)
    answers = [
        Answer(
            Item(i, f"q{i}", (), {"answer": rng.choice(["yes", "no"]), "split": s}),
            str(rng.choice(["yes", "no", "perhaps"])),
        )
        for i, s in enumerate(["random", "popular", "adversarial"] * 30)
    ]
    found = task.score(answers, protocol)
    for name, part in found.parts.items():
        assert part.score == pytest.approx(found.more[name]), name
    rates = {name for name, value in found.more.items() if isinstance(value, float)}
    given = {f"{split} yes_ratio" for split in task.split.replace(" and", ",").split(", ")}
    assert rates - {*found.parts} == (given if protocol == "lmms" else set())
    assert found.credits is not None
    assert found.value == pytest.approx(found.credits.score)
    assert found.right == found.credits.credit.sum()
    half = found.credits.select(np.arange(90) < 45)
    assert task.score(answers[:45], protocol).value == pytest.approx(half.score)


def scored(task: Task, answers: list[Answer]) -> Scored:
    found = [Prediction((str(a.item.question_id),), a.said, str(i)) for i, a in enumerate(answers)]
    return score(task, [a.item for a in answers], found, "llava")


def test_every_figure_of_a_benchmark_has_an_interval_or_says_why_not() -> None:
    mmbench, seed, mmmu, science = (
        find_task(name, "llava")[0] for name in ("mmbench", "seed_bench", "mmmu", "scienceqa")
    )
    letters = {"options": {"A": "cat", "B": "dog"}, "answer": "A"}
    image = ImageSource.missing("x")
    many = {
        mmbench: [Answer(Item(i + 1_000_000 * (i % 2), "q", (), letters), "A") for i in range(40)],
        seed: [
            Answer(Item(i, "q", (), {"answer": "A", "data_type": kind}), "A")
            for i, kind in enumerate(["image"] * 20 + ["video"] * 3)
        ],
        mmmu: [
            Answer(
                Item(f"validation_Art_{i}", "q", (), {"answer": ["A"], "options": ["1", "2"]}), t
            )
            for i, t in enumerate(["A", "B", "so"] * 5)
        ],
        science: [
            Answer(Item(i, "q", (image,) * (i < 9), {"answer": "A", "choices": 2}), "A")
            for i in range(20)
        ],
    }
    for task, answers in many.items():
        found = scored(task, answers)
        figures = {n for n, v in found.score.more.items() if isinstance(v, float)}
        assert figures == {*found.score.parts}, task.name
        for name in figures:
            part = found.score.parts[name]
            assert part.score == pytest.approx(found.score.more[name])
            assert (found.intervals[name] is None) == (len(part) < 6)
    assert "video: 100.00 (too few questions for an interval)" in scored(seed, many[seed]).text()


@pytest.mark.parametrize("n", [6, 30, 1000])
def test_a_score_that_no_sample_changes_has_wilsons_interval(n: int) -> None:
    """The bootstrap of MME's pairs, soft accuracies or F1 that are all alike has no width."""
    names = [str(i) for i in range(n)]
    wilson = estimate(shares(n, n)).bounds
    assert wilson is not None
    full = Credits.merged(names, names, [True] * n, lambda pair: 200.0, scale=1.0, most=200.0)
    assert full.counts is None
    assert estimate(full).bounds == pytest.approx((2 * wilson[0], 200))
    f1 = replace(shares(n, n), numerator=np.full(n, 2.0), denominator=np.full(n, 2.0), mean=True)
    assert estimate(f1).bounds == pytest.approx(wilson)
    assert estimate(replace(f1, numerator=np.zeros(n))).bounds == pytest.approx(
        (0, 100 - wilson[0])
    )
    tango = compare(shares(n, n), shares(n, n)).estimate.bounds
    assert compare(f1, f1).estimate.bounds == pytest.approx(tango)
    assert not compare(f1, f1).distinguishable
    half = Credits.of(names, [0.5] * n)
    low, high = estimate(half).bounds or (0, 0)
    assert (50 - low, high - 50) == pytest.approx((100 - wilson[0],) * 2)


def test_a_share_of_a_part_of_the_questions_has_wilsons_interval() -> None:
    """POPE's precision: of those that were answered yes."""
    yes, hit = np.array([1.0] * 12 + [0.0] * 8), np.array([1.0] * 9 + [0.0] * 11)
    found = replace(shares(20, 20), numerator=hit, denominator=yes)
    assert found.counts == (9, 12)
    assert estimate(found).bounds == pytest.approx(estimate(shares(9, 12)).bounds)
    assert not found.is_share
