"""eval.rivals: what is computed from the measured seconds, and every peer at a tiny shape.

OpenVINO and llama.cpp are not needed: their tests are skipped where they are not installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from eval import rivals
from eval.peers import llama_cpp
from eval.peers.base import Times, scale
from eval.peers.llama_cpp import LlamaCpp
from eval.peers.openvino import OpenVino, _Graph
from eval.peers.ours import Ours, make_ours
from eval.peers.transformers import Transformers
from eval.plans import read_plans
from eval.rivals import format_table, main, take_turns, with_towers
from minillava.config import Config, TextConfig, VisionConfig

TINY = Config(
    VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ),
    TextConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=320,
    ),
    image_token_id=318,
)


def test_seconds_of_all_layers() -> None:
    """A layer's time times 16, the output head's once."""
    assert scale(2.1, head=0.1, layers=2) == pytest.approx(32.1)


class Recorded:
    """A stub: a model whose times are given and not measured."""

    packages, forms = ("eval",), {"stub": 1.0}

    def __init__(self, name: str, order: list[str], *times: Times) -> None:
        self.name, self.order, self.times = name, order, list(times)

    def measure(self) -> Times:
        self.order.append(self.name)
        return self.times.pop(0)


def test_models_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    a = [Times(1.0, p, p / 10) for p in (99.0, 1.0, 5.0, 2.0)]
    b = [Times(None, 3.0, 0.3)] * 4
    found = take_turns([Recorded("a", order, *a), Recorded("b", order, *b)], 3)
    assert order == ["a", "b", "b", "a"] * 2
    assert found == {"a": Times(1.0, 2.0, 0.2), "b": Times(None, 3.0, 0.3)}


FOUND = {
    "transformers bfloat16": Times(2.0, 18.0, 1.0),
    "transformers float32": Times(1.0, 39.0, 2.0),
    "openvino u4": Times(None, 15.0, 0.25),
    "minillava int8-dynamic": Times(2.0, 10.0, 0.3),
    "minillava int8-dynamic, fastv:k=2,r=0.75": Times(2.0, 4.2, 0.2, layers_alone=4.0),
}


def test_a_peer_without_a_tower_gets_the_fastest_of_transformers() -> None:
    assert with_towers(FOUND)["openvino u4"].vision == 1.0
    assert with_towers(FOUND)["transformers bfloat16"].vision == 2.0
    alone = {"openvino u4": FOUND["openvino u4"]}
    assert with_towers(alone) == alone


def test_ratios_of_the_table() -> None:
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in format_table(FOUND).split("\n")]
    by = {row[0]: row[1:] for row in rows}
    assert by["openvino u4"] == ["1.00*", "15.00", "16.00", "0.80", "1.00", "250", "1.00", ""]
    ours = by["minillava int8-dynamic"]
    assert ours == ["2.00", "10.00", "12.00", "0.60", "0.75", "300", "1.20", ""]
    assert by["minillava int8-dynamic, fastv:k=2,r=0.75"][-1] == "1.05"


def test_a_table_without_transformers_has_no_first_token_of_peers() -> None:
    found = {name: t for name, t in FOUND.items() if not name.startswith("transformers")}
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in format_table(found).split("\n")]
    by = {row[0]: row[1:] for row in rows}
    assert by["openvino u4"] == ["", "15.00", "", "", "", "250", "1.00", ""]
    assert by["minillava int8-dynamic"][2:5] == ["12.00", "", ""]


def check_times(times: Times, tower: bool) -> None:
    """Noise can make a scaled time of microseconds negative, but not a number or none."""
    assert (times.vision is not None) == tower
    assert math.isfinite(times.prefill)
    assert math.isfinite(times.per_token)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_transformers_is_measured(form: str) -> None:
    check_times(Transformers(form, TINY, 40).measure(), tower=True)


@pytest.mark.parametrize("form", OpenVino.forms)
def test_openvino_is_measured(form: str) -> None:
    pytest.importorskip("openvino")
    peer = OpenVino(form, TINY, 40)
    peer.decoder.reset_state()
    whole = peer._run(peer.ids, 0).copy()
    peer.decoder.reset_state()
    peer._run(peer.ids[:, :-1], 0)
    last = peer._run(peer.ids[:, -1:], 39)  # the keys and values of the others were kept
    assert abs(whole - last).max() < 0.05 * abs(whole).max()
    check_times(peer.measure(), tower=False)


@pytest.mark.parametrize("form", OpenVino.forms)
def test_openvino_multiplies_by_every_weight(form: str) -> None:
    """By equal weights it would multiply once for all: four times a layer instead of seven."""
    openvino = pytest.importorskip("openvino")
    graph = _Graph(form, TINY.text).decoder()
    compiled = openvino.Core().compile_model(graph, "CPU")
    kinds = [
        getattr(info := op.get_rt_info()["layerType"], "value", info)
        for op in compiled.get_runtime_model().get_ops()
    ]
    assert kinds.count("FullyConnected") == 7 * TINY.text.num_hidden_layers + 1


@pytest.mark.parametrize("form", LlamaCpp.forms)
def test_llama_cpp_is_measured(form: str) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    check_times(LlamaCpp(form, TINY, 40).measure(), tower=False)


def test_llama_cpps_last_layer_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that are given: 1.5 of the last layer and the head, 2 of every other layer."""

    class Given:
        def __init__(self, form: str, config: TextConfig, tokens: int) -> None:
            self.layers = config.num_hidden_layers

        def measure(self) -> tuple[float, float]:
            prefill = 1.5 + 2.0 * (self.layers - 1)
            return prefill, prefill / 10

    monkeypatch.setattr(llama_cpp, "_Decoder", Given)
    times = LlamaCpp("q4_0", TINY, 40).measure()
    assert times.prefill == pytest.approx(1.5 + 31 * 2.0)
    assert times.per_token == pytest.approx(0.15 + 31 * 0.2)
    assert [c.text.num_hidden_layers for c in LlamaCpp.shapes(TINY)] == [1, 3]


