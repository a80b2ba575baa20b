"""Every method on a pretended CUDA device: nothing is misplaced, and the host waits rarely.

The pretended device computes with the kernels of the CPU, so all logits are those of the CPU bit
for bit. What a token, a step of a plan and a prompt cost is asserted in waits of the host and
copies to the device, not in time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pretended_device import Counts, PretendedGenerator, pretended_cuda

import minillava.pruning
from minillava import Batch, load, parse_plan
from minillava.generate import Answer, Result, encode_images, generate
from minillava.pruning import METHODS, load_file_method
from minillava.pruning.base import Method, Plan
from minillava.request import Settings

# The shapes that a batch can have: one prompt, equal and unequal lengths, several images, adjacent
# images, no image, an image first or last.
BATCHES = {
    "one": ("ttItttt",),
    "equal": ("ttItttt", "tIttttt"),
    "ragged": ("ttItttt", "tItt"),
    "several": ("tItIttt", "tItt"),
    "adjacent": ("tIItt", "tIt"),
    "some text-only": ("tttt", "ttIt", "tt"),
    "all of these": ("tttItttttt", "tttt", "tItIttt", "Itttt", "tIItt", "tI"),
}
MODES = ("drop", "mask", "until", "no cache")
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8", "dtype": "float32"},
    "int4": {"quantize": "int4", "dtype": "float32"},
    "int8 in float16": {"quantize": "int8", "dtype": "float16"},
    "int4 in bfloat16": {"quantize": "int4", "dtype": "bfloat16"},
    "nf4": {"quantize": "nf4", "dtype": "float32"},
    "nf4 in float16": {"quantize": "nf4", "dtype": "float16"},
}

# Waits for one image at one step of a plan: one for the index that the method chose, one for the
# numbers that it chose by. SparseVLM reads its raters, the peaks of its clusters and the index,
# PruneSID cosines, groups and index, MustDrop likeness, the key set and its index, FlowCut how many
# tokens a block drops, AutoPrune once the mutual information, the peaks and the index.
WAITS = {"autoprune": 3, "sparsevlm": 3, "prunesid": 3, "mustdrop": 3, "flowcut": 3}
PROMPT = 5  # waits of a prompt: the clock three times, the pixels of up to 8 images, its token


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models by the patches along a side of an image."""
    shapes = {grid: {"image_size": 14 * grid} for grid in (4, 6)}
    return {
        grid: tiny.write_folder(tmp_path_factory, vision_layers=4, width=64, **shape)
        for grid, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def pairs(folders: dict[int, Path]) -> dict[int, tuple[Any, Any]]:
    """Each of them on the CPU and on the pretended device."""
    here = {grid: load(folder)[0] for grid, folder in folders.items()}
    with pretended_cuda():
        return {grid: (here[grid], load(f, device="cuda")[0]) for grid, f in folders.items()}


@pytest.fixture
def folder(folders: dict[int, Path], request: pytest.FixtureRequest) -> Path:
    return folders[tiny.grid_for(request)]


@pytest.fixture
def here(pairs: dict[int, tuple[Any, Any]], request: pytest.FixtureRequest) -> Any:
    return pairs[tiny.grid_for(request)][0]


@pytest.fixture
def there(pairs: dict[int, tuple[Any, Any]], request: pytest.FixtureRequest) -> Any:
    """The same model on the pretended device."""
    return pairs[tiny.grid_for(request)][1]


Costs = list[tuple[int, int]]


def costs(model: Any, batch: Batch, plan: Plan, n: int = 3, **options: Any) -> tuple[Costs, Result]:
    """The result of n new tokens on the pretended device, and (waits of the host, copies to the
    device) until each of them is there, beyond those until the one before."""
    totals = [(0, 0)]
    with pretended_cuda() as counts:
        answer = Answer(model, batch, plan, Settings(n, **options), None)
        totals += [counts.totals for _ in answer]
    each = [(c - a, d - b) for (a, b), (c, d) in pairwise(totals)]
    return each, answer.result


def runs(here: Any, there: Any, batch: Batch, plan: Plan, n: int = 2, **options: Any) -> Costs:
    """Run a plan on both devices, compare, and return what it cost on the pretended one."""
    expected = generate(here, batch, plan, n, output_logits=True, **options)
    each, found = costs(there, batch, plan, n, output_logits=True, **options)
    assert found.tokens == expected.tokens
    torch.testing.assert_close(found.logits.values, expected.logits, equal_nan=True, atol=0, rtol=0)
    for ours, theirs in zip(found.report.kept, expected.report.kept, strict=True):
        for name in vars(ours).keys() - ROUNDED:
            assert getattr(ours, name) == getattr(theirs, name), name
        # of TRIM and CDPruner: open_clip adds up in another order there
        for a, b in zip(ours.scores, theirs.scores, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    assert found.report.cache_bytes == expected.report.cache_bytes
    return each


def variants(name: str, modes: Sequence[str] = MODES) -> Iterator[tuple[Plan, dict[str, Any]]]:
    """The plans of a method in those modes that it has, with the options of generate."""
    for mode in modes if METHODS[name].drops_only else ("drop", "no cache"):
        more = {"mask": ["mode=mask"], "until": ["mode=mask", "until=4"]}.get(mode, [])
        yield tiny.example(name, *more), {"use_cache": mode != "no cache"}


# ---------------------------------------------------------------- placement


TEXT_TOWER = ("trim", "cdpruner")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_mode(here: Any, there: Any, name: str) -> None:
    """A mask's end (`until`) is known on the host; the slow test has it too. In drop mode a step
    of a plan costs two waits for each image, except those of WAITS; a token costs one."""
    batch = tiny.make_batch(here, "tIIt", "tt", "tItt")
    if name in TEXT_TOWER:  # they copy it at their first call
        costs(there, batch, tiny.example(name), 1)
    for plan, options in variants(name, ("drop", "mask", "no cache")):
        (waits, _), *tokens = runs(here, there, batch, plan, **options)
        if options["use_cache"] and plan.methods[0].mode == "drop":
            assert waits <= PROMPT + WAITS.get(name, 2) * len(plan.steps) * 3  # three images
            assert tokens == [(1, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["", *METHODS])
def test_every_method_mode_batch_and_form(folder: Path, name: str, form: str) -> None:
    """The whole product; in float16 and bfloat16 the CPU's arithmetic is another."""
    here = load(folder, **FORMS[form])[0]
    with pretended_cuda():
        there = load(folder, device="cuda", **FORMS[form])[0]
    for prompts in BATCHES.values():
        batch = tiny.make_batch(here, *prompts)
        for plan, options in variants(name) if name else [(Plan(), {}), (Plan(), NO_CACHE)]:
            if form == "float32":
                runs(here, there, batch, plan, 3, **options)
            else:
                with pretended_cuda():
                    assert generate(there, batch, plan, 3, **options).tokens


NO_CACHE = {"use_cache": False}
ROUNDED = {"scores", "margin", "closest"}  # fields of Kept that are not exact


@pytest.mark.parametrize("kind", BATCHES)
def test_every_batch(here: Any, there: Any, kind: str) -> None:
    batch = tiny.make_batch(here, *BATCHES[kind])
    for text in ("", "visionzip:dominant=6,contextual=3+fastv:layer=2,keep=3"):
        runs(here, there, batch, parse_plan(text), 3)


@pytest.mark.parametrize(
    "plan",
    [
        "fastv:layer=0,keep=4,mode=mask",
        "fastv:layer=2,keep=4,released=1",
        "fastv:layer=2,keep=4,scope=all,positions=compact",
        "grid:h=2,w=2,scope=all",
        "simignore:keep=7,step=2,i_index=1,measure=manhattan,mode=mask,until=2+fastv:k=2,keep=3",
        "random:keep=5+sparsevlm:layers=1/2/3,keep=4/3/2",
    ],
)
def test_other_options(here: Any, there: Any, plan: str) -> None:
    shapes = ("tItt",) if "released" in plan else ("tItIttt", "tttt", "ItI")
    focus = [torch.tensor([5, 9]), *[None] * (len(shapes) - 1)]
    batch = tiny.make_batch(here, *shapes, focus=focus)
    runs(here, there, batch, parse_plan(plan), 3)


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> dict[str, type[Method]]:
    """The methods that pruning/README.md shows."""
    text = (Path(minillava.pruning.__file__).parent / "README.md").read_text()
    found: dict[str, type[Method]] = {}
    for code in re.findall(r"```python\n(# \w+\.py.*?)```", text, re.DOTALL):
        file = tmp_path_factory.mktemp("readme") / "shown.py"
        file.write_text(code)
        for name in re.findall(r"^class (\w+)", code, re.MULTILINE):
            found[name] = load_file_method(f"{file}:{name}")
    return found


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("name", ["Loud", "Seen", "Central", "Folded", "EveryThird"])
def test_methods_of_the_readme(
    here: Any, there: Any, readme: dict[str, type[Method]], name: str, mode: str
) -> None:
    assert len(readme) == 5
    method = readme[name]()
    if mode == "mask" and not method.drops_only:
        pytest.skip("it does not only drop")
    batch = tiny.make_batch(here, "tItIttt", "tttt", "tIItt")
    runs(here, there, batch, Plan((replace(method, mode=mode),)), 4)


@pytest.mark.parametrize("form", FORMS)
def test_stored_forms(folder: Path, here: Any, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Float32 arithmetic gives the numbers of the CPU without its kernels, which round activations
    too; half precision has to run. A second generation copies nothing, not even the matrix that
    int8 rotates with."""
    batch = tiny.make_batch(here, "tItIttt", "tttt")
    plan = parse_plan("fastv:layer=2,keep=4")
    with pretended_cuda():
        there = load(folder, device="cuda", **FORMS[form])[0]
    _, found = costs(there, batch, plan, output_logits=True)
    assert found.logits.values.isfinite().all()
    assert there.dtype == getattr(torch, FORMS[form].get("dtype", "float32"))
    if there.dtype == torch.float32:
        monkeypatch.setattr("minillava.quant.linear.kernel_works", lambda kind: False)
        expected = generate(load(folder, **FORMS[form])[0], batch, plan, 3, output_logits=True)
        assert found.tokens == expected.tokens
        tiny.assert_close(found.logits.values, expected.logits)
    again, _ = costs(there, tiny.make_batch(here, "tItt", "tt"), Plan(), 2)
    assert again[1:] == [(1, 0)]


def test_a_checkpoints_rules_for_choosing_tokens(tmp_path: Path) -> None:
    tiny.write_hf(tmp_path, layers=2, vision_layers=3)
    rules = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [5, 9],
        "begin_suppress_tokens": [7],
        "bad_words_ids": [[3, 4], [8]],
        "min_new_tokens": 2,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    here = load(tmp_path)[0]
    batch = tiny.make_batch(here, "ttIttt", "tttt")
    with pretended_cuda():
        found = generate(load(tmp_path, device="cuda")[0], batch, max_new_tokens=6)
    assert found.tokens == generate(here, batch, max_new_tokens=6).tokens
    assert all(tokens[-1] == 2 for tokens in found.tokens)


def test_rules_cost_one_copy_and_no_wait(tmp_path: Path) -> None:
    """Which ids they change is known on the host; the logits stay on the device."""
    tiny.write_hf(tmp_path, layers=2, vision_layers=3)
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4], [8]]}
    rules |= {"suppress_tokens": [5, 9], "forced_eos_token_id": 2, "min_new_tokens": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    with pretended_cuda():
        model = load(tmp_path, device="cuda")[0]
    batch = tiny.make_batch(model, "ttIttt", "tttt", "tt")
    (prompt, *tokens), _ = costs(model, batch, Plan())
    assert prompt[0] <= PROMPT
    assert tokens == [(1, 1), (1, 1)]


def test_int8_dynamic_is_for_the_cpu(folder: Path) -> None:
    with pretended_cuda(), pytest.raises(ValueError, match="for CPUs only"):
        load(folder, device="cuda", quantize="int8-dynamic")


def test_sampling_stop_and_images_encoded_before(here: Any, there: Any) -> None:
    batch = tiny.make_batch(here, "tItIttt", "tttt")
    plan = tiny.example("fastervlm")
    for options in ({"temperature": 0.7, "top_p": 0.9, "seed": 3}, {"min_new_tokens": 3}):
        runs(here, there, batch, plan, 4, **options)
    with pretended_cuda():
        encoded = encode_images(there, batch, plan)
        again = generate(there, batch, plan, 3, encoded=encoded)
    assert again.tokens == generate(here, batch, plan, 3).tokens


# ---------------------------------------------------------------- waits and copies


@pytest.mark.parametrize("kind", BATCHES)
def test_a_token_costs_one_wait_for_the_whole_batch(there: Any, kind: str) -> None:
    batch = tiny.make_batch(there, *BATCHES[kind])
    for options in ({}, {"temperature": 0.7, "top_p": 0.8, "min_new_tokens": 3}, {"seed": 3}):
        (prompt, *tokens), _ = costs(there, batch, Plan(), **options)
        assert prompt[0] <= PROMPT
        assert tokens == [(1, 0), (1, 0)], options


def test_masks_are_copied_once_a_token(there: Any) -> None:
    """Masks that stand, in two segments of layers; and those that are chosen again."""
    batch = tiny.make_batch(there, "tItIttt", "tItt")
    stand = parse_plan("simignore:keep=8,mode=mask+random:keep=4,mode=mask,until=2")
    assert costs(there, batch, stand)[0][1:] == [(1, 2), (1, 2)]
    again = parse_plan("fastv:layer=2,keep=4,mode=mask")
    tokens = costs(there, batch, again)[0][1:]
    assert [waits for waits, _ in tokens] == [1 + 2 * 3, 1 + 2 * 3]  # three images
    assert max(copies for _, copies in tokens) <= 1 + 7 * 3


# ---------------------------------------------------------------- the pretended device itself


def counted(operation: Any) -> Counts:
    with pretended_cuda() as counts:
        operation()
    return counts


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("operation", "waits", "copies"),
    [
        (lambda: on_cuda(3) * 2.0 + on_cuda(3), 0, 0),
        (lambda: on_cuda(3).sum().item(), 1, 0),
        (lambda: on_cuda(3).tolist(), 1, 0),
        (lambda: bool(on_cuda(3).any()), 1, 0),
        (lambda: on_cuda(3).cpu(), 1, 0),
        (lambda: on_cuda(3).to("cpu", torch.float64), 1, 0),
        (lambda: on_cuda(3).to(torch.float64), 0, 0),
        (lambda: on_cuda(3).nonzero(), 1, 0),
        (lambda: on_cuda(3)[on_cuda(3) > 0], 1, 0),
        (lambda: on_cuda(3)[torch.tensor([0, 1])], 1, 1),
        (lambda: on_cuda(3)[[0, 1]], 1, 1),
        (lambda: on_cuda(3)[1:], 0, 0),
        (lambda: on_cuda(3)[on_cuda(3).argmax()], 1, 0),
        (lambda: on_cuda(3)[on_cuda(3).argmax(keepdim=True)], 0, 0),
        (lambda: on_cuda(3).__setitem__(on_cuda(3) > 0, 0.0), 0, 0),
        (lambda: on_cuda(3).__setitem__(on_cuda(3) > 0, on_cuda(3)), 1, 0),
        (lambda: on_cuda(3).__setitem__(0, on_cuda()), 0, 0),
        (lambda: torch.tensor([1, 2], device="cuda"), 1, 1),
        (lambda: on_cuda(3).new_tensor([1, 2]), 1, 1),
        (lambda: torch.ones(3).to("cuda"), 1, 1),
        (lambda: torch.ones(3).to("cuda", non_blocking=True), 0, 1),
        (lambda: on_cuda(3).copy_(torch.ones(3)), 1, 1),
        (lambda: torch.equal(on_cuda(3), on_cuda(3)), 1, 0),
        (lambda: torch.multinomial(on_cuda(3), 1), 2, 0),
        (lambda: on_cuda(3).repeat_interleave(on_cuda(3, dtype=torch.long)), 1, 0),
        (lambda: torch.cuda.synchronize(), 1, 0),
        (lambda: on_cuda(3) + torch.tensor(2.0), 0, 0),
        (lambda: on_cuda(3).exponential_(generator=torch.Generator("cuda")), 0, 0),
    ],
)
def test_what_it_counts(operation: Any, waits: int, copies: int) -> None:
    assert counted(operation).totals == (waits, copies)


@pytest.mark.parametrize(
    "operation",
    [
        lambda: on_cuda(3) + torch.ones(3),
        lambda: torch.cat((on_cuda(3), torch.ones(3))),
        lambda: torch.ones(3)[on_cuda(3).long()],
        lambda: on_cuda(3, 3) @ torch.ones(3, 3),
        lambda: torch.nn.functional.scaled_dot_product_attention(
            on_cuda(1, 1, 2, 4), torch.ones(1, 1, 2, 4), on_cuda(1, 1, 2, 4)
        ),
        lambda: on_cuda(3).index_copy(0, torch.tensor([1]), on_cuda(1)),
        lambda: on_cuda(3).exponential_(generator=torch.Generator()),
        lambda: on_cuda(3, 3, dtype=torch.long) @ on_cuda(3, 3, dtype=torch.long),
        lambda: torch.ops.quantized.linear_dynamic_fp16(
            on_cuda(2, 3), torch.ops.quantized.linear_prepack_fp16(torch.ones(2, 3), None)
        ),
    ],
)
def test_what_it_refuses(operation: Any) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA|CPU|cpu"):
        counted(operation)


def test_a_tensor_of_it_is_of_no_use_elsewhere() -> None:
    with pretended_cuda():
        x = on_cuda(3)
        assert PretendedGenerator("cuda").where.type == "cuda"
    assert x.device == torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="outside pretended_cuda"):
        x + 1
