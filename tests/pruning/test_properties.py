"""Properties that hold for every method, whatever it scores. The methods are read from the registry
and compared with a decoder that never removes a row (reference.py)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import Reference, layers_of, picture_rows, replay
from tiny import IMAGE, alone, assert_close, example, make_batch, watching

from minillava import Batch, parse_plan
from minillava.generate import Result, generate
from minillava.pruning import METHODS
from minillava.pruning.base import Context, Method, Plan

PROMPTS = ("tttItttttt", "tttt", "tItIttt", "Itttt", "tIItt", "tI")
IN_TEXT = PROMPTS[:-1]  # what a picture ends may lose the very row that it is answered from
DROPPING = [name for name, method in METHODS.items() if method.drops_only]
RANKING = [name for name, method in METHODS.items() if not method.newest_row]
IDENTITIES = [name for name, method in METHODS.items() if method.identity is not None]


def run(model: Any, batch: Batch, plan: Plan | None = None, n: int = 3, **options: Any) -> Result:
    return generate(model, batch, plan, n, output_logits=True, **options)


@pytest.fixture
def model(fitting_model: Any) -> Any:
    return fitting_model


@pytest.fixture
def batch(model: Any) -> Batch:
    """Every shape of prompt at once; the first and the fourth come with a focus."""
    focus = [torch.tensor([5, 9, 11]), None, None, torch.tensor([1, 200]), None, None]
    return make_batch(model, *PROMPTS, focus=focus)


@pytest.fixture
def one(model: Any) -> Batch:
    return make_batch(model, "ttItttt", seed=3)


@pytest.fixture
def reference(model: Any) -> Reference:
    return Reference(model)


@pytest.fixture
def plain(model: Any, batch: Batch) -> Result:
    return run(model, batch)


def assert_same(a: Result, b: Result) -> None:
    assert a.tokens == b.tokens
    assert_close(a.logits, b.logits)


def assert_equals_reference(
    model: Any,
    reference: Reference,
    batch: Batch,
    plan: Plan,
    compact: Sequence[str] = (),
    n: int = 3,
    use_cache: bool = True,
) -> Result:
    """Every surviving row of the prefill, and the logits of every new token."""
    with watching(*model.llama.blocks) as outputs:
        result = run(model, batch, plan, n, use_cache=use_cache)
    report, pictures = result.report, picture_rows(model, batch)
    L = len(outputs)
    for b, (ids, mask) in enumerate(zip(batch.ids, batch.mask, strict=True)):
        ids = ids[mask]
        T, is_image = len(ids), ids == IMAGE
        mine, pictures = pictures.split([int(is_image.sum()), len(pictures) - int(is_image.sum())])
        new = torch.tensor(result.tokens[b][:-1], dtype=torch.long)
        x = reference.embed(torch.cat((ids, new)), mine, IMAGE)
        layers = layers_of(plan, report, b, is_image, L, compact)
        traced = replay(reference, x, layers, len(new))
        for i, layer in enumerate(layers):
            start = sum(report.tokens_entering[i][:b])
            rows = outputs[i][0][start : start + report.tokens_entering[i][b]]
            assert_close(rows, traced.hidden[i + 1][:T][layer.present])
            assert report.image_tokens_entering[i][b] == int((layer.visible & is_image).sum())
        assert report.next_position[b] == layers[0].next_position
        if layers[-1].present[-1]:
            assert_close(result.logits[b], traced.logits[T - 1 :])
    return result


# ---------------------------------------------------------------- 6.1 keeping everything


@pytest.mark.parametrize("name", IDENTITIES)
def test_keeping_everything_changes_nothing(
    model: Any, batch: Batch, one: Batch, plain: Result, name: str
) -> None:
    modes = ("drop", "mask") if METHODS[name].drops_only else ("drop",)
    for mode in modes:
        plan = parse_plan(f"{name}:{METHODS[name].identity},mode={mode}")
        assert torch.equal(run(model, batch, plan).logits, plain.logits)
        for use_cache in (True, False):
            expected = run(model, one, use_cache=use_cache)
            kept = run(model, one, plan, use_cache=use_cache)
            assert torch.equal(kept.logits, expected.logits)


def test_no_plan_is_none(model: Any, batch: Batch, plain: Result) -> None:
    for text in (None, "", "none"):
        assert torch.equal(run(model, batch, parse_plan(text)).logits, plain.logits)


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_without_picture_is_left_alone(model: Any, name: str) -> None:
    text = make_batch(model, "ttttt")
    result = run(model, text, example(name))
    assert torch.equal(result.logits, run(model, text).logits)
    assert all(kept.positions == [[]] and kept.extra == [0] for kept in result.report.kept)


# ---------------------------------------------------------------- 6.2 dropping is hiding


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_dropping_and_hiding_equal_a_decoder_that_removes_nothing(
    model: Any, reference: Reference, batch: Batch, name: str, mode: str
) -> None:
    plan = example(name, f"mode={mode}", "positions=original", "cache=drop")
    again = mode == "mask" and METHODS[name].newest_row  # then only the prefill stands
    assert_equals_reference(model, reference, batch, plan, n=1 if again else 4)


@pytest.mark.parametrize("name", DROPPING)
def test_compact_numbers_are_each_layers_own(
    model: Any, reference: Reference, batch: Batch, name: str
) -> None:
    plan = example(name, "positions=compact", "cache=drop")
    result = assert_equals_reference(model, reference, batch, plan, compact=(name,))
    if plan.steps[0].stage != "decoder":
        assert result.report.next_position == result.report.cache_lengths[0]


@pytest.mark.parametrize("name", DROPPING)
def test_the_default_numbering_is_the_declared_one(model: Any, batch: Batch, name: str) -> None:
    declared = METHODS[name].numbering
    expected = run(model, batch, example(name, f"positions={declared}"))
    assert torch.equal(run(model, batch, example(name)).logits, expected.logits)
    other = {"original": "compact", "compact": "original"}[declared]
    assert not torch.equal(
        run(model, batch, example(name, f"positions={other}")).logits, expected.logits
    )


# ---------------------------------------------------------------- 6.3 decoding


@pytest.mark.parametrize("name", METHODS)
def test_every_way_of_decoding_gives_the_same_first_token(
    model: Any, batch: Batch, name: str
) -> None:
    static = run(model, batch, example(name), n=1)
    assert_same(run(model, batch, example(name), n=1, use_cache=False), static)
    if METHODS[name].drops_only:
        original = run(model, batch, example(name, "positions=original"), n=1)
        for use_cache in (True, False):
            masked = run(model, batch, example(name, "mode=mask"), n=1, use_cache=use_cache)
            for b in range(len(IN_TEXT)):
                assert masked.tokens[b] == original.tokens[b]
                assert_close(masked.logits[b], original.logits[b])


@pytest.mark.parametrize("name", RANKING)
def test_without_the_newest_row_the_cache_changes_nothing(
    model: Any, batch: Batch, name: str
) -> None:
    modes = ("drop", "mask") if METHODS[name].drops_only else ("drop",)
    for mode in modes:
        more = ["positions=original"] if mode == "mask" else ["cache=drop"]
        plan = example(name, f"mode={mode}", *more)
        assert_same(run(model, batch, plan, n=4, use_cache=False), run(model, batch, plan, n=4))


# ---------------------------------------------------------------- 6.5 batches


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, "mode=drop") for name in METHODS),
        *((name, "mode=drop,scope=all") for name in DROPPING),
        *((name, "mode=mask") for name in DROPPING),
    ],
)
def test_a_batch_gives_what_each_prompt_gives_alone(
    model: Any, batch: Batch, name: str, options: str
) -> None:
    plan = example(name, options)
    together = run(model, batch, plan, seed=4, temperature=0.8, top_p=0.9)
    # backwards: a method that remembers the sample before would meet the same one as in the batch
    for b in reversed(range(len(batch.ids))):
        single = run(model, alone(model, batch, b), plan, seed=4 + b, temperature=0.8, top_p=0.9)
        assert single.tokens[0] == together.tokens[b]
        assert_close(together.logits[b], single.logits[0])
        for ours, theirs in zip(together.report.kept, single.report.kept, strict=True):
            assert ours.positions[b] == theirs.positions[0]
            assert ours.extra[b] == theirs.extra[0]
        for field in ("tokens_entering", "image_tokens_entering", "cache_lengths"):
            ours, theirs = getattr(together.report, field), getattr(single.report, field)
            assert [layer[b] for layer in ours] == [layer[0] for layer in theirs]
        assert together.report.next_position[b] == single.report.next_position[0]


@pytest.mark.parametrize(
    "plan",
    [
        "fastv:layer=2,keep=5",
        "pyramiddrop:layers=1/3,ratios=0.5/0.25",
        "uniform:keep=7,positions=compact+fastv:layer=1,keep=3",
        "fastv:layer=2,keep=5,mode=mask",
        "simignore:keep=4,mode=mask+fastv:layer=1,keep=2",
        "fastv:layer=1,keep=5,mode=mask,until=3",
        "simignore:keep=4,mode=mask,until=2+fastv:layer=2,keep=3",
    ],
)
def test_a_long_answer_in_a_batch_is_the_one_given_alone(
    model: Any, batch: Batch, plan: str
) -> None:
    """The samples' rows in the cache differ in number, and new ones follow each sample's own."""
    parsed = parse_plan(plan)
    together = run(model, batch, parsed, n=12)
    assert len(set(together.report.cache_lengths[-1])) > 1
    for b in range(len(batch.ids)):
        single = run(model, alone(model, batch, b), parsed, n=12)
        assert len(single.tokens[0]) == 12
        assert single.tokens[0] == together.tokens[b]
        assert_close(together.logits[b], single.logits[0])


@pytest.mark.parametrize("name", METHODS)
def test_the_report_adds_up(model: Any, batch: Batch, name: str) -> None:
    plan, N = example(name), model.config.vision.num_patches
    report = run(model, batch, plan, n=2).report
    assert [k.rule for k in report.kept] == [step.method.name for step in plan.steps]
    assert [k.layer for k in report.kept] == [step.layer for step in plan.steps]
    assert report.prompt_tokens == batch.mask.sum(1).tolist()
    for b, prompt in enumerate(PROMPTS):
        pictures, before = prompt.count("I"), N * prompt.count("I")
        text = report.prompt_tokens[b] - before
        places = [i for i, x in enumerate(batch.ids[b][batch.mask[b]].tolist()) if x == IMAGE]
        for kept in report.kept:
            assert kept.positions[b] == sorted(set(kept.positions[b]))
            assert set(kept.positions[b]) <= set(places)
            assert len(kept.positions[b]) + kept.extra[b] <= before
            assert pictures or not kept.extra[b]
        for i, entering in enumerate(report.tokens_entering):
            done = [k for k in report.kept if k.layer <= i]
            left = len(done[-1].positions[b]) + done[-1].extra[b] if done else before
            assert report.image_tokens_entering[i][b] == left
            assert entering[b] == left + text
            cut = plan.methods[0].cut_from  # MustDrop and IVC-Prune cut caches
            held = entering if cut is None or i < cut else report.tokens_entering[-1]
            assert report.cache_lengths[i][b] == held[b]
    if pictures_left := [k for k in report.kept if k.positions[0]]:
        assert len(pictures_left[-1].positions[0]) < N


@pytest.mark.parametrize("name", METHODS)
def test_left_says_how_many_image_tokens_stay(model: Any, one: Batch, name: str) -> None:
    """As many as were left or, of a method whose number depends on the image, at least as many."""
    (method,), N = example(name).methods, model.config.vision.num_patches
    if type(method).left is Method.left:
        pytest.skip("it does not say; average= refuses it")
    report = run(model, one, Plan((method,)), n=1).report
    left = [len(kept.positions[0]) + kept.extra[0] for kept in report.kept]
    said = list(method.left(N))
    fits = all(a <= b for a, b in zip(left, said, strict=True))
    assert fits if method.adaptive else left == said


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_asks_the_newest_row_says_so(
    model: Any, one: Batch, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise mode=mask would not choose again for a new token."""
    attention, read = Context.attention, []

    def note(c: Context, rows: Any, *args: Any, **options: Any) -> Any:
        read.append(rows.tolist() == c.newest.tolist())
        return attention(c, rows, *args, **options)

    monkeypatch.setattr(Context, "attention", note)
    run(model, one, example(name), n=1)
    assert METHODS[name].newest_row or not any(read)


