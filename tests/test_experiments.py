"""The experiments, each on a handful of the demo's questions: tables that agree with eval.run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from eval import run
from eval.experiments import ablation, aokvqa, kv_cache, nine, scienceqa, simignore

Main = Callable[[Sequence[str] | None], int]
Results = Callable[[str], tuple[Path, Any]]
CASES: dict[str, tuple[Main, list[str], list[str]]] = {
    "fastv": (ablation.main, ["--layers", "2", "5", "--r", "0.5", "0.9"], ["heat_map", "curves"]),
    "simignore": (
        ablation.main,
        ["--method", "simignore", "--layers", "3", "--r", "0.5", "0.75"],
        ["heat_map", "curves"],
    ),
    "measures": (simignore.main, ["--share", "0.25", "0.5"], ["budget"]),
    "aokvqa": (aokvqa.main, [], ["score", "first_token"]),
    "scienceqa": (scienceqa.main, [], ["score"]),
    "kv_cache": (kv_cache.main, ["--new-tokens", "6", "--repeats", "1"], ["seconds", "cache"]),
    "nine": (nine.main, [], ["nine"]),
}
LIMIT = 9


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Each experiment's folder and results.json, run once."""

    @functools.cache
    def result(name: str) -> tuple[Path, Any]:
        main, more, _ = CASES[name]
        out = tmp_path_factory.mktemp(name)
        assert main(["--limit", str(LIMIT), "--out", str(out), *more]) == 0
        return out, json.loads((out / "results.json").read_text())

    return result


def rows_of(found: Any) -> list[dict[str, Any]]:
    (rows,) = found["tables"].values()
    return rows


@pytest.mark.parametrize("name", CASES)
def test_a_table_and_pictures_are_written(name: str, results: Results) -> None:
    out, found = results(name)
    text = (out / "results.md").read_text()
    assert f"# {found['title']}" in text
    assert "seed 0" in text
    for picture in CASES[name][2]:
        assert f"({picture}.png)" in text
        with Image.open(out / f"{picture}.png") as image:
            assert image.width > 600
            assert len(set(image.convert("L").resize((60, 40)).tobytes())) > 8  # not empty


@pytest.mark.parametrize("name", [name for name in CASES if name != "kv_cache"])
def test_the_same_command_again_asks_nothing(
    name: str, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = results(name)
    from eval import predict

    monkeypatch.setattr(predict, "generate", None)
    main, more, _ = CASES[name]
    assert main(["--limit", str(LIMIT), "--out", str(out), *more]) == 0
    again = json.loads((out / "results.json").read_text())
    for row, before in zip(rows_of(again), rows_of(found), strict=True):
        same = {k: v for k, v in before.items() if "measured" not in k}
        assert {k: v for k, v in row.items() if "measured" not in k} == same


def test_the_ablation_is_what_eval_run_finds(tmp_path: Path) -> None:
    main, more, _ = CASES["fastv"]
    assert main(["--limit", "9", "--out", str(tmp_path / "a"), *more]) == 0
    found = rows_of(json.loads((tmp_path / "a" / "results.json").read_text()))
    row = next(r for r in found if (r["K"], r["R, %"]) == (5, 90))
    plan = "fastv:k=5,r=0.9,mode=mask"
    assert row["plan"] == f"`{plan}`"
    out = tmp_path / "b"
    assert run.main(["--limit", "9", "--out", str(out), "--prune", plan, "--batch", "32"]) == 0
    alone = json.loads(next(out.glob("*.json")).read_text())
    assert row["accuracy"] == alone["score"]["value"]
    # the share of FLOPs is that of the same plan dropped
    dropped = "fastv:k=5,r=0.9"
    assert run.main(["--limit", "9", "--out", str(out), "--prune", dropped]) == 0
    share = json.loads((out / "fastv_k=5,r=0.9.json").read_text())["costs"]["fastv_share"]
    assert row["FLOPs if dropped, %"] == pytest.approx(100 * share, rel=0.01)


def test_cache_bytes_and_prompts_of_the_kv_cache_experiment(results: Results) -> None:
    _, found = results("kv_cache")
    by = {(row["picture"], row[""]): row for row in rows_of(found)}
    assert {picture for picture, _ in by} == {"x 1", "x 10"}
    one, ten = by["x 1", "cache"], by["x 10", "cache"]
    # nine more pictures of 64 tokens, each with a line break, which is two
    assert ten["prompt tokens"] - one["prompt tokens"] == 9 * (64 + 2)
    bytes_a_row = 2 * 128 * 4 * 8
    assert one["cache after the prefill, MB"] == one["prompt tokens"] * bytes_a_row / 1e6
    assert one["cache, MB"] == (one["prompt tokens"] + 5) * bytes_a_row / 1e6
    assert by["x 1", "no cache"]["cache, MB"] == 0
    pruned = by["x 10", "cache, fastv:k=2,r=0.5"]
    rows = 2 * ten["prompt tokens"] + 6 * (ten["prompt tokens"] - 320)
    assert pruned["cache after the prefill, MB"] == rows * 2 * 128 * 4 / 1e6


def test_memory_is_computed_from_its_parts(results: Results) -> None:
    _, found = results("aokvqa")
    rows = rows_of(found)
    assert [row["R, %"] for row in rows] == [None, 25, 50, 75] * 2
    assert {row["CUDA memory, MB"] for row in rows} == {None}
    for row in rows:
        assert row["memory computed, MB"] > row["weights, MB"] + row["cache, MB"]
    assert rows[4]["weights, MB"] < rows[0]["weights, MB"]


@pytest.mark.parametrize(
    ("main", "argv", "words"),
    [
        (ablation.main, ["--r", "2"], "--r"),
        (ablation.main, ["--layers", "99"], "99"),
        (ablation.main, ["--method", "x"], "--method"),
        (kv_cache.main, ["--times", "0"], "--times"),
        (kv_cache.main, ["--prune", "nonsense"], "nonsense"),
        (nine.main, ["--data", "nowhere"], "nowhere"),
        (scienceqa.main, ["--task", "scienceqa"], "scienceqa"),
    ],
)
def test_bad_input_is_one_line(
    main: Main, argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--limit", "2", "--out", str(tmp_path / "out"), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
