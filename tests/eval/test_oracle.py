"""The oracle's sets keep the answers, and every method stands beside them on the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from PIL import Image
from tiny import refusal

from eval import predict, run
from eval.experiments import oracle
from eval.score import find_task, read_questions
from eval.smallest import name_patches, smallest
from minillava.pruning import parse_plan

LIMIT = 4
METHODS = ["fastervlm:keep=32", "pyramiddrop:layers=3/6/9,ratios=0.5/0.25/0.125"]
COMMON = ["--prune", *METHODS, "--budgets", "16", "3", "--limit", str(LIMIT), "--out"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Any]]:
    """The folder, results.json and the sets of an experiment that was interrupted once."""
    out, searched = tmp_path_factory.mktemp("oracle"), list[int]()

    def interrupted(*rest: Any, **more: Any) -> Any:
        searched.append(1)
        if len(searched) == 3:
            raise KeyboardInterrupt
        return smallest(*rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "smallest", interrupted)
        assert oracle.main([*COMMON, str(out)]) == 130
        lines = (out / "smallest.jsonl").read_bytes()
        assert len(lines.splitlines()) == 2
        with (out / "smallest.jsonl").open("ab") as file:
            file.write(b'{"number": 2, "ques')  # a killed process
        assert oracle.main([*COMMON, str(out)]) == 0
    assert len(searched) == 3 + 2, "questions that were done are not searched again"
    assert (out / "smallest.jsonl").read_bytes().startswith(lines)
    sets = [json.loads(line) for line in (out / "smallest.jsonl").read_text().splitlines()]
    return out, json.loads((out / "results.json").read_text()), sets


def test_the_sets_keep_the_unpruned_answers(
    made: tuple[Path, Any, list[Any]], tmp_path: Path
) -> None:
    _, _, sets = made
    assert [s["number"] for s in sets] == [*range(LIMIT)]
    assert all(s["minimal"] for s in sets)
    assert run.main(["--limit", str(LIMIT), "--prune", "none", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "none.jsonl").read_text().splitlines()]
    assert [s["text"] for s in sets] == [row["text"] for row in rows]
    largest = max(sets, key=lambda s: len(s["patches"]))
    plan = f"hand:patches={name_patches(largest['patches'])},positions=original"
    assert parse_plan(plan)
    assert run.main(["--limit", str(LIMIT), "--prune", plan, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("hand*.jsonl")
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[largest["number"]]["text"] == largest["text"]


def test_the_table_counts_kept_answers(made: tuple[Path, Any, list[Any]]) -> None:
    out, found, sets = made
    rows, sizes = found["tables"].values()
    assert [(row["budget"], row["tokens left"]) for row in rows] == [
        (16, "16"),
        (16, "16"),
        (3, "3"),
        (3, "3"),
    ]
    for row in rows:
        within = [len(s["patches"]) <= row["budget"] for s in sets]
        assert row["oracle, %"] == 100 * sum(within) / LIMIT
        name = row["plan"].strip("`").replace(":", "_").replace("/", "-")
        lines = (out / "answers" / f"{name}.jsonl").read_text().splitlines()
        kept = [json.loads(x)["text"] == s["text"] for x, s in zip(lines, sets, strict=True)]
        assert row["answers kept, %"] == 100 * sum(kept) / LIMIT
        pairs = list(zip(within, kept, strict=True))
        assert row["oracle alone"] == pairs.count((True, False))
        assert row["method alone"] == pairs.count((False, True))
        assert row["minus the oracle"] == row["answers kept, %"] - row["oracle, %"]
    assert sizes[0]["largest"] == max(len(s["patches"]) for s in sets)
    assert sizes[0]["no patch needed"] == sum(not s["patches"] for s in sets)
    with Image.open(out / "oracle.png") as image:
        assert image.width > 600


def test_the_same_command_again_asks_nothing(
    made: tuple[Path, Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found, _ = made
    monkeypatch.setattr(predict, "generate", None)
    monkeypatch.setattr(oracle, "smallest", None)
    assert oracle.main([*COMMON, str(out)]) == 0
    assert json.loads((out / "results.json").read_text())["tables"] == found["tables"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prefills", "9"], "was begun with plan='smallest', not 'smallest:prefills=9'"),
        (["--seed", "3"], "was begun with seed=0, not 3"),
        (["--limit", "2"], "is of question 2, but 2 are asked"),
        (["--prune", "none"], "--prune none keeps every answer"),
        (["--budgets", "199"], "--budgets 199 must be from 1 to 144"),
    ],
)
def test_other_settings_are_refused(
    options: list[str],
    said: str,
    made: tuple[Path, Any, list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert oracle.main([*COMMON, str(made[0]), *options]) == 2
    assert said in refusal(capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patches": "3"}, "patches is '3', but must be list"),
        ({"question_id": 7}, "is of question 7, but question 0 is now 0"),
    ],
)
def test_a_damaged_line_is_named(
    change: dict[str, Any], said: str, made: tuple[Path, Any, list[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "smallest.jsonl"
    path.write_text(json.dumps({**made[2][0], **change}) + "\n")
    items = read_questions(find_task("demo", None)[0], None, "llava", 1)
    with pytest.raises(ValueError, match=r"smallest\.jsonl, line 1 is ") as refused:
        oracle.read_sets(path, items)
    assert said in str(refused.value)


def test_too_few_prefills_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(oracle.base, "open_bench", None)
    assert oracle.main(["--prefills", "1", "--out", str(tmp_path)]) == 2
    assert "--prefills 1 must be 2 or more: for the answer, and" in refusal(capsys)
