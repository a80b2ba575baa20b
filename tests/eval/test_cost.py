"""Costs as the papers count them, and exactly, against torch's own counter."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval import cost
from eval.bench import DEMO
from eval.latency import SHAPES, random_batch
from minillava import Batch, load, parse_plan
from minillava.attention import causal_attention
from minillava.engine import hidden_states_read, prefill
from minillava.generate import generate
from minillava.loading.checkpoint import empty_model
from minillava.request import prompts_of

SEVEN, THIRTEEN = SHAPES["7b"].text, SHAPES["13b"].text


# ---------------------------------------------------------------- the papers' figures


@pytest.mark.parametrize(("config", "n", "billions"), [
    (SEVEN, 611, 99.2), (SEVEN, 612, 99.3), (THIRTEEN, 612, 154.6)
])  # fmt: skip
def test_a_layer_by_fastvs_formula(config: Any, n: int, billions: float) -> None:
    assert round(cost.fastv_flops(n, config) / 1e9, 1) == billions


@pytest.mark.parametrize(("config", "n", "K", "dropped", "share"), [
    (SEVEN, 612, 3, 0.5, 0.566),  # the FastV paper's 57 %
    (SEVEN, 612, 2, 0.5, 0.551),  # its reduction by 45 %
    (SEVEN, 576, 3, 0.5, 0.540),
    (SEVEN, 576, 2, 0.5, 0.524),
    (SEVEN, 612, 2, 0.75, 0.332),
    (SEVEN, 612, 2, 0.9, 0.203),
    (SEVEN, 612, 5, 0.5, 0.596),
    (THIRTEEN, 612, 2, 0.5, 0.547),
    (THIRTEEN, 612, 3, 0.5, 0.559),
])  # fmt: skip
def test_shares_by_fastvs_formula(
    config: Any, n: int, K: int, dropped: float, share: float
) -> None:
    entering = [n] * K + [n - round(dropped * 576)] * (config.num_hidden_layers - K)
    assert cost.fastv_share(entering, n, config) == pytest.approx(share, abs=1e-3)


def test_sparsevlm_counts_the_third_matrix() -> None:
    d, m = SEVEN.hidden_size, SEVEN.intermediate_size
    assert cost.sparsevlm_flops(612, SEVEN) == 4 * 612 * d * d + 2 * 612**2 * d + 3 * 612 * d * m
    whole, half = (cost.sparsevlm_flops(n, SEVEN) for n in (612, 324))
    share = cost.fastv_share([612] * 2 + [324] * 30, 612, SEVEN)  # of which it differs little
    assert (2 * whole + 30 * half) / (32 * whole) == pytest.approx(share, abs=2e-3)


# ---------------------------------------------------------------- exactly


def counter() -> FlopCounterMode:
    """torch's, which without this passes over the attention of CPUs."""

    def attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={op: attention})


@pytest.mark.parametrize("plan", [None, "fastv:k=2,keep=5", "divprune:keep=3", "fastv:k=1,keep=0"])
def test_flops_are_those_that_torch_counts(model: Any, plan: str | None) -> None:
    """The model has grouped heads, logits are made of the last row, the tower stops early."""
    batch = tiny.make_batch(model, "tttIttttt")
    parsed, config = parse_plan(plan), model.config
    with counter() as counted, torch.inference_mode():
        encoded = model.encode(batch.pixels, hidden_states_read(model, parsed))
        prefill(model, prompts_of(model, batch), encoded, parsed)
    entering = [n for (n,) in generate(model, batch, parsed, 1).report.tokens_entering]
    blocks = config.vision.num_hidden_layers + config.vision_feature_layer + 1
    expected = cost.vision_flops(config, blocks) + cost.decoder_flops(entering, config.text)
    extra = counted.get_total_flops() - expected
    if plan is None:
        assert extra == 0
    else:  # what a method computes to choose is a small part of what it saves
        whole = cost.decoder_flops([len(batch.ids[0])] * len(entering), config.text)
        saved = whole - cost.decoder_flops(entering, config.text)
        assert 0 <= extra < 0.05 * saved


