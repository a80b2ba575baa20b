"""What eval.fit learns from samples: VTW's layer, FitPrune's table."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference_decoder as reference
import tiny
import torch

from eval import fit
from minillava import Batch, parse_plan
from minillava.generate import generate

N = 16


@pytest.fixture(scope="module")
def batches(model: Any) -> list[Batch]:
    return [tiny.make_batch(model, "tttIttttt", seed=s) for s in range(3)]


@pytest.fixture(scope="module")
def joint(batches: list[Batch]) -> Batch:
    ids = [b.ids[0].tolist() for b in batches]
    return tiny.pad_left(ids, torch.cat([b.pixels for b in batches if b.pixels is not None]))


def test_divergence_of_withdrawing(model: Any, batches: list[Batch]) -> None:
    found = fit.divergences(model, batches, range(1, 4))
    for i, layer in enumerate((1, 2, 3)):
        total = 0.0
        for batch in batches:
            p, q = (
                generate(model, batch, parse_plan(plan), 1, output_logits=True)
                .logits[0, 0]
                .double()
                .softmax(-1)
                for plan in (f"vtw:layer={layer}", None)
            )
            pairs = zip(p.tolist(), q.tolist(), strict=True)
            total += sum(a * math.log(a / b) for a, b in pairs)
        assert float(found[i]) == pytest.approx(total / 3, rel=1e-4)


def test_the_first_layer_below_the_threshold() -> None:
    values = torch.tensor([0.9, 0.002, 0.5, 0.001])
    assert fit.first_below(values, range(5, 9), 0.003) == 6
    assert fit.first_below(values, range(5, 9), 0.002 + 1e-9) == 6
    assert fit.first_below(values, range(5, 9), 0.0015) == 8
    with pytest.raises(ValueError, match=r"below all of layers 5 to 8; the smallest .* 0\.001000"):
        fit.first_below(values, range(5, 9), 0.0001)


def most_that_can_go(weights: list[float], least: float) -> set[int]:
    """The released search: one more of the weakest, until too little would stay."""
    order = sorted(range(len(weights)), key=lambda i: (weights[i], i))
    for gone in range(len(order)):
        if sum(weights) - sum(weights[i] for i in order[:gone]) < least:
            return set(order[: max(gone - 1, 0)])
    return set(order[:-1])


@pytest.mark.parametrize("least", [-1.0, 0.0, 0.2, 2.0, 4.0, 99.0])
def test_the_weakest_that_can_go(least: float) -> None:
    weights = torch.rand(12, generator=torch.Generator().manual_seed(3))
    expected = most_that_can_go(weights.tolist(), least)
    assert set(fit.weakest(weights, least).nonzero()[:, 0].tolist()) == expected


def fitted(limits: list[tuple[float, float]] | None, alpha: float, counts: list[int]) -> Any:
    """FitPrune's deletions for one sample, written out; notes sums or counts in `counts`."""

    def act(s: reference.Sequence) -> reference.Choice | None:
        if s.layer == 0:
            return None
        assert s.attention is not None
        image, text = s.visual(), s.text_behind()
        strongest = s.attention.amax(0)
        by_image = [sum(float(strongest[i, j]) for i in image) / len(image) for j in image]
        by_text = [sum(float(strongest[i, j]) for i in text) / len(text) for j in image]
        if limits is None:
            counts.append((sum(by_image), sum(by_text)))  # type: ignore[arg-type]
            return None
        least = [(1 - alpha) * x for x in limits[s.layer - 1]]
        gone = most_that_can_go(by_image, least[0]) & most_that_can_go(by_text, least[1])
        counts.append(len(gone))
        kept = [row for i, row in enumerate(image) if i not in gone]
        return reference.Choice(kept, [], renumber=False)

    return act


def test_one_pass_of_the_recipe(model: Any, batches: list[Batch], joint: Batch) -> None:
    config = model.config.text
    limits = fit.one_pass(model, joint, fit.Record(config, 3)).sums
    record = fit.one_pass(model, joint, fit.Record(config, 3, 0.35, -1.0, limits))
    total = [0] * (config.num_hidden_layers - 1)
    for b, batch in enumerate(batches):
        assert batch.pixels is not None
        image = range(3, 3 + N)
        seen = model.encode(batch.pixels, {model.feature_layer})[model.feature_layer][0, 1:]
        x = model.embed(batch.ids[0])
        x[image.start : image.stop] = model.projector(seen)
        sums: list[Any] = []
        reference.decode(model, x, image, fitted(None, 0.0, sums))
        for ours, expected in zip((layer[b] for layer in limits), sums, strict=True):
            assert ours == pytest.approx(expected, rel=1e-4)
        counts: list[int] = []
        reference.decode(model, x, image, fitted(sums, 0.35, counts))
        total = [t + c for t, c in zip(total, counts, strict=True)]
    assert record.deleted == [*total, 0]
    assert sum(total) > 6
    assert not record.reached


