"""The experiments, each on a handful of the demo's questions: tables that agree with eval.run."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import user_method
from tiny import refusal

pytest.importorskip("matplotlib")

from PIL import Image
from test_tasks import aokvqa as aokvqa_files
from test_tasks import coco, gqa, mme
from test_tasks import scienceqa as scienceqa_files

from eval import run
from eval.bench import DEMO
from eval.cost import Spread
from eval.experiments import ablation, aokvqa, base, kv_cache, nine, scienceqa, simignore
from eval.plans import file_name

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
    "aokvqa": (aokvqa.main, [], ["score", "memory"]),
    "scienceqa": (scienceqa.main, [], ["score"]),
    "kv_cache": (
        kv_cache.main,
        ["--times", "1", "4", "--new-tokens", "6", "--repeats", "1"],
        ["rows", "cache"],
    ),
    "nine": (nine.main, [], ["nine"]),
}
LIMIT = 6  # with fewer, no difference has an interval


@pytest.fixture(autouse=True)
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory is measured, in processes of their own, by the test marked slow alone."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(aokvqa, "measure_peaks", lambda args, plans: [None] * len(plans))


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
    """The rows of the first table."""
    rows, *_ = found["tables"].values()
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


@pytest.mark.parametrize("name", ["nine", "scienceqa", "measures"])
def test_plans_that_draw_are_asked_with_three_seeds(name: str, results: Results) -> None:
    """Their score is the mean; the others are asked once."""
    out, found = results(name)
    folders = [out / "answers", *(out / "answers" / f"seed-{s}" for s in base.SEEDS[1:])]
    drawn = {file.stem for file in folders[1].glob("*.json")}
    assert drawn
    assert all(plan.startswith("random") for plan in drawn)
    plan = next(iter(drawn)).replace("_", ":")
    scores = [json.loads((f / f"{file_name(plan)}.json").read_text())["score"] for f in folders]
    mean = sum(score["value"] for score in scores) / 3
    said = "\n".join(found["comparisons"])
    assert f"| `{plan}` | 0, 1000000, 2000000 | {mean:.2f} |" in said
    shown = [row["accuracy"] for row in rows_of(found) if "accuracy" in row]
    if shown:
        assert any(value == pytest.approx(mean) for value in shown)


def test_every_score_of_the_nine_kinds_has_an_interval(results: Results) -> None:
    _, found = results("nine")
    scores, intervals = found["tables"].values()
    for row, bounds in zip(scores, intervals, strict=True):
        kinds = [name for name in bounds if name not in ("plan", "mean")]
        assert row["mean"] == pytest.approx(sum(row[kind] for kind in kinds) / len(kinds))
        assert bounds["mean"]["low"] <= row["mean"] <= bounds["mean"]["high"]
        assert {*kinds} <= {*row}


def test_the_ablation_is_what_eval_run_finds(tmp_path: Path, results: Results) -> None:
    _, found = results("fastv")
    row = next(r for r in rows_of(found) if (r["K"], r["R, %"]) == (5, 90))
    plan = "fastv:k=5,r=0.9,mode=mask"
    assert row["plan"] == f"`{plan}`"
    out = tmp_path / "alone"
    asked = ["--limit", str(LIMIT), "--out", str(out)]
    assert run.main([*asked, "--prune", plan, "--batch", "32"]) == 0
    alone = json.loads(next(out.glob("*.json")).read_text())
    assert row["accuracy"] == alone["score"]["value"]
    # the share of FLOPs is that of the same plan dropped
    dropped = "fastv:k=5,r=0.9"
    assert run.main([*asked, "--prune", dropped]) == 0
    share = json.loads((out / "fastv_k=5,r=0.9.json").read_text())["costs"]["fastv_share"]
    assert row["FLOPs if dropped, %"] == pytest.approx(100 * share, rel=0.01)


def test_cache_bytes_and_prompts_of_the_kv_cache_experiment(results: Results) -> None:
    _, found = results("kv_cache")
    by = {(row["picture"], row[""]): row for row in rows_of(found)}
    assert {picture for picture, _ in by} == {"x 1", "x 4"}
    one, four = by["x 1", "cache"], by["x 4", "cache"]
    # three more pictures of 144 tokens, each with a line break, which is two
    assert four["prompt tokens"] - one["prompt tokens"] == 3 * (144 + 2)
    bytes_a_row = 2 * 128 * 4 * 12
    assert one["cache after the prefill, MB"] == one["prompt tokens"] * bytes_a_row / 1e6
    assert one["cache, MB"] == (one["prompt tokens"] + 5) * bytes_a_row / 1e6
    assert by["x 1", "no cache"]["cache, MB"] == 0
    pruned = by["x 4", "cache, fastv:k=2,r=0.5"]
    rows = 2 * four["prompt tokens"] + 10 * (four["prompt tokens"] - 288)
    assert pruned["cache after the prefill, MB"] == rows * 2 * 128 * 4 / 1e6
    # six tokens: the prompt and five rows with a cache, six growing sequences without
    T = one["prompt tokens"]
    assert one["rows through a layer"] == T + 5
    assert by["x 1", "no cache"]["rows through a layer"] == sum(range(T, T + 6))
    assert pruned["rows through a layer"] == rows / 12 + 5


def test_tables_of_the_demo_have_no_times(results: Results) -> None:
    """Here and in the committed results: they would be milliseconds of noise."""
    found = [results(name)[1] for name in CASES]
    committed = Path(__file__).parents[2] / "eval" / "results"
    found += [json.loads(file.read_text()) for file in committed.glob("*/results.json")]
    for tables in found:
        columns = {c for rows in tables["tables"].values() for row in rows for c in row}
        assert not [c for c in columns if c == "seconds" or c.endswith((", s", ", ms"))]
    assert not [*committed.glob("*/first_token.png"), *committed.glob("*/seconds.png")]
    demo = json.loads((committed / "demo.json").read_text())
    assert "seconds" not in demo["rows"][0]


def test_times_of_other_tasks_are_medians_with_quartiles(tmp_path: Path) -> None:
    slow, fast = Spread(2.0, 1.0, 4.0, 9), Spread(0.5, 0.25, 0.75, 9)
    assert base.timed("gqa", {"prefill, s": slow}) == {"prefill, s": slow}
    rows = {"a": {"first token, s": slow}, "b": {"first token, s": fast}}
    assert base.format_table([*rows.values()]).endswith("| 0.5 [0.25, 0.75] |")
    pixels = []
    for name, drawn in (("lines", rows), ("none", {n: {"first token, s": 2.0} for n in rows})):
        out = tmp_path / name
        out.mkdir()
        assert base.time_plots(out, drawn, "times") == ["first_token.png"]
        with Image.open(out / "first_token.png") as image:
            colours = image.convert("RGB").getcolors(2**20) or []
        pixels.append(sum(n for n, colour in colours if max(colour) < 40))
    assert pixels[0] > pixels[1]  # black lines between the quartiles
    assert base.time_plots(tmp_path, {"a": {"accuracy": 1.0}}, "times") == []


def test_memory_is_computed_from_its_parts(results: Results) -> None:
    _, found = results("aokvqa")
    rows = rows_of(found)
    assert [row["R, %"] for row in rows] == [None, 25, 50, 75] * 2
    assert {row["CUDA memory, MB"] for row in rows} == {None}
    for row in rows:
        parts = row["weights, MB"] + row["cache, MB"] + row["activations, MB"]
        assert row["memory computed, MB"] == pytest.approx(parts)
    for form in (rows[:4], rows[4:]):
        assert len({row["weights, MB"] for row in form}) == 1
        assert [row["cache, MB"] for row in form] == sorted(
            (row["cache, MB"] for row in form), reverse=True
        )
    assert rows[4]["weights, MB"] < rows[0]["weights, MB"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep one peak")
def test_measured_memory_is_that_of_one_model(tmp_path: Path) -> None:
    """Of a few million bytes, not of the libraries' hundreds, nor less than the weights."""
    assert aokvqa.main(["--limit", str(LIMIT), "--out", str(tmp_path)]) == 0
    for row in rows_of(json.loads((tmp_path / "results.json").read_text())):
        measured, computed = row["memory measured, MB"], row["memory computed, MB"]
        assert row["weights, MB"] < measured < computed + 15


