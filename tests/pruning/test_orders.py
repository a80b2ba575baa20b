"""Which methods follow which: a plan generates, or is refused before the vision tower runs.

Every ordered pair of methods is tried on a model (most pairs by a slow test), and every preset
before and after every method.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import GRIDS, example, make_batch, watching_inputs, write_clip, write_model

from minillava import parse_plan
from minillava.generate import encode_images, generate
from minillava.pruning import METHODS, PRESETS
from minillava.pruning.base import Plan


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with 6 x 6 patches, which MustDrop can cut into windows."""
    return write_model(tmp_path_factory, image_size=14 * GRIDS["mustdrop"])


def outcome(model: Any, plan: Plan, batch: Any = None) -> str:
    """The error with which a plan is refused, or nothing. The tower must not have run then."""
    batch = make_batch(model, "ttItttt") if batch is None else batch
    with watching_inputs(model.vision.blocks[0]) as blocks:
        error = ""
        try:
            generate(model, batch, plan, 1)
        except ValueError as raised:
            error = str(raised)
    assert not (error and blocks), f"{plan}: refused after the vision tower ran: {error}"
    return error


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_pairs_run_or_are_refused_before_any_forward(
    model: Any, wide: Any, first: str, part: int
) -> None:
    """Each method before every third one, itself among them; the slow parts are the others."""
    names = list(METHODS)
    for second in names[(names.index(first) + part) % 3 :: 3]:
        plan = Plan(example(first).methods + example(second).methods)
        error = outcome(wide if "mustdrop" in (first, second) else model, plan)
        assert "\n" not in error
        assert not error or {first, second} & {*error.replace("+", " ").replace(":", " ").split()}


def test_what_is_refused_says_which_and_what_to_do(model: Any, wide: Any) -> None:
    for plan, error in {
        "fastervlm:keep=5+nuwa:keep=4,final=2,layer=2": (
            "fastervlm+nuwa: at the vision stage nuwa needs every patch of the image, but "
            "fastervlm leaves 5 of 16 rows; write nuwa before fastervlm, or leave one of them out"
        ),
        "visionzip:dominant=3,contextual=2+vlmpruner:keep=4,layer=2": (
            "visionzip+vlmpruner: at layer 2 vlmpruner needs nothing but patches, but visionzip "
            "leaves rows that are no patches, too; leave one of them out"
        ),
        "prunesid:keep=5+fastervlm:keep=3": (
            "prunesid+fastervlm: at the vision stage fastervlm needs nothing but patches, but "
            "prunesid leaves rows that are no patches, too; write fastervlm before prunesid, or "
            "leave one of them out"
        ),
        "sparsevlm:layers=1/2/3,keep=8/5/3+v2drop:layers=1/2,ratios=0.5/0.5": (
            "sparsevlm+v2drop: at layer 1 v2drop needs rows of the layer before, but sparsevlm "
            "leaves rows that are new there; write v2drop before sparsevlm, or leave one of them "
            "out"
        ),
        "tome:r=1+flowcut:keep=3": (
            "tome+flowcut: at the vision stage flowcut needs every patch of the image, but tome "
            "leaves 15 of 16 rows; leave one of them out"
        ),
        "border+grid:keep=4": (
            "border+grid: at the embed stage grid needs every patch of the image, but border "
            "leaves at most 16 of 16 rows; write grid before border, or leave one of them out"
        ),
        "fastervlm:keep=5+apet:keep=4,basis=2,final=3,layer=2,first=3/1": (
            "apet: first=3/1 counts the rows of a whole image, but fastervlm runs before; leave "
            "one of them out"
        ),
    }.items():
        assert outcome(model, parse_plan(plan)) == error


@pytest.mark.parametrize(
    "plan",
    [
        "nuwa:keep=4,final=2,layer=2+fastervlm:keep=2",
        "fastervlm:keep=3+visionzip:dominant=2,contextual=1",
        "fastervlm:keep=1.0+grid:keep=4",
        "random:keep=32,scope=all+grid:keep=4",
        "sparsevlm:version=2,layers=1/2,keep=8/5,heads=2+vlmpruner:keep=3,layer=3",
        "v2drop:layers=1/2,ratios=0.5/0.5+sparsevlm:layers=1/2/3,keep=8/5/3",
        "autoprune:depth=4,target=4",
    ],
)
def test_what_is_possible_is_not_refused(model: Any, plan: str) -> None:
    assert not outcome(model, parse_plan(plan), make_batch(model, "tItItt"))


# one preset of each kind: those of a kind differ in numbers alone
KINDS = {parse_plan(name).methods[0].name: name for name in PRESETS}


@pytest.mark.parametrize("preset", KINDS.values())
def test_presets_with_methods(model: Any, wide: Any, preset: str) -> None:
    methods = parse_plan(preset).methods
    for name in METHODS:
        other = example(name).methods
        for plan in (Plan(methods + other), Plan(other + methods)):
            outcome(wide if "mustdrop" in (name, preset[:8]) else model, plan)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("prompt", ["tIItItt", "ItI"])
def test_pictures(model: Any, wide: Any, name: str, prompt: str) -> None:
    own = wide if name in GRIDS else model
    batch = make_batch(own, prompt)
    outcome(own, example(name), batch)
    outcome(own, example(name), dataclasses.replace(batch, sizes=None))


def test_models(model: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models of another depth, of another grid, and without a tokenizer."""
    others = [
        write_model(tmp_path_factory, vision_layers=2, layers=2, image_size=42),
        write_model(tmp_path_factory, vision_layers=1, image_size=70),
    ]
    for other in others:
        for name in METHODS:
            outcome(other, example(name))
    others[0].tokenizer = None
    for name in METHODS:
        outcome(others[0], example(name))


def test_what_only_some_models_have(model: Any, tmp_path: Any) -> None:
    clip = write_clip(tmp_path, width=32)
    for name in ("trim", "cdpruner"):
        plan = parse_plan(f"{name}:keep=3,clip={clip}")
        assert "an image tower of width 32, this model's is 24 wide" in outcome(model, plan)
    assert "use keep=" in outcome(model, parse_plan("tome:keep=0"))


def test_encoding_checks_the_plan(model: Any) -> None:
    batch = make_batch(model, "tItt")
    with watching_inputs(model.vision.blocks[0]) as blocks:
        with pytest.raises(ValueError, match=r"fastervlm\+grid: at the embed stage"):
            encode_images(model, batch, parse_plan("fastervlm:keep=5+grid:keep=4"))
        assert not blocks
    assert torch.is_tensor(encode_images(model, batch)[model.feature_layer])
