"""The plan hand:patches=, ranges in lists, and plans written as text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch

from minillava import parse_plan
from minillava.generate import generate
from minillava.pruning import METHODS, PRESETS, Plan
from minillava.pruning.base import Method, option
from minillava.pruning.fastv import FastV
from minillava.pruning.hand import Hand
from minillava.pruning.parsing import LONGEST_RANGE, name_plan, write_method, write_plan


def kept(model: Any, plan: str, prompt: str = "ttItt") -> list[list[int]]:
    batch = tiny.make_batch(model, prompt)
    report = generate(model, batch, parse_plan(plan), max_new_tokens=1).report
    return [step.positions[0] for step in report.kept]


def test_the_named_patches_stay(model: Any) -> None:
    assert kept(model, "hand:patches=3/7-9/0") == [[2, 5, 9, 10, 11]]
    assert kept(model, "hand:patches=0-15") == [list(range(2, 18))]
    assert kept(model, "hand:patches=15,layer=2") == [[17]]


def test_patches_count_in_each_image_or_through_all(model: Any) -> None:
    assert kept(model, "hand:patches=1/2", "tItIt") == [[2, 3, 19, 20]]
    assert kept(model, "hand:patches=1/2/31,scope=all", "tItIt") == [[2, 3, 33]]


def test_patches_that_an_earlier_method_dropped_stay_away(model: Any) -> None:
    first, second = kept(model, "uniform:keep=8+hand:patches=0-7")
    assert second == [p for p in first if p < 10]


def test_the_choice_of_another_method_can_be_repeated(model: Any) -> None:
    """Same sets and same numbers: FastV's own logits, from its layer on."""
    batch = tiny.make_batch(model, "ttItt")
    fastv = generate(model, batch, parse_plan("fastv:k=2,keep=5"), 4, output_logits=True)
    patches = "/".join(str(p - 2) for p in fastv.report.kept[0].positions[0])
    plan = parse_plan(f"hand:patches={patches},layer=2,positions=original")
    again = generate(model, batch, plan, 4, output_logits=True)
    assert torch.equal(fastv.logits, again.logits)
    assert again.report.kept[0].digest == fastv.report.kept[0].digest


def test_no_patch_at_all_from_python(model: Any) -> None:
    batch = tiny.make_batch(model, "ttItt")
    nothing = generate(model, batch, Plan((Hand(patches=()),)), 3, output_logits=True)
    text_only = generate(model, batch, parse_plan("text-only"), 3, output_logits=True)
    assert torch.equal(nothing.logits, text_only.logits)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("hand", "hand needs patches=, for example hand:patches=3/7-12"),
        ("hand:patches=3/3", "patches names 3 twice"),
        ("hand:patches=1-4/3", "patches names 3 twice"),
        ("hand:patches=-1", "patches=-1 must be 0 or more"),
        ("hand:patches=9-4", "9-4 must ascend"),
        ("hand:patches=0-999999999", f"must ascend, by {LONGEST_RANGE} at most"),
        ("hand:patches=4-", "must be a whole number"),
        ("hand:patches=0.5", "must be a whole number"),
        ("hand:patches=1,average=4", "average=4"),
    ],
)
def test_plans_that_are_refused(model: Any, plan: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept(model, plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("hand:patches=16", "patches names 16, but the patches are 0 to 15"),
        ("hand:patches=32,scope=all", "patches names 32, but the patches are 0 to 31"),
        ("hand:patches=1,layer=4", "layer=4, but the decoder has layers 0 to 3"),
    ],
)
def test_what_the_prompt_does_not_have(model: Any, plan: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept(model, plan, "tItIt")


def test_ranges_work_in_all_lists_of_whole_numbers() -> None:
    layers = parse_plan("sparsevlm:layers=1-3,keep=9/8/7").methods[0]
    assert layers == parse_plan("sparsevlm:layers=1/2/3,keep=9/8/7").methods[0]
    with pytest.raises(ValueError, match="1-3: must be a whole number, or a share"):
        parse_plan("sparsevlm:layers=1/2/3,keep=1-3")


# ---------------------------------------------------------------- plans as text


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("more", [(), ("positions=compact",), ("mode=mask", "until=4")])
def test_a_plan_can_be_written_and_read(name: str, more: tuple[str, ...]) -> None:
    if more and "mask" in more[0] and not METHODS[name].drops_only:
        return
    plan = tiny.example(name, *more)
    assert parse_plan(write_plan(plan)).methods == plan.methods


@pytest.mark.parametrize("share", [0.00005, 1e-9, 0.1, 2 / 3])
def test_shares_are_written_without_an_exponent(share: float) -> None:
    plan = Plan((METHODS["random"](keep=share),))
    assert parse_plan(write_plan(plan)).methods == plan.methods
    plan = Plan((METHODS["v2drop"](layers=(2,), ratios=(share,)),))
    assert parse_plan(write_plan(plan)).methods == plan.methods


def test_a_method_with_the_name_of_another_is_written_with_its_own_options() -> None:
    @dataclass(frozen=True)
    class Namesake(Method):
        least: int = option(3)

        name = "fastv"

    assert write_method(Namesake(least=4)) == "fastv:least=4"


def test_presets_are_written_in_full() -> None:
    for name in PRESETS:
        plan = parse_plan(name)
        written = write_plan(plan)
        assert parse_plan(written).methods == plan.methods
        assert name_plan(plan) == f"{name} = {written}"
    said = "sparsevlm:layers=3/7/16,keep=300/200/110,version=1"
    assert write_plan(parse_plan("sparsevlm-192")) == said


def test_the_name_of_a_plan() -> None:
    for text, name in {
        "": "none",
        "none": "none",
        "fastv:k=2,r=0.25": "fastv:k=2,r=0.25",
        "hand:patches=0-9": "hand:patches=0-9",
    }.items():
        assert name_plan(parse_plan(text)) == name
    assert name_plan(Plan((FastV(layer=3),))) == "fastv:layer=3,r=0.5"
    assert name_plan(Plan((Hand(patches=(1, 2, 3, 4, 9)),))) == "hand:patches=1-4/9"
    solved = parse_plan("fastv:k=2,average=192").resolve(32, 576)
    assert name_plan(solved) == "fastv:k=2,average=192 = fastv:layer=2,keep=166"
    dict_plan = parse_plan(
        {"fastv_k": 2, "fastv_r": 0.5, "image_token_start_index": 5, "image_token_length": 64}
    )
    assert name_plan(dict_plan) == "fastv:k=2,r=0.5"
    assert write_plan(replace(dict_plan, text="")) == "fastv:layer=2,r=0.5"
