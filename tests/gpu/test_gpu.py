"""On a real CUDA device: the numbers of the CPU, half precision, stored forms, memory, no waits.

Skipped where there is none. `pytest tests/gpu --pretended-cuda` runs these tests on a pretended
device, which shows that they run, and nothing about kernels, numbers and memory of a GPU.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pretended_device import Counts, pretended_cuda

from minillava import Batch, load, parse_plan
from minillava.cache import KVCache
from minillava.engine import decode, hidden_states_read, prefill
from minillava.generate import Answer, generate
from minillava.pruning.base import Plan
from minillava.quant.linear import weight_bytes
from minillava.request import Settings, prompts_of

PLANS = (
    "",
    "fastv:layer=2,r=0.5",
    "fastv:layer=2,r=0.5,mode=mask",
    "simignore:keep=5,mode=mask,until=2",
    "pyramiddrop:layers=1/2/3,ratios=0.5/0.25/0.125",
    "sparsevlm:layers=1/2/3,keep=8/5/3",
    "dart:layer=2,keep=8",
    "visionzip:dominant=6,contextual=3",
    "divprune:keep=5",
    "tome:keep=8",
    "holov:keep=8",
    "vscan:keep=8,layer=2,final=3",
)
PROMPTS = ("tttItttttt", "tttt", "tItIttt", "tIItt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory, width=64, vision_layers=4)


@pytest.fixture(scope="module")
def here(folder: Path) -> Any:
    return load(folder)[0]


@pytest.fixture(scope="module")
def batch(here: Any) -> Batch:
    return tiny.make_batch(here, *PROMPTS)


@pytest.fixture(autouse=True)
def counts(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Counts | None]:
    """None on a real device; what a pretended one counts."""
    if torch.cuda.is_available():
        # cuDNN multiplies float32 in TF32, with 10 bits of 23, unless it is told not to
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield None
    elif request.config.getoption("--pretended-cuda"):
        with pretended_cuda() as counted:
            yield counted
    else:
        pytest.skip("no CUDA device")


@contextmanager
def never_waiting(counts: Counts | None) -> Iterator[None]:
    """Fails if the host waits for the device, or copies to it in a way that waits."""
    if counts is not None:
        before, _ = counts.totals
        yield
        assert counts.totals[0] == before, counts.waits
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan", PLANS)
def test_logits_are_those_of_the_cpu(folder: Path, here: Any, batch: Batch, plan: str) -> None:
    """Prefill and decode, with and without a cache."""
    there = load(folder, device="cuda", dtype="float32")[0]
    for use_cache in (True, False):
        options = {"output_logits": True, "use_cache": use_cache}
        expected = generate(here, batch, parse_plan(plan), 4, **options)
        found = generate(there, batch, parse_plan(plan), 4, **options)
        assert found.tokens == expected.tokens
        assert tiny.rows_kept(found.report) == tiny.rows_kept(expected.report)
        tiny.assert_close(found.logits.cpu(), expected.logits)


def test_random_choices_are_those_of_the_cpu(folder: Path, here: Any, batch: Batch) -> None:
    there = load(folder, device="cuda", dtype="float32")[0]
    found, expected = (generate(m, batch, parse_plan("random:keep=5"), 2) for m in (there, here))
    assert found.report.kept == expected.report.kept


def test_sampling_is_repeatable_and_alone(folder: Path, batch: Batch) -> None:
    there = load(folder, device="cuda", dtype="float32")[0]
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    first, again = (generate(there, batch, max_new_tokens=8, **options) for _ in range(2))
    assert first.tokens == again.tokens
    single = generate(there, tiny.alone(there, batch, 0), max_new_tokens=8, **options)
    assert single.tokens[0] == first.tokens[0]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_runs(folder: Path, batch: Batch, plan: str, dtype: str) -> None:
    there = load(folder, device="cuda", dtype=dtype)[0]
    assert there.dtype == getattr(torch, dtype)
    result = generate(there, batch, parse_plan(plan), 4, output_logits=True)
    assert [len(tokens) for tokens in result.tokens] == [4] * len(PROMPTS)
    assert result.logits.isfinite().all().item()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_stored_forms(
    folder: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Against the CPU without its kernels, which round activations too."""
    there = load(folder, device="cuda", quantize=form, dtype="float32")[0]
    monkeypatch.setattr("minillava.quant.linear.kernel_works", lambda kind: False)
    here = load(folder, quantize=form, dtype="float32")[0]
    plan = parse_plan("fastv:layer=2,r=0.5")
    found, expected = (generate(m, batch, plan, 3, output_logits=True) for m in (there, here))
    assert found.tokens == expected.tokens
    tiny.assert_close(found.logits.cpu(), expected.logits)


