"""Decoding in compiled code and from CUDA graphs gives the same tokens, and is prepared once.

Dynamo makes the graphs; the backend of most tests runs them as they are, so no compiler is needed.
CUDA graphs are recorded and repeated on the pretended device.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pretended_device import pretended_cuda
from torch._dynamo.backends.registry import lookup_backend

from minillava import Batch, load, parse_plan
from minillava.cache import KVCache
from minillava.engine import State, decode, hidden_states_read, prefill
from minillava.generate import Answer, Result, generate
from minillava.loading import compiled
from minillava.loading.compiled import CompiledDecode
from minillava.pruning import METHODS
from minillava.pruning.base import Plan
from minillava.request import Settings, prompts_of

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
older = pytest.mark.skipif(VERSION < (2, 14), reason="older versions of Dynamo were not tried")
Graphs = list[torch.fx.GraphModule]
MASK_AND_CUT = "random:keep=8,mode=mask+fastv:layer=2,keep=3,cache=all"


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """What Dynamo makes in a test, see run_as_it_is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield []
    torch._dynamo.reset()


def run_as_it_is(graphs: Graphs) -> Any:
    """A backend of torch.compile that notes each graph, and runs it."""

    def run(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    return run


def prefilled(model: Any, plan_text: str, prompts: tuple[str, ...]) -> tuple[torch.Tensor, State]:
    batch, plan = tiny.make_batch(model, *prompts), parse_plan(plan_text)
    encoded = model.encode(batch.pixels, hidden_states_read(model, plan))
    cache = KVCache(model.config.text, 8, model.dtype, model.device)
    return prefill(model, prompts_of(model, batch), encoded, plan, cache)


# ---------------------------------------------------------------- a whole token


@older
@pytest.mark.parametrize(
    ("plan", "prompts"),
    [
        ("", ("ttItttt",)),
        ("fastv:layer=2,r=0.5", ("ttItttt", "tt", "tItIt")),
        ("pyramiddrop:layers=1/3,ratios=0.5/0.25", ("ttIItttt", "tIt")),
    ],
)
def test_one_token_is_one_graph(
    model: Any, graphs: Graphs, plan: str, prompts: tuple[str, ...]
) -> None:
    """The graph of the second token serves all later ones: the numbers of cached rows are symbols
    in it."""
    whole = torch.compile(decode, fullgraph=True, backend=run_as_it_is(graphs))
    with torch.inference_mode():
        logits, plain = prefilled(model, plan, prompts)
        _, state = prefilled(model, plan, prompts)
        for _ in range(5):
            token = logits.argmax(-1)
            logits = decode(model, token, plain)
            assert torch.equal(whole(model, token, state), logits)
    assert state.cache.lengths == plain.cache.lengths
    assert torch.equal(state.position, plain.position)
    assert len(graphs) == 2


# ---------------------------------------------------------------- CPU: compiled layers


def traced(graphs: Graphs) -> Any:
    """The same after AOTAutograd, which a compiler's backend begins with: what it assumes about
    numbers of rows is checked at each call too."""

    def run(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    return run


@pytest.fixture
def prepared(model: Any, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with compiled layers."""
    layers = CompiledDecode(traced(graphs))
    layers.prepare(model)
    assert len(graphs) == 1
    monkeypatch.setattr(model, "compiled", layers)
    return model


def both(model: Any, batch: Batch, plan: Plan, n: int = 4) -> Result:
    """Compiled and not: the logits are the same bit for bit, since the same operators run."""
    found = generate(model, batch, plan, n, output_logits=True)
    layers, model.compiled = model.compiled, None
    expected = generate(model, batch, plan, n, output_logits=True)
    model.compiled = layers
    assert found.tokens == expected.tokens
    torch.testing.assert_close(found.logits, expected.logits, equal_nan=True, atol=0, rtol=0)
    return found


@older
def test_two_graphs_serve_every_method_that_drops(prepared: Any, graphs: Graphs) -> None:
    """All layers and plans: one for a prompt alone, one for a batch."""
    one = tiny.make_batch(prepared, "ttItttt")
    several = tiny.make_batch(prepared, "tIItt", "tt", "tItt")
    names = METHODS.keys() - tiny.GRIDS.keys()
    for plan in (Plan(), *map(tiny.example, sorted(names))):
        for batch in (one, several):
            both(prepared, batch, plan, 3)
    assert len(graphs) == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@older
def test_a_long_answer_compiles_nothing_more(prepared: Any, graphs: Graphs) -> None:
    """To the last row that the cache has room for, and in longer conversations after it."""
    for n, prompt in ((70, "ttItttt"), (33, "t" * 90), (2, "tt")):
        found = both(prepared, tiny.make_batch(prepared, prompt), parse_plan(""), n)
        assert found.report.stopped == ["length"]
    assert len(graphs) == 1


@older
def test_masks_that_stand_are_compiled_and_others_are_not(prepared: Any, graphs: Graphs) -> None:
    batch = tiny.make_batch(prepared, "ttItttt")
    both(prepared, batch, parse_plan("simignore:keep=8,mode=mask,until=2"))
    both(prepared, batch, parse_plan(MASK_AND_CUT))
    assert len(graphs) == 2
    again = parse_plan("fastv:layer=2,keep=4,mode=mask")
    assert compiled.asks_again(again, prepared)
    both(prepared, batch, again)
    assert len(graphs) == 2


@older
def test_the_state_goes_on_as_after_decode(prepared: Any) -> None:
    plan, prompts = "fastv:layer=2,r=0.5", ("ttItttt", "tt")
    with torch.inference_mode():
        logits, state = prefilled(prepared, plan, prompts)
        _, plain = prefilled(prepared, plan, prompts)
        for run, s in ((prepared.compiled, state), (decode, plain)):
            for _ in range(3):
                run(prepared, logits.argmax(-1), s)
    assert state.cache.lengths == plain.cache.lengths
    assert torch.equal(state.position, plain.position)
    assert torch.equal(state.length, plain.length)
    assert [s.generated for s in state.samples] == [s.generated for s in plain.samples] == [3, 3]


# ---------------------------------------------------------------- CPU: load(compile=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory, vision_layers=4, width=64)


def fail(graph: Any, _: Any) -> Any:
    raise RuntimeError("C++ compile error\n\nCommand:\ng++ ...")


@older
def test_a_compiler_that_fails_is_one_line(model: Any, graphs: Graphs) -> None:
    with pytest.raises(ValueError, match=r"torch.compile failed .*C\+\+ compile error") as caught:
        CompiledDecode(fail).prepare(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "weights stored in int8 are multiplied here by kernels"),
        ({"quantize": "int4", "dtype": "float16"}, "weights stored in int4 and int8"),
        ({"dtype": "float16"}, "weights stored in float16"),
        ({}, "needs the C.. compiler no-such-compiler"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("minillava.loading.checkpoint.load_weights", None)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, compile=True, **options)
    assert "\n" not in str(caught.value)


@older
@pytest.mark.slow
def test_inductors_code_gives_the_tokens(folder: Path, graphs: Graphs) -> None:
    """With a C++ compiler; the code that load() made serves a prompt alone."""
    plain, prepared = load(folder)[0], load(folder, compile=True)[0]
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1
    for prompts in (("ttItttt",), ("tIItt", "tt")):
        for text in ("", "fastv:layer=2,r=0.5", "simignore:keep=8,mode=mask"):
            batch = tiny.make_batch(plain, *prompts)
            found, expected = (
                generate(m, batch, parse_plan(text), 12, output_logits=True)
                for m in (prepared, plain)
            )
            assert found.tokens == expected.tokens
            tiny.assert_close(found.logits, expected.logits)
    assert stats["unique_graphs"] == 3  # a mask over one prompt; a batch of unequal lengths


# ---------------------------------------------------------------- CUDA graphs

BATCHES = {"one": ("ttItttt",), "ragged": ("tIItt", "tt", "tItt"), "equal": ("tItt", "Ittt")}


@pytest.fixture(scope="module")
def here(folder: Path) -> Any:
    return load(folder)[0]


@pytest.fixture(scope="module")
def there(folder: Path) -> Any:
    """The same model on the pretended device, with CUDA graphs."""
    with pretended_cuda():
        return load(folder, device="cuda", compile=True)[0]


def assert_tokens(here: Any, there: Any, batch: Batch, plan: Plan, n: int = 4) -> None:
    expected = generate(here, batch, plan, n, output_logits=True)
    with pretended_cuda():
        found = generate(there, batch, plan, n, output_logits=True)
    assert found.tokens == expected.tokens
    for b, tokens in enumerate(found.tokens):
        logits = found.logits.values[b, : len(tokens)]
        tiny.assert_close(logits, expected.logits[b, : len(tokens)])


@pytest.mark.parametrize("name", sorted(METHODS.keys() - tiny.GRIDS.keys()))
def test_graphs_give_the_tokens_of_every_method(here: Any, there: Any, name: str) -> None:
    assert_tokens(here, there, tiny.make_batch(here, *BATCHES["ragged"]), tiny.example(name))


@pytest.mark.parametrize("kind", BATCHES)
def test_graphs_serve_to_the_last_row_of_the_cache(
    here: Any, there: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the memory of the cache held before."""
    reserve = KVCache.reserve

    def reserve_nan(cache: KVCache, layers: range, lengths: list[int]) -> None:
        reserve(cache, layers, lengths)
        for layer in layers:
            cache.keys[layer].fill_(torch.nan)
            cache.values[layer].fill_(torch.nan)

    monkeypatch.setattr(KVCache, "reserve", reserve_nan)
    batch = tiny.make_batch(here, *BATCHES[kind])
    for text in ("", "fastv:layer=2,r=0.5", "simignore:keep=8,mode=mask,until=2", MASK_AND_CUT):
        assert_tokens(here, there, batch, parse_plan(text), 20)


def test_a_token_from_a_graph_is_a_few_starts_and_one_wait(there: Any) -> None:
    """Recording, at the second call of decode, waits for nothing either."""
    batch = tiny.make_batch(there, *BATCHES["ragged"])
    for text in ("", "pyramiddrop:layers=1/3,ratios=0.5/0.25", "simignore:keep=8,mode=mask"):
        totals = []
        with pretended_cuda() as counts:
            for _ in Answer(there, batch, parse_plan(text), Settings(6), None):
                totals.append((*counts.totals, counts.starts))
        each = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(totals)]
        waits, copies, starts = zip(*each, strict=True)
        assert waits == (1,) * 5
        assert copies[1:] == (0,) * 4
        assert starts[0] > 200
        assert max(starts[1:]) < 20


def test_a_plan_that_chooses_again_uses_no_graph(here: Any, there: Any) -> None:
    batch = tiny.make_batch(here, *BATCHES["ragged"])
    plan = parse_plan("fastv:layer=2,keep=4,mode=mask")
    assert_tokens(here, there, batch, plan)
    with pretended_cuda() as counts:
        totals = [counts.starts for _ in Answer(there, batch, plan, Settings(4), None)]
    assert totals[-1] - totals[-2] > 200