# ---------------------------------------------------------------- the benchmarks' own files


def demo_named(name: str, folder: Path) -> str:
    """The demo under a name that figures are published of."""
    return str(shutil.copytree(DEMO, folder / name))


def test_nine_reads_what_is_there_and_shows_what_is_published(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    for name, write in (("gqa", gqa), ("mme", mme), ("coco2017", COCO)):
        (root / name).mkdir(parents=True)
        write(root / name)
    model = demo_named("llava-1.5-7b", tmp_path)
    argv = ["--data", str(root), "--model", model, "--prune", "fastv:k=3,r=0.5"]
    assert nine.main([*argv, "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    columns = ["coco2017 CIDEr", "gqa accuracy", "mme perception", "mme cognition"]
    assert list(rows_of(found)[0])[1:6] == [*columns, "image tokens a layer"]
    assert [note.split(":")[1] for note in found["notes"]] == [
        " nocaps", " flickr30k", " coco2014", " mmmu", " seed_bench"
    ]  # fmt: skip
    text = "\n".join(found["published"])
    for figure in ("62.0", "60.4", "1511.7", "349.3", "110.8"):  # of FastV's README
        assert figure in text
    assert "fastv-lmms" in (out / "results.md").read_text()


FASTV_16_BITS = ["81.9", "81.8", "81.3", "80.9"]
FASTV_NF4 = ["81.5", "81.7", "81.1", "80.3"]

COCO = coco("captions_val2017.json", "val2017")


@pytest.mark.parametrize(
    ("name", "main", "write", "protocol", "published"),
    [  # FastV's rows in 16 bits, then those in nf4; Simignore's are all in nf4
        ("aokvqa", aokvqa.main, aokvqa_files, "own", [*FASTV_16_BITS, *FASTV_NF4]),
        ("scienceqa", scienceqa.main, scienceqa_files, "simignore", []),
    ],
)
def test_single_benchmarks_from_their_own_files(
    name: str, main: Main, write: Any, protocol: str, published: list[str], tmp_path: Path
) -> None:
    (data := tmp_path / "data").mkdir()
    write(data)
    model, out = demo_named("llava-1.5-13b", tmp_path), tmp_path / "out"
    argv = ["--task", name, "--data", str(data), "--model", model, "--protocol", protocol]
    assert main([*argv, "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert f"{name}, {protocol} protocol, llava-1.5-13b" in found["setting"]
    theirs = [line.split()[2] for text in found.get("published", []) for line in rows_in(text)]
    assert theirs == published


def rows_in(text: str) -> list[str]:
    return text.splitlines()[2:]


# ---------------------------------------------------------------- methods in files


@pytest.mark.parametrize(
    ("main", "argv", "plan"),
    [
        (ablation.main, ["--layers", "4", "--r", "0.75", "--method"], "M:layer=4,keep=0.25"),
        (simignore.main, ["--share", "0.25", "--beside"], "M:keep=16"),
        (scienceqa.main, ["--prune"], "M:layer=4,keep=16"),
        (aokvqa.main, ["--prune"], "M:layer=4,keep=16"),
        (nine.main, ["--prune"], "M:layer=4,keep=16"),
        (kv_cache.main, ["--times", "1", "--new-tokens", "3", "--prune"], "M:layer=4,keep=16"),
    ],
)
def test_a_users_method(
    main: Main, argv: list[str], plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, out = user_method.write(tmp_path), tmp_path / "out"
    given = method if main in (ablation.main, simignore.main) else plan.replace("M", method)
    argv = ["--limit", "2", "--out", str(out), *argv, given]
    assert main(argv) == 0
    rows = rows_of(json.loads((out / "results.json").read_text()))
    (row, *_) = [row for row in rows if any(method in str(cell) for cell in row.values())]
    if main == kv_cache.main:
        cached = 4 * row["prompt tokens"] + 8 * (row["prompt tokens"] - 128)
        assert row["cache after the prefill, MB"] == cached * 2 * 128 * 4 / 1e6
        return
    layers = 3 if main == simignore.main else 4  # the method's own default
    kept = 36 if main in (ablation.main, simignore.main) else 16  # a quarter
    counts = [144] * layers + [kept] * (12 - layers)
    found = row.get("image tokens a layer", row.get("visible image tokens a layer"))
    assert found == sum(counts) / 12
    user_method.write(tmp_path, user_method.LAST)
    capsys.readouterr()
    assert main(argv) == 2
    assert "edited" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("main", "argv", "words"),
    [
        (ablation.main, ["--r", "2"], "--r"),
        (ablation.main, ["--layers", "99"], "99"),
        (ablation.main, ["--method", "x"], "--method"),
        (kv_cache.main, ["--times", "0"], "--times"),
        (kv_cache.main, ["--prune", "nonsense", "--new-tokens", "1"], "nonsense"),
        (nine.main, ["--data", "nowhere"], "nowhere"),
        (simignore.main, ["--beside", "vtw"], "vtw"),
        (scienceqa.main, ["--prune", "nonsense"], "nonsense"),
        (scienceqa.main, ["--task", "scienceqa"], "scienceqa"),
    ],
)
def test_bad_input_is_one_line(
    main: Main, argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--limit", "2", "--out", str(tmp_path / "out"), *argv]) == 2
    assert words in refusal(capsys)