@pytest.mark.parametrize("plan", [*PLANS[:2], *PLANS[4:]])
def test_decoding_never_waits(folder: Path, batch: Batch, counts: Counts | None, plan: str) -> None:
    """Three tokens of plans that drop, without a look at any of them."""
    there, parsed = load(folder, device="cuda")[0], parse_plan(plan)
    with torch.inference_mode():
        encoded = there.encode(batch.pixels, hidden_states_read(there, parsed))
        cache = KVCache(there.config.text, 4, there.dtype, there.device)
        logits, state = prefill(there, prompts_of(there, batch), encoded, parsed, cache)
        decode(there, logits.argmax(-1), state)  # a library's first call may wait
        with never_waiting(counts):
            for _ in range(2):
                logits = decode(there, logits.argmax(-1), state)
        assert logits.isfinite().all().item()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_token_is_one_wait(
    folder: Path, batch: Batch, counts: Counts | None, options: dict[str, Any]
) -> None:
    there = load(folder, device="cuda")[0]
    answer = Answer(there, batch, Plan(), Settings(5, **options), None)
    waits = []
    if counts is not None:
        waits = [counts.totals[0] for _ in answer]
        waits = [b - a for a, b in itertools.pairwise(waits)]
    else:
        tokens = iter(answer)
        next(tokens), next(tokens)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(3):
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    next(tokens)
                waits.append(sum("synchronizing CUDA operation" in str(w.message) for w in seen))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits
    assert set(waits) == {1}


@pytest.mark.parametrize("plan", PLANS)
def test_cuda_graphs_give_the_same_tokens(folder: Path, here: Any, batch: Batch, plan: str) -> None:
    there = load(folder, device="cuda", dtype="float32", compile=True)[0]
    for prompts in (batch, tiny.make_batch(here, PROMPTS[0])):
        expected = generate(here, prompts, parse_plan(plan), 8, output_logits=True)
        for _ in range(2):  # a graph is recorded in each generation
            found = generate(there, prompts, parse_plan(plan), 8, output_logits=True)
            assert found.tokens == expected.tokens
            tiny.assert_close(found.logits.cpu(), expected.logits)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_cuda_graphs_of_stored_forms(folder: Path, batch: Batch, form: str) -> None:
    models = [load(folder, device="cuda", quantize=form, compile=c)[0] for c in (False, True)]
    expected, found = (generate(m, batch, max_new_tokens=8, output_logits=True) for m in models)
    assert found.tokens == expected.tokens
    tiny.assert_close(found.logits.float().cpu(), expected.logits.float().cpu(), 2e-2)


def test_memory_of_the_report(folder: Path, here: Any, counts: Counts | None) -> None:
    there = load(folder, device="cuda", dtype="float32")[0]
    batch = tiny.make_batch(here, "tt" + "I" * 8 + "tt")
    reports = [generate(there, batch, parse_plan(p), 2).report for p in ("", "uniform:keep=1")]
    for report, plan in zip(reports, ("", "uniform:keep=1"), strict=True):
        assert report.cache_bytes == generate(here, batch, parse_plan(plan), 2).report.cache_bytes
    assert reports[1].cache_bytes < reports[0].cache_bytes / 4
    peaks = [report.peak_bytes for report in reports]
    if counts is None:
        assert min(peaks) > weight_bytes(there) + reports[0].cache_bytes // 4
        assert peaks[0] > reports[0].cache_bytes
    else:
        assert peaks == [0, 0]
