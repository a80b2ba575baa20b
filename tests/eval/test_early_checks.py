"""Commands refuse wrong options before they ask, load or measure anything."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import refusal

from eval import bench, cost, fit, latency, predict, score
from eval.experiments import aokvqa, kv_cache, memory, nine, scienceqa, simignore

Main = Callable[[list[str]], int]
TOO_DEEP = "fastv:k=99,r=0.5"


@pytest.mark.parametrize("main", [kv_cache.main, nine.main, scienceqa.main])
def test_an_experiment_checks_its_plans_before_it_asks(
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (predict, kv_cache):
        monkeypatch.setattr(module, "generate", None)
    assert main(["--limit", "2", "--out", str(tmp_path / "out"), "--prune", TOO_DEEP]) == 2
    assert "99" in refusal(capsys)


def test_kv_cache_checks_the_prompt_with_several_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kv_cache, "generate", None)
    argv = ["--out", str(tmp_path), "--new-tokens", "3", "--times", "1", "2"]
    assert kv_cache.main([*argv, "--prune", "divprune:keep=145"]) == 2
    assert "145" in refusal(capsys)


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (kv_cache.main, ["--prune", "nonsense"]),
        (aokvqa.main, ["--prune", "nonsense"]),
        (simignore.main, ["--beside", "nonsense"]),
        (simignore.main, ["--beside", "divprune", "fitprune"]),
    ],
)
def test_an_experiment_reads_its_plans_before_it_loads_a_model(
    main: Main,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "load", None)
    monkeypatch.setattr(memory, "measure_peaks", None)
    assert main(["--limit", "2", "--out", str(tmp_path / "out"), *argv]) == 2
    assert argv[-1] in refusal(capsys)


def test_nine_checks_all_benchmarks_before_it_asks_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("coco2014", "coco2017"):
        (data / name).mkdir(parents=True)
        year = name.removeprefix("coco")
        rows = {
            "images": [{"id": 1, "file_name": "x.png"}],
            "annotations": [{"image_id": 1, "id": 1, "caption": "a dog"}],
        }
        (data / name / f"captions_val{year}.json").write_text(json.dumps(rows))
    (data / "coco2014" / "val2014").mkdir()
    Image.new("RGB", (8, 8)).save(data / "coco2014" / "val2014" / "x.png")
    monkeypatch.setattr(predict, "generate", None)
    assert nine.main(["--data", str(data), "--out", str(out), "--prune", "random:keep=4"]) == 2
    assert "val2017/x.png" in refusal(capsys)


def test_measured_memory_allows_plans_that_are_too_large_for_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(opened: bench.Bench, plan: object) -> None:
        asked.append(plan)
        if len(asked) <= 2:  # of the demo, which is asked first
            raise ValueError("keep=150 is more than 144")

    monkeypatch.setattr(memory, "_first_token", answer)
    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    args = parser.parse_args(["--out", str(tmp_path)])
    assert len(memory._peaks(args, ["none", "random:keep=4"])) == 2
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prune", TOO_DEEP], "99"),
        (["--prune", "divprune:keep=577"], "577"),
        (["--layers", "4", "--prune", "fastv:k=9,r=0.5"], "9"),
        (["--layers", "4", "--prune", "none", "--form", "int4", "float32"], "--form float32 needs"),
    ],
)
def test_latency_checks_a_shape_before_it_makes_weights(
    argv: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cost, "memory_bandwidth", None)
    monkeypatch.setattr(latency, "random_model", None)
    if "--form" in argv:
        monkeypatch.setattr(latency, "available_memory", lambda: 4e9)
    assert latency.main(["--shape", "7b", *argv]) == 2
    assert words in refusal(capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "llava-1.5-7b", "--prune", "nonsense"], "nonsense"),
        (["--model", "llava-1.5-7b", "--weights", "nf5"], "--weights nf5: published are nf4, "),
        (["--prune", "none"], "--prune says what --model measured; give --model, too"),
        (["--weights", "nf4"], "--weights says what --model measured; give --model, too"),
        (["--submission", "x.json"], "there is no server for demo"),
        (["--task", "vqav2", "--submission", "no/x.json"], "--submission no/x.json: there is no"),
    ],
)
def test_score_checks_its_options_before_it_reads_files(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score.main(["--task", "demo", "--predictions", "nowhere.jsonl", *argv]) == 2
    assert words in refusal(capsys)


@pytest.mark.parametrize("threshold", ["nan", "-1"])
def test_fit_checks_its_threshold_before_it_loads(
    threshold: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fit, "load", None)
    assert fit.main(["vtw", f"--threshold={threshold}"]) == 2
    assert "--threshold" in refusal(capsys)


def test_a_sample_whose_image_is_missing_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('\n{"text": "a\u2028b", "image": "x.png"}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: .*x\.png"):
        fit.samples(path, 1, 0)