# ---------------------------------------------------------------- 6.6 the same every time


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_bitwise_equal(model: Any, batch: Batch, name: str) -> None:
    first, second = (run(model, batch, example(name), seed=7, temperature=1.0) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert first.tokens == second.tokens
    assert first.report.kept == second.report.kept


def changed(model: Any, layer: int, value: float) -> Any:
    """The model with queries of one decoder layer set to a value."""
    other = copy.deepcopy(model)
    other.llama.blocks[layer].attn.q_proj.weight.fill_(value)
    return other


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_of_equal_scores_the_lower_index_is_kept(model: Any, batch: Batch, mode: str) -> None:
    flat = changed(model, 1, 0.0)  # every row attends alike to all it sees
    report = run(flat, batch, parse_plan(f"fastv:layer=2,keep=5,mode={mode}"), n=2).report
    for b, prompt in enumerate(PROMPTS):
        ids = batch.ids[b][batch.mask[b]]
        places = (ids == IMAGE).nonzero()[:, 0].split(16)
        assert report.kept[0].positions[b] == [
            i for image in places[: prompt.count("I")] for i in image[:5].tolist()
        ]


@pytest.mark.parametrize(
    "plan", ["fastv:layer=2,keep=5", "fastv:layer=2,keep=5,mode=mask", "sparsevlm:layers=2,keep=5"]
)
def test_scores_that_are_no_numbers_are_refused_by_layer(model: Any, one: Batch, plan: str) -> None:
    broken = changed(model, 1, float("nan"))
    with pytest.raises(ValueError, match=r"NaN among the (scores|rows) of layer 2"):
        run(broken, one, parse_plan(plan))
    with pytest.raises(ValueError, match="logits are not numbers"):
        run(broken, one)


# ---------------------------------------------------------------- prompts with hardly any text


@pytest.mark.parametrize("name", METHODS)
def test_a_picture_behind_the_beginning_token_alone(model: Any, name: str) -> None:
    result = run(model, make_batch(model, "tI"), example(name))
    assert result.logits.isfinite().all()
    if METHODS[name].identity is not None:
        plan = parse_plan(f"{name}:{METHODS[name].identity}")
        expected = run(model, make_batch(model, "tI"))
        assert torch.equal(run(model, make_batch(model, "tI"), plan).logits, expected.logits)


def test_a_prompt_of_pictures_alone_is_refused(model: Any) -> None:
    for prompts in (["I"], ["ttItt", "II"]):
        pictures = make_batch(model, *prompts)
        assert run(model, pictures).logits.isfinite().all()
        with pytest.raises(ValueError, match=f"prompt {len(prompts) - 1} is nothing but images"):
            run(model, pictures, parse_plan("uniform:keep=0"))


# ---------------------------------------------------------------- 6.8 two at once


def test_two_generations_at_once_do_not_meet(model: Any, batch: Batch, one: Batch) -> None:
    jobs = [
        (batch, parse_plan("fastv:k=2,keep=5")),
        (one, parse_plan("simignore:keep=4,mode=mask,until=2+fastv:k=3,keep=2,mode=mask")),
    ]
    expected = [run(model, *job, n=12) for job in jobs]
    seen: list[list[Result]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(3):
            seen[i].append(run(model, *jobs[i], n=12))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, wanted in zip(seen, expected, strict=True):
        assert len(results) == 3
        for result in results:
            assert torch.equal(result.logits, wanted.logits)
            assert result.report.kept == wanted.report.kept


# ---------------------------------------------------------------- a version of its own


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("scope", ["image", "all"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_sparsevlms_second_version_drops_and_hides(
    model: Any, reference: Reference, batch: Batch, mode: str, scope: str, use_cache: bool
) -> None:
    """It merges nothing, so hiding is dropping, and the choice for the prompt stands."""
    options = f"version=2,layers=1/2/3,keep=8/5/3,heads=2,mode={mode},scope={scope}"
    plan = parse_plan(f"sparsevlm:{options}")
    n = 4 if use_cache else 1  # without a cache the text that rates grows
    result = assert_equals_reference(model, reference, batch, plan, n=n, use_cache=use_cache)
    other = {"drop": "mask", "mask": "drop"}[mode]
    twin = run(model, batch, parse_plan(f"sparsevlm:{options}".replace(mode, other)), n)
    assert [k.positions for k in twin.report.kept] == [k.positions for k in result.report.kept]
    assert result.report.chosen_again == []
    if scope == "image":
        assert [len(k.positions[0]) for k in result.report.kept] == [8, 5, 3]