def test_ours_is_measured_with_the_layers_before_the_last_step() -> None:
    plans = read_plans(["none", "fastv:k=2,r=0.75", "divprune:keep=4"])
    models = make_ours("float32", TINY, 40, plans)
    assert [m.name for m in models] == [
        "minillava float32",
        "minillava float32, fastv:k=2,r=0.75",
        "minillava float32, divprune:keep=4",
    ]
    assert len({id(m.model) for m in models}) == 1
    assert models[0].model.config.text.num_hidden_layers == 4
    unpruned, *pruned = [m.measure() for m in models]
    check_times(unpruned, tower=True)
    assert unpruned.layers_alone is None
    for times in pruned:
        check_times(times, tower=True)
        assert times.layers_alone is not None
        assert times.layers_alone > 0


def test_a_pruned_prefill_counts_the_layers_before_the_step_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seconds that are given: 2 layers of 5 s, then layers of 1 s, of which 2 of 30 are run.

    The prefill takes 10 % longer than its layers, and the output head a quarter of a second.
    """
    plan = read_plans(["fastv:k=2,r=0.75"])
    (ours,) = make_ours("float32", TINY, 40, plan)
    alone: list[Sequence[int]] = []

    def layers_alone(model: object, entering: Sequence[int]) -> float:
        alone.append(entering)
        return sum(5.0 if n == 40 else 1.0 for n in entering if n)

    def generate(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        report = replace(
            result.report, prefill=0.25 + 1.1 * (2 * 5 + 2 * 1), per_token=0.25 + 4 * 0.5
        )
        return replace(result, report=report)

    from eval.peers import ours as module

    real = module.generate
    monkeypatch.setattr(module, "layers_alone", layers_alone)
    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(Ours, "_head_seconds", lambda self: 0.25)
    times = ours.measure()
    kept = 40 - 16 + 4
    assert alone == [[40, 40, 0, 0], [0, 0, kept, kept]]
    assert times.layers_alone == 2 * 5 + 30 * 1
    assert times.prefill == pytest.approx(0.25 + 1.1 * (2 * 5 + 30 * 1))
    assert times.per_token == pytest.approx(0.25 + 32 * 0.5)


def test_a_peer_that_is_not_installed_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(Recorded):
        packages = ("no_such_package", "eval")

    monkeypatch.setattr(rivals, "SHAPES", {"7b": TINY})
    monkeypatch.setitem(rivals.PEERS, "openvino-u4", (Missing, "stub"))
    argv = ["--tokens", "40", "--repeats", "1", "--ours", "float32", "--prune"]
    assert main([*argv, "--peers", "openvino-u4", "transformers-float32"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(
        "note: openvino-u4 is left out, because no_such_package is not installed; "
        "pip install 'minillava[rivals]'\n"
    )
    assert "openvino" not in out
    assert out.startswith("CPU: ")
    assert [line.split("|")[1].strip() for line in out.splitlines()[4:6]] == [
        "transformers float32",
        "minillava float32",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tokens", "576"], "more than the image's 576"),
        (["--peers", "--ours"], "nothing is left to measure"),
        (["--prune", "pyramiddrop"], "prunes at layer 24"),
        (["--prune", "fastv:k=40,r=0.5"], "layer"),
        (["--layers", "25"], "at most 24"),
        (["--layers", "24", "--ours", *rivals.FORMS], "GB of memory together"),
        (["--peers", "openvino-u3"], "openvino-u3"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_model_is_made(
    options: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rivals, "make_ours", None)
    monkeypatch.setattr(rivals, "available_memory", lambda: 24e9)
    quick = [] if "--peers" in options else ["--peers"]
    assert main([*quick, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error


def test_every_peer_has_a_name_of_its_own() -> None:
    assert {"transformers-bfloat16", "llama.cpp-q4_0", "openvino-u4"} <= {*rivals.default_peers()}