@pytest.mark.parametrize("plan", [None, "fastv:k=2,keep=5", "simignore:keep=6", "vtw:layer=1"])
def test_bytes_of_the_cache(model: Any, plan: str | None) -> None:
    report = generate(model, tiny.make_batch(model, "tttIttttt"), parse_plan(plan), 1).report
    rows = [n for (n,) in report.cache_lengths]
    assert cost.cache_bytes(rows, model.config.text) == report.cache_bytes


@pytest.mark.parametrize("name", SHAPES)
def test_the_true_shapes_are_counted_without_weights(name: str) -> None:
    config = SHAPES[name]
    model = empty_model(config)
    model.requires_grad_(False)
    entering = [620] * 2 + [188] * (config.text.num_hidden_layers - 2)
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.inference_mode():
        for block, n in zip(model.llama.blocks, entering, strict=True):
            rows = torch.empty(n, config.text.hidden_size)
            block(rows, model.llama.rope(torch.arange(n)), causal_attention)
        model.llama.lm_head(torch.empty(1, config.text.hidden_size))
    assert counted.get_total_flops() == cost.decoder_flops(entering, config.text)


def allocated(act: Callable[[], object]) -> int:
    """The most bytes that tensors made in it held at one time, by torch's own account."""
    act()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@pytest.mark.parametrize("plan", [
    None,  # the largest moment is in the decoder
    "fastv:k=2,r=0.5",  # the same: two layers see everything
    "random:keep=0.25",  # in the tower
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_are_those_that_torch_allocates(plan: str | None, dtype: str) -> None:
    model = load(DEMO, dtype=dtype)[0]
    batch, parsed = random_batch(model.config, 70, model.device), parse_plan(plan)

    def answer(use_cache: bool) -> Any:
        return generate(model, batch, parsed, max_new_tokens=1, use_cache=use_cache).report

    entering = [n for (n,) in answer(True).tokens_entering]
    computed = cost.activation_bytes(entering, model.config, parsed)
    assert allocated(lambda: answer(False)) == pytest.approx(computed, rel=0.03)
    cache = answer(True).cache_bytes
    most = allocated(lambda: answer(True))
    assert most < 1.03 * (computed + cache)
    if plan is None:  # the cache is full at the same time
        assert most == pytest.approx(computed + cache, rel=0.03)


# ---------------------------------------------------------------- measurements


@pytest.mark.parametrize(("values", "spread"), [
    ([3.0], (3.0, 3.0, 3.0, 1)),
    ([5.0, 1.0, 3.0], (3.0, 1.0, 5.0, 3)),
    ([4.0, 1.0, 2.0, 3.0, 100.0], (3.0, 2.0, 4.0, 5)),
])  # fmt: skip
def test_spread(values: Sequence[float], spread: tuple[float, float, float, int]) -> None:
    assert cost.Spread.of(values) == cost.Spread(*spread)


def test_a_timed_plan_chooses_the_same_and_says_how_long(model: Any) -> None:
    batch: Batch = tiny.make_batch(model, "tttIttttt")
    plan, clock = parse_plan("divprune:keep=8+fastv:k=2,keep=5"), cost.Clock()
    plain = generate(model, batch, plan, 3)
    timed = generate(model, batch, cost.with_timed_choices(plan, model, clock), 3)
    assert timed.tokens == plain.tokens
    assert timed.report.kept == plain.report.kept
    assert clock.seconds > 0


@pytest.mark.slow
def test_choosing_takes_less_than_the_time_to_the_first_token(model: Any) -> None:
    batch: Batch = tiny.make_batch(model, "tttIttttt")
    plan, clock = parse_plan("divprune:keep=8+fastv:k=2,keep=5"), cost.Clock()
    report = generate(model, batch, cost.with_timed_choices(plan, model, clock), 3).report
    assert 0 < clock.seconds < report.first_token


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep one peak")
def test_a_peak_of_memory_comes_down_again() -> None:
    assert cost.can_reset_peak()
    size = 2**27
    with cost.peak_memory() as peak:
        before = cost.resident_bytes()
        assert peak() - before < size / 8
        del_me = torch.ones(size // 4)
        assert del_me.sum() > 0
        del del_me
        cost.return_freed_memory()
        assert 0.9 * size < peak() - before < 1.2 * size
    with cost.peak_memory() as peak:
        assert peak() - before < size / 8