def test_flops_are_counted_as_released(model: Any, joint: Batch) -> None:
    """Unpruned: every layer's 4 D^2 + 3 D M a token, and 2 n^2 D."""
    config = model.config.text
    record = fit.one_pass(model, joint, fit.Record(config, 3))
    D, M, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    every = L * (4 * N * D**2 + 3 * N * D * M + 2 * N**2 * D)
    last = N * D**2 + 3 * N * D * M  # what follows the last layer's attention is a forecast
    assert record.flops == 3 * (every - last)


def test_a_fitted_table_saves_what_was_asked(model: Any, joint: Batch) -> None:
    small, large = (fit.fit(model, joint, percent) for percent in (5, 30))
    assert len(small) == len(large) == 4
    assert small[-1] == large[-1] == 0
    assert sum(small) <= sum(large) <= N
    assert sum(large) > 0
    plan = parse_plan(f"fitprune:delete={'/'.join(map(str, large))}")
    report = generate(model, joint, plan, 1).report
    assert report.image_tokens_entering[-1] == [N - sum(large)] * 3


def test_samples_from_a_file(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    lines = [json.dumps({"image": "a.png", "text": t, "question_id": 1}) for t in ("x?", "y?")]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n\n")

    found = fit.samples(tmp_path / "q.jsonl", 1, 0)
    assert [text for text, _ in found] == ["x?"]
    assert found[0][1].size == (4, 4)


# ---------------------------------------------------------------- a budget


def test_a_budget_is_reached_in_the_mean_of_samples(model: Any, batches: list[Batch]) -> None:
    from minillava.pruning.average import most_entering
    from minillava.pruning.base import Plan

    for plan, average in (
        ("ivcprune:layer=2", 13.0),
        ("vlmpruner:layer=2,threshold=0.5", 11.0),
        ("autoprune:depth=4", 9.0),
        ("fastv:k=2", 11.0),
    ):
        (method,) = parse_plan(plan).methods
        found = fit.fit_average(model, batches, method, average)
        assert found.averages == fit.average_of_samples(model, batches, found.method)
        others = [
            statistics.mean(
                fit.average_of_samples(model, batches, replace(method, **{method.strength: k}))
            )
            for k in range(1, N + 1)
        ]
        assert abs(found.mean - average) == min(abs(x - average) for x in others), plan
        most = most_entering(Plan((found.method,)), 4, N)
        assert most is not None
        assert max(found.averages) <= most
        written = fit.describe(model, found).splitlines()[0]
        assert parse_plan(written).methods == (found.method,)


def test_a_threshold_is_bisected(wide_model: Any) -> None:
    batches = [tiny.make_batch(wide_model, "tttItttttt", seed=s) for s in range(2)]
    (method,) = parse_plan("mustdrop:merge=1.0,layers=1/2/3,individual=1.0").methods
    found = fit.fit_average(wide_model, batches, method, 25.0)
    assert abs(found.mean - 25.0) < 2.0
    assert 0 < found.method.total < 1


def test_budgets_that_samples_cannot_reach(model: Any, batches: list[Batch]) -> None:
    for plan, said in (
        ("ivcprune:layer=2,axes=4", "average=3.0 is out of reach on these samples; the nearest is"),
        ("prumerge", "average=3.0 needs an option to vary"),
        ("fastv:k=2", "average=3.0 is out of reach with 4 layers"),
    ):
        (method,) = parse_plan(plan).methods
        with pytest.raises(ValueError, match=re.escape(said)):
            fit.fit_average(model, batches, method, 3.0)


def test_a_plan_without_average_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for plan, said in (("fastv:k=2", "with average="), ("nothing", "nothing")):
        assert fit.main([plan]) == 2
        assert said in tiny.refusal(capsys)


@pytest.mark.parametrize(
    ("method", "option"),
    [("fitprune", "threshold"), ("ivcprune:layer=4,average=60", "first"), ("vtw", "save")],
)
def test_an_option_of_another_method_is_refused(
    method: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit.main([method, f"--{option}", "6"]) == 2
    assert f"--{option} is an option of " in capsys.readouterr().err


def test_what_no_image_can_exceed() -> None:
    from minillava.pruning.average import most_entering

    for plan, most in (
        ("none", 16.0),
        ("uniform:keep=5+vtw:layer=2", 2.5),
        ("sparsevlm:layers=1/3,keep=8/2", (16 + 2 * 9 + 3) / 4),  # a mean each
        ("fastv:k=2,keep=4,mode=mask", 10.0),
        ("fastv:k=2,keep=4,mode=mask,until=3", None),
        ("uniform:keep=5,scope=all", None),
    ):
        assert most_entering(parse_plan(plan), 4, N) == most
