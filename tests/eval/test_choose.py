"""The cheapest safe plan: the rule on plans with known losses, and the command on the demo."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import refusal

from eval import choose as command
from eval import predict
from eval.bench import Bench
from eval.choosing import (
    LOSSY,
    OPEN,
    SAFE,
    Choice,
    Rule,
    choose,
    count_asked,
    evidence,
    judge,
    next_step,
    upper_bound,
)
from eval.score import find_task
from eval.tasks.base import Item

BOUND = 0.1


def answers(rng: Any, losses: list[float], n: int, gained: float = 0.02) -> tuple[Any, Any]:
    """Right and wrong answers (n,) of the unpruned model and (M, n) of plans with these losses."""
    unpruned = rng.random(n) < 0.7
    lost = (np.array(losses)[:, None] + gained) / 0.7  # of the right ones
    draws = rng.random((len(losses), n))
    plans = np.where(unpruned, draws >= lost, draws < gained / 0.3)
    return unpruned.astype(float), plans.astype(float)


def runs(losses: list[float], n: int, repeats: int, **more: Any) -> list[Choice]:
    """Choices among plans that are the dearer the later they come."""
    rng, M = np.random.default_rng(5), len(losses)
    return [choose(*answers(rng, losses, n), range(M), M, BOUND, **more) for _ in range(repeats)]


@pytest.mark.parametrize("gained", [0.0, 0.1])
def test_the_evidence_is_a_martingale_at_the_bound(gained: float) -> None:
    """Its mean over all sequences of three questions is 1, if the loss equals the bound."""
    p = {1.0: BOUND + gained, -1.0: gained, 0.0: 1 - BOUND - 2 * gained}
    mean = worse = 0.0
    for d in itertools.product(p, repeat=3):
        capital = math.exp(evidence(np.array(d), BOUND))
        mean += math.prod(p[x] for x in d) * capital
        more = {**p, 1.0: p[1.0] + 0.05, 0.0: p[0.0] - 0.05}
        worse += math.prod(more[x] for x in d) * capital
    assert mean == pytest.approx(1)
    assert worse < 1


def test_the_upper_bound_is_where_the_evidence_reaches_the_level() -> None:
    rng = np.random.default_rng(0)
    for d in (np.zeros(50), rng.choice([-1.0, 0, 0, 0, 1], 200), rng.uniform(-1, 1, 80)):
        high, low = upper_bound(d, 0.01), -upper_bound(-d, 0.01)
        assert low < d.mean() < high
        assert evidence(d, high + 0.001) > math.log(100) > evidence(d, high - 0.001)
    assert upper_bound(np.ones(3), 0.01) == 1


def test_the_bounds_hold_at_all_looks_together() -> None:
    """At 0.05, looked at after each tenth question, at most 1 of 20 runs misses the true loss."""
    rng, missed, true = np.random.default_rng(1), 0, 0.1
    for _ in range(100):
        d = rng.choice([1.0, -1.0, 0.0], 200, p=[0.15, 0.05, 0.8])
        missed += any(evidence(d[:n], true) >= math.log(20) for n in range(10, 201, 10))
    assert missed <= 5


@pytest.mark.parametrize("share", [1 / 3, 1.0])
@pytest.mark.parametrize("losses", [[BOUND + 0.001] * 6, [0.3, 0.2, 0.12, 0.11, 0.101, 0.101]])
def test_plans_over_the_bound_are_hardly_ever_chosen(losses: list[float], share: float) -> None:
    found = runs(losses, 300, 40, share=share)
    assert sum(choice.chosen is not None for choice in found) <= 2  # 5 % of 40
    assert max(choice.asked for choice in found) <= round(share * 7 * 300)


def test_the_cheapest_plan_below_the_bound_is_chosen() -> None:
    found = runs([0.5, 0.4, 0.35, 0.0, 0.3, 0.0, 0.0, 0.01], 600, 30)
    chosen = [choice.chosen for choice in found]
    assert chosen.count(3) >= 27, chosen
    assert not {0, 1, 2, 4} & {*chosen}
    assert sum(choice.settled for choice in found) >= 27
    assert all(choice.asked <= 9 * 600 / 3 for choice in found)
    for choice in found:
        standing = choice.standings[3]
        assert standing.low <= 0 <= standing.high
        assert (standing.verdict == SAFE) == (standing.high <= BOUND + 1e-5)


def test_what_is_not_known_is_said() -> None:
    near = runs([0.09, 0.0], 600, 10, share=1.0)
    assert sum(choice.chosen == 1 and choice.undecided == (0,) for choice in near) >= 8
    lossy = runs([0.5, 0.6], 400, 10)
    assert all(choice.chosen is None and choice.settled for choice in lossy)
    assert all(choice.standings[0].verdict == LOSSY for choice in lossy)


def test_a_plan_that_is_dearer_than_the_unpruned_model_is_not_chosen() -> None:
    right = np.ones(400)
    both = np.ones((2, 400))
    assert choose(right, both, [2.0, 1.0], 3.0, BOUND).chosen == 1
    assert choose(right, both, [2.0, 1.0], 1.0, BOUND).chosen is None


def test_too_few_questions_are_said() -> None:
    rule = Rule(0.01, 0.95, 18, 800)
    least = rule.least_questions()
    assert 589 < least < 800  # log(18 / 0.05) / log(1 / 0.99) = 586 without a mixture of bets
    assert judge(np.zeros(least), rule) == SAFE
    assert judge(np.zeros(least - 1), rule) == OPEN
    assert rule.describe_too_few() is None
    few = Rule(0.01, 0.95, 18, least - 1).describe_too_few()
    assert few is not None
    assert f"at least {least}" in few


def test_a_step_depends_on_the_data_alone_and_halves_the_plans() -> None:
    rule = Rule(BOUND, 0.95, 8, 320)
    data = [np.zeros(rule.first) for _ in range(8)]
    data[0] = np.ones(rule.first)
    step = next_step(rule, range(8), 8, data)
    assert step is not None
    assert (step.plans, step.n) == ((1, 2, 3, 4), 40)  # 7 are left, the cheapest half of them
    for p in step.plans:
        data[p] = np.zeros(40)
    data[1] = np.ones(40)
    assert next_step(rule, range(8), 8, data) == next_step(rule, range(8), 8, [*data])
    step = next_step(rule, range(8), 8, data)
    assert step is not None
    assert (step.plans, step.n) == ((2, 3), 80)
    data[2] = data[3] = data[4] = np.ones(80)  # all that went on are bad: the others come back
    step = next_step(rule, range(8), 8, data)
    assert step is not None
    assert (step.plans, step.n) == ((7,), 40)  # alone: two would leave it too few answers
    assert count_asked(data) == 20 + 40 + 3 * 80 + 3 * 20 + 80


# ---------------------------------------------------------------- the command


BAD = ["uniform", "random", "divprune", "fastervlm", "pool", "vispruner"]
PLANS = [f"{name}:keep=1" for name in BAD]
OPTIONS = ["--limit", "72", "--loss", "25", "--cost", "flops", "--batch", "16"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of questions of each generation."""
    counts: list[int] = []
    generate = predict.generate

    def counting(model: Any, batch: Any, *rest: Any, **more: Any) -> Any:
        counts.append(len(batch.ids))
        return generate(model, batch, *rest, **more)

    monkeypatch.setattr(predict, "generate", counting)
    return counts


