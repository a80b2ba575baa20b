"""eval.latency on the demo: what it prints is what happened, and what does not pay is said so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import user_method
from tiny import refusal

from eval import cost, latency
from eval.latency import DEMO, Limits, main
from eval.plans import read_plans
from minillava import load
from minillava.quant.linear import weight_bytes

TEXT, PATCHES, LAYERS = 20, 144, 12
WORDS = f"--repeats 2 --new-tokens 2 --text-tokens {TEXT} --prune fastv:k=2,keep=9".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "memory_bandwidth", lambda device: 1e10)


@pytest.fixture(scope="module")
def found() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "memory_bandwidth", lambda device: 1e10)
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text, file=None, **_: file or lines.append(text))
        assert main([*WORDS, "--form", "float32", "int8", "--json"]) == 0
    return json.loads(lines[0])


def test_one_row_for_each_form_and_plan(found: Any) -> None:
    plans = ["none", "fastv:k=2,keep=9"]
    assert [(row["form"], row["plan"]) for row in found["rows"]] == [
        (form, plan) for form in ("float32", "int8") for plan in plans
    ]
    assert found["limits"]["gemm"].keys() == {"float32", "int8"}
    assert "2 threads" in found["machine"] or "1 threads" in found["machine"]


def test_counts_are_exact(found: Any) -> None:
    config = load(DEMO)[0].config
    assert (config.vision.num_patches, config.text.num_hidden_layers) == (PATCHES, LAYERS)
    whole, pruned = [TEXT + PATCHES] * LAYERS, [TEXT + PATCHES] * 2 + [TEXT + 9] * (LAYERS - 2)
    for row, entering in zip(found["rows"], [whole, pruned] * 2, strict=True):
        assert row["tokens_entering"] == entering
        assert row["flops"] == cost.decoder_flops(entering, config.text)
        assert row["fastv_share"] == cost.fastv_share(entering, whole[0], config.text)
        ideal = cost.decoder_flops(whole, config.text) / row["flops"]
        assert row["ideal_speedup"] == pytest.approx(ideal)
        assert row["cache_bytes"] == cost.cache_bytes(entering, config.text)
    plain = found["rows"][0]
    assert plain["ideal_speedup"] == plain["speedup"] == plain["fastv_share"] == 1
    assert plain["pays"]
    assert plain["choosing"] == 0 < found["rows"][1]["choosing"]
    assert found["rows"][2]["weight_bytes"] == weight_bytes(load(DEMO, quantize="int8")[0])
    assert found["rows"][2]["weight_bytes"] < plain["weight_bytes"]


def test_batches_are_compared_with_the_unpruned_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--batch", "1", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["batch"] for row in rows] == [1, 1, 3, 3]
    for one, three in zip(rows[:2], rows[2:], strict=True):
        assert three["tokens_entering"] == one["tokens_entering"]
        assert three["cache_bytes"] == 3 * one["cache_bytes"]
    for row in rows:  # two new tokens: the first, and one more
        assert row["requests_per_second"]["n"] == 2
        low = row["batch"] / (row["first_token"]["high"] + row["per_token"]["high"])
        high = row["batch"] / (row["first_token"]["low"] + row["per_token"]["low"])
        assert low <= row["requests_per_second"]["median"] <= high


def test_caches_of_a_batch_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "available_memory", lambda: 12e9)
    assert main(["--shape", "7b", "--form", "int4", "--batch", "1", "16"]) == 2
    assert "10.5 GB of it for caches" in capsys.readouterr().err


@pytest.mark.slow
def test_times_belong_together(found: Any) -> None:
    for row in found["rows"]:
        assert {row[n]["n"] for n in ("vision", "prefill", "first_token", "per_token")} == {2}
        assert row["first_token"]["low"] >= row["prefill"]["low"] > 0
        assert row["choosing"] < row["prefill"]["high"]
        assert row["layers_alone"] > 0
        assert row["peak_bytes"] > row["weight_bytes"]


def test_a_table_is_printed_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(WORDS) == 0
    first, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "memory reads 10.0 GB/s" in first
    assert head.startswith("| form | plan | batch | vision s |")
    assert [row.split(" | ")[1] for row in rows] == ["`none`", "`fastv:k=2,keep=9`"]
    assert "2 x 164, 10 x 29" in rows[1]


def test_a_users_method_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, mark = user_method.write_mark(tmp_path)
    words = ["--repeats", "1", "--new-tokens", "2", "--text-tokens", str(TEXT)]
    assert main([*words, "--prune", f"{method}:layer=4,keep=9", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][1]
    assert row["plan"] == f"{method}:layer=4,keep=9"
    assert row["tokens_entering"] == [TEXT + PATCHES] * 4 + [TEXT + 9] * 8
    assert row["choosing"] > 0
    assert mark.read_text() == "run "


@pytest.mark.parametrize(("speedup", "warned"), [(0.8, True), (1.2, False)])
def test_a_plan_that_does_not_pay_is_said_so(
    speedup: float, warned: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = load(DEMO)[0]
    runs = {
        "none": latency.Measured(vision=[1.0], prefill=[1.0], first_token=[2.0], per_token=[0.1]),
        "random:keep=9": latency.Measured(
            vision=[1.0], prefill=[1 / speedup], first_token=[2.0], per_token=[0.1]
        ),
    }
    rows = []
    for text, m in runs.items():
        m.entering = [TEXT + PATCHES] * LAYERS
        rows.append(latency._row(model, "float32", text, m, runs["none"], 1e10))
    monkeypatch.setattr(latency, "run", lambda args: (rows, Limits(1e10, {})))
    assert main([]) == 0
    err = capsys.readouterr().err
    line = "warning: random:keep=9 does not pay off here: its prefill takes 1.25 times as long"
    assert err.startswith(line) if warned else err == ""
    assert rows[1].speedup == pytest.approx(speedup)


def test_what_a_token_reads_is_held_against_the_memory(found: Any) -> None:
    llama = load(DEMO)[0].llama
    tied = llama.config.tie_word_embeddings
    weights = {p.data_ptr(): p.nbytes for p in llama.parameters()}
    read = sum(weights.values()) - (0 if tied else llama.embed_tokens.weight.nbytes)
    for row in found["rows"][:2]:  # float32
        share = (read + row["cache_bytes"]) / row["per_token"]["median"] / 1e10
        assert row["bandwidth_share"] == pytest.approx(share)


def test_random_weights_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    """One layer of the decoder is some gigabytes smaller, but the tower is whole."""
    model = latency.random_model(load(DEMO)[0].config, "int4", latency.find_device("cpu"))
    assert all(not t.is_meta for t in model.state_dict().values())
    batch = latency.random_batch(model.config, TEXT, model.device)
    (row,) = latency.measure(model, "int4", read_plans(["none"]), batch, 1, 1, 1e10)
    assert row.tokens_entering == [TEXT + PATCHES] * LAYERS


def test_a_shape_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "available_memory", lambda: 4.3e9)
    assert main(["--shape", "7b", "--form", "int4"]) == 2
    err = capsys.readouterr().err
    assert "--form int4 needs 8.0 GB" in err
    assert "0.7 GB of it for caches" in err
    assert "and 4.3 GB are free" in err


def test_memory_that_only_caches_files_is_free(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 100 kB\nMemFree: 10 kB\nMemAvailable:   70 kB\nHugePages_Total: 0\n")
    assert latency.available_memory(path) == 70 * 1024
    assert latency.available_memory(tmp_path / "missing") == math.inf


@pytest.mark.parametrize(("shape", "most"), [([], 1904), (["--shape", "7b"], 3520)])
def test_a_prompt_beyond_the_positions_is_refused_before_loading(
    shape: list[str], most: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(latency, "available_memory", lambda: 1e12)
    monkeypatch.setattr(latency, "_model", None)
    assert main([*shape, "--text-tokens", str(most + 1)]) == 2
    assert f"--text-tokens {most + 1} and the image's" in (line := refusal(capsys))
    assert f"give at most {most}" in line
    with pytest.raises(TypeError):  # where the model would be loaded
        main([*shape, "--text-tokens", str(most)])


def test_a_plan_that_a_checkpoint_cannot_run_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "_model", None)
    assert main(["--prune", "fastv:k=99,r=0.5"]) == 2
    assert "99" in refusal(capsys)
