"""cache=all: dropped rows leave the caches of the earlier layers too, after the prompt has run.

A decoder that never removes a row gives the numbers: the prompt's rows see in each layer what they
see under cache=drop, and the rows of new tokens see only what each layer still holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from reference import Reference, layers_of, picture_rows
from tiny import IMAGE, alone, assert_close, make_batch, watching
from torch import Tensor

from minillava import Batch, parse_plan
from minillava.cache import KVCache
from minillava.generate import Result, generate
from minillava.pruning.base import Plan

PROMPTS = ("tttItttttt", "tttt", "tItIttt", "tIItt")


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    return make_batch(model, *PROMPTS)


def run(model: Any, batch: Batch, plan: str, n: int = 4, **options: Any) -> Result:
    return generate(model, batch, parse_plan(plan), n, output_logits=True, **options)


def held_rows(plan: Plan, report: Any, b: int, is_image: Tensor, L: int) -> list[Tensor]:
    """Which of the prompt's rows (T,) each layer's cache holds in the end."""
    compact = [m.name for m in plan.methods if m.compact]
    layers = layers_of(plan, report, b, is_image, L, compact)
    held = [layer.present.clone() for layer in layers]
    for step, kept in zip(plan.steps, report.kept, strict=True):
        if step.method.cache == "all" and is_image.any():
            left = ~is_image
            left[kept.positions[b]] = True
            for layer in range(step.layer):
                held[layer] &= left
    return held


def assert_equals_reference(model: Any, batch: Batch, text: str, n: int = 4) -> Result:
    reference, plan = Reference(model), parse_plan(text)
    result, pictures = run(model, batch, text, n), picture_rows(model, batch)
    report, L = result.report, model.config.text.num_hidden_layers
    compact = [m.name for m in plan.methods if m.compact]
    for b, (ids, mask) in enumerate(zip(batch.ids, batch.mask, strict=True)):
        ids = ids[mask]
        T, is_image = len(ids), ids == IMAGE
        mine, pictures = pictures.split([int(is_image.sum()), len(pictures) - int(is_image.sum())])
        new = torch.tensor(result.tokens[b][:-1], dtype=torch.long)
        x = reference.embed(torch.cat((ids, new)), mine, IMAGE)
        S, layers = len(x), layers_of(plan, report, b, is_image, L, compact)
        held = held_rows(plan, report, b, is_image, L)
        sees = []  # [layer] (S, S)
        for layer, rows in zip(layers, held, strict=True):
            seen = torch.ones(S, S, dtype=torch.bool).tril()
            seen[:T, :T] &= layer.visible
            seen[T:, :T] &= rows & layer.visible
            sees.append(seen)
        positions = []
        for layer, rows in zip(layers, held, strict=True):
            first = int(rows.sum()) if compact else layer.next_position
            positions.append(torch.cat((layer.positions, first + torch.arange(len(new)))))
        traced = reference(x, positions, lambda i, *_, sees=sees: sees[i])
        assert_close(result.logits[b], traced.logits[T - 1 :])
        assert [n[b] for n in report.cache_lengths] == [int(rows.sum()) for rows in held]
        assert [n[b] for n in report.tokens_entering] == [int(i.present.sum()) for i in layers]
        assert report.next_position[b] == int(positions[0][T]) if len(new) else True
    return result


@pytest.mark.parametrize(
    "plan",
    [
        "fastv:layer=2,keep=5,cache=all",
        "vtw:layer=3,cache=all",
        "dart:layer=1,keep=12,cache=all",
        "v2drop:layers=1/2/3,ratios=0.5/0.5/0.0,cache=all",
        "pyramiddrop:layers=1/3,ratios=0.5/0.25,positions=original,cache=all",
        "pyramiddrop:layers=1/3,ratios=0.5/0.25,cache=all",
        "fastv:layer=2,keep=5,positions=compact,cache=all",
        "sparsevlm:version=2,layers=1/2/3,keep=9/6/4,heads=2,cache=all",
        "uniform:keep=9+fastv:layer=2,keep=5,cache=all",
        "fastv:layer=1,keep=9,cache=all+vtw:layer=3",
        "fastv:layer=1,keep=9,mode=mask+v2drop:layers=2,ratios=0.5,cache=all",
        "fastv:layer=2,keep=5,scope=all,cache=all",
    ],
)
def test_new_tokens_see_what_the_caches_still_hold(model: Any, batch: Batch, plan: str) -> None:
    result = assert_equals_reference(model, batch, plan)
    static = run(model, batch, plan.replace(",cache=all", ""))
    assert torch.equal(result.logits[:, 0], static.logits[:, 0])  # the prompt itself is the same
    assert not torch.equal(result.logits[:, 1:], static.logits[:, 1:])
    assert result.report.kept == static.report.kept
    assert result.report.cache_bytes < static.report.cache_bytes


def test_earlier_drops_of_others_leave_too(model: Any, batch: Batch) -> None:
    """After cache=all no earlier layer holds a row that has left the sequence."""
    plan = "fastv:layer=1,keep=9+vtw:layer=3,cache=all"
    report = run(model, batch, plan).report
    text = [prompt.count("t") for prompt in PROMPTS]
    assert report.cache_lengths == [text] * 4


def test_a_batch_gives_what_each_prompt_gives_alone(model: Any, batch: Batch) -> None:
    plan = "fastv:layer=2,keep=5,cache=all"
    together = run(model, batch, plan, n=9)
    for b in range(len(PROMPTS)):
        single = run(model, alone(model, batch, b), plan, n=9)
        assert single.tokens[0] == together.tokens[b]
        assert_close(together.logits[b], single.logits[0])


def test_the_memory_is_given_back(model: Any, batch: Batch, monkeypatch: Any) -> None:
    caches: list[KVCache] = []
    monkeypatch.setattr(KVCache, "cut", noting_cut(caches))
    run(model, batch, "vtw:layer=3,cache=all")
    ((cache, lengths),) = caches
    room = 3  # max_new_tokens - 1
    assert [k.shape[2] for k in cache.keys] == [max(lengths) + room] * 4


def noting_cut(caches: list[Any]) -> Any:
    cut = KVCache.cut

    def noting(self: KVCache, layers: Any, rows: Any) -> None:
        cut(self, layers, rows)
        caches.append((self, [len(r) for r in rows]))

    return noting


def test_without_a_cache_there_is_nothing_to_cut(model: Any, batch: Batch) -> None:
    options = {"use_cache": False}
    cut = run(model, batch, "fastv:layer=2,keep=5,cache=all", **options)
    assert torch.equal(cut.logits, run(model, batch, "fastv:layer=2,keep=5", **options).logits)
    assert cut.report.cache_lengths == [[0] * 4] * 4


def test_mustdrop_cuts_from_the_layer_before_its_first_stage(wide_model: Any) -> None:
    batch = make_batch(wide_model, "tttItttttt")
    plan = "mustdrop:merge=1.0,layers=2/3,global=0.028,individual=1.0"
    released, dropped, every = (
        run(wide_model, batch, plan + more).report for more in ("", ",cache=drop", ",cache=all")
    )
    whole, _, _, final = [n for (n,) in dropped.cache_lengths]
    assert released.tokens_entering == dropped.tokens_entering == every.tokens_entering
    assert whole > final
    assert released.cache_lengths == [[whole], [final], [final], [final]]
    assert every.cache_lengths == [[final]] * 4
    assert released.next_position == dropped.next_position == [whole]
    assert every.next_position == [final]


def test_the_pretended_device_waits_no_longer(tmp_path: Any) -> None:
    """Nothing is read from the device to know which rows leave."""
    from pretended_device import pretended_cuda

    from minillava import load

    tiny.write_hf(tmp_path)
    waits = []
    with pretended_cuda():
        model = load(tmp_path, device="cuda")[0]
    batch = make_batch(model, "tItIttt", "tItt")
    for more in ("", ",cache=all"):
        with pretended_cuda() as counts:
            generate(model, batch, parse_plan(f"fastv:layer=2,keep=4{more}"), 3)
        waits.append(counts.totals[0])
    assert waits[0] == waits[1]


def test_outputs_of_the_prompt_are_untouched(model: Any, batch: Batch) -> None:
    rows = []
    for more in ("", ",cache=all"):
        with watching(*model.llama.blocks) as outputs:
            run(model, batch, f"fastv:layer=2,keep=5{more}", n=1)
        rows.append([calls[0] for calls in outputs])
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