def test_the_command_asks_at_most_a_third_and_goes_on(
    tmp_path: Path,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "choose"
    wanted = ["--prune", *PLANS, "hand:patches=0-140", *OPTIONS, "--out", str(out)]
    generate = predict.generate

    def interrupted(*rest: Any, **more: Any) -> Any:
        if len(asked) == 12:
            raise KeyboardInterrupt
        return generate(*rest, **more)

    monkeypatch.setattr(predict, "generate", interrupted)
    assert command.main(wanted) == 130
    monkeypatch.setattr(predict, "generate", generate)
    assert command.main(wanted) == 0
    text, found = capsys.readouterr().out, json.loads((out / "choose.json").read_text())
    assert found["chosen"] == "hand:patches=0-140"
    assert "`hand:patches=0-140` is the cheapest plan that surely loses less than 25 points" in text
    assert sum(asked) == found["asked"] <= found["grid"] / 3
    lines = sum(len(f.read_bytes().splitlines()) for f in (out / "answers").glob("*.jsonl"))
    assert lines == found["asked"]
    assert text == (out / "choose.md").read_text().split("\n\n![")[0] + "\n"
    assert {row["plan"] for row in found["plans"]} == {*PLANS, "hand:patches=0-140"}
    assert {*found["front"]} <= {*PLANS, "hand:patches=0-140"}
    with Image.open(out / "pareto.png") as image:
        assert image.width > 600
    monkeypatch.setattr(predict, "generate", None)  # all answers are there
    assert command.main(wanted) == 0
    assert json.loads((out / "choose.json").read_text()) == found
    capsys.readouterr()
    assert command.main([*wanted, "--seed", "1"]) == 2  # another order: never mixed
    assert "was begun with seed=0, not 1" in refusal(capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss", "0"], "a loss of 0 points must be above 0 and below 100"),
        (["--confidence", "1"], "a confidence of 1 must be from 0.5 to below 1"),
        (["--prune", "none"], "there is nothing to choose from"),
        (["--limit", "90"], "81 questions are too few to be 95 % sure that the loss of one of 18"),
        (["--budgets", "145"], "--budgets 145 must be from 1 to 144"),
        (["--budgets", "0"], "'0' must be a number of image tokens"),
        (["--prune", "text-only", "--budgets", "8"], "no option of text-only sets how many"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--limit", "9", *options, "--out", str(tmp_path / "new")]) == 2
    assert said in refusal(capsys)


def test_seconds_are_those_of_full_batches_after_the_first() -> None:
    """The two questions that are left over take more time each."""
    times = [9.0, 8.0, 4.0, 6.0, 5.0]
    batches = [(t, 2) for t in times] + [(3.0, 1)]
    rest = {"per_token": None, "new_tokens": 1}
    rows: Any = [
        {"metadata": {"first_token": t, "prefill": t, **rest, "batch": n}}
        for t, n in batches
        for _ in range(n)
    ]
    assert command.seconds_each(rows) == [2, 3, 2.5]
    assert command.seconds_each(rows[-1:]) == [3]


def test_questions_of_several_answers_stay_together() -> None:
    """MME: an image with its two questions counts as one."""
    task, _ = find_task("mme", "llava")
    pairs = [(image, gold) for image in "abcd" for gold in ("yes", "no")]
    golds = [{"category": "count", "image": i, "answer": gold} for i, gold in pairs]
    items = [Item(f"{g['image']}.png", f"Is it {g['answer']}?", gold=g) for g in golds]
    args = argparse.Namespace(protocol="llava", seed=0)
    asker = command.Asker(Bench(args, task, items, None, None), [])  # type: ignore[arg-type]
    assert asker.ends == [2, 4, 6, 8]
    order = [item.gold["image"] for item in asker.bench.items]
    assert order[::2] == order[1::2]
    assert {*order} == {*"abcd"}
    assert order[::2] != [*"abcd"]
