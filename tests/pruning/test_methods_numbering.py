"""Position numbers of each method by default, and budgets over several images."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch

from minillava import Batch, parse_plan
from minillava.generate import Result, generate
from minillava.pruning import METHODS, Plan

# What each method's released code does: it keeps the position numbers of the unpruned prompt
# ("original"), or numbers the rows that are left 0, 1, 2, ... ("compact").
NUMBERING = {
    "apet": "compact",
    "autoprune": "compact",
    "border": "original",
    "cdpruner": "compact",
    "dart": "original",
    "divprune": "compact",
    "fastervlm": "compact",
    "fastv": "original",
    "fitprune": "original",
    "flowcut": "compact",
    "gprune": "original",
    "grid": "compact",
    "hiprune": "compact",
    "hired": "compact",
    "holov": "compact",
    "ivcprune": "original",
    "mmtok": "compact",
    "mustdrop": "compact",
    "nuwa": "original",
    "pool": "compact",
    "prumerge": "compact",
    "prumerge-plus": "compact",
    "prunesid": "compact",
    "pyramiddrop": "compact",
    "random": "original",
    "scope": "compact",
    "simignore": "original",
    "sparsevlm": "compact",
    "text-only": "compact",
    "hand": "compact",
    "tome": "compact",
    "trim": "compact",
    "uniform": "original",
    "v2drop": "original",
    "vispruner": "compact",
    "vlmpruner": "original",
    "visionzip": "compact",
    "vscan": "compact",
    "vtw": "original",
}


@pytest.fixture
def model(fitting_model: Any) -> Any:
    return fitting_model


@pytest.fixture
def batch(model: Any) -> Batch:
    return tiny.make_batch(model, "ttItttttt", seed=3)


def run(model: Any, batch: Batch, plan: Any) -> Result:
    return generate(model, batch, plan, 1, output_logits=True)


def test_every_method_of_ours_is_in_the_table() -> None:
    ours = {n for n, method in METHODS.items() if method.__module__.startswith("minillava.")}
    assert ours == set(NUMBERING), "write in NUMBERING what the method's released code does"


@pytest.mark.parametrize("name", NUMBERING)
def test_positions_are_numbered_as_released(model: Any, batch: Batch, name: str) -> None:
    result = run(model, batch, tiny.example(name))
    report = result.report
    left = zip(report.tokens_entering[-1], report.prompt_tokens, strict=True)
    assert all(rows < prompt for rows, prompt in left)  # else both numberings are the same
    # the next number in layer 0: methods inside the decoder renumber in the layers behind
    compact = NUMBERING[name] == "compact"
    assert report.next_position == (report.tokens_entering[0] if compact else report.prompt_tokens)
    other = "original" if compact else "compact"
    renumbered = run(model, batch, tiny.example(name, f"positions={other}"))
    assert not torch.equal(renumbered.logits, result.logits)


@pytest.mark.parametrize(
    "plan",
    [
        "random:keep=1,scope=all+uniform:keep=0,scope=all",
        "random:keep=1,scope=all+fastv:layer=1,keep=0,scope=all",
        "fastv:layer=1,keep=1,scope=all+fastv:layer=2,keep=0,scope=all",
    ],
)
def test_a_joint_budget_is_spent_while_any_image_has_a_token(model: Any, plan: str) -> None:
    """After the first method one of the two images has nothing left, the other one token."""
    batch = tiny.make_batch(model, "tIttItt", seed=3)
    first, second = run(model, batch, parse_plan(plan)).report.kept
    assert len(first.positions[0]) == 1
    assert second.positions == [[]]


SINGLE = [  # methods of ours with one `keep`, which keep as many as left() says
    name
    for name in NUMBERING
    if METHODS[name].drops_only and METHODS[name].strength == "keep" and METHODS[name].identity
    if len(tiny.example(name).steps) == 1
]  # fmt: skip


@pytest.mark.parametrize("keep", [0, 1, 9, 16, 0.3])
@pytest.mark.parametrize("name", SINGLE)
def test_as_many_tokens_stay_as_a_method_announces(
    model: Any, batch: Batch, name: str, keep: float
) -> None:
    method: Any = dataclasses.replace(tiny.example(name).methods[0], keep=keep)
    (left,) = method.left(16)
    result = run(model, batch, Plan((method,)))
    assert len(result.report.kept[0].positions[0]) == left
    assert (left == 0) == (keep == 0)


@pytest.mark.parametrize("name", SINGLE)
def test_more_tokens_than_there_are_cannot_be_kept(model: Any, batch: Batch, name: str) -> None:
    method: Any = dataclasses.replace(tiny.example(name).methods[0], keep=17)
    with pytest.raises(ValueError, match="keep=17, but there are 16 image tokens"):
        run(model, batch, Plan((method,)))


@pytest.mark.parametrize("name", ["text-only", "vtw"])
def test_methods_that_keep_no_image_token_announce_none(name: str) -> None:
    assert tiny.example(name).methods[0].left(16) == (0,)
