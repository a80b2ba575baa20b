"""eval.conditions with made-up answers: its verdicts, and that kept answers are used again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import refusal

from eval import conditions
from eval.conditions import Condition, Outcome, Way, budget
from eval.statistics import Estimate

TOKENS = {"fastv:k=2,r=0.5": 84.0, "fastv:k=2,r=0.75": 54.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """The ways in which questions were asked. FastV loses nothing, random every second answer."""
    seen: list[Way] = []

    def ask(model: Any, processor: Any, questions: Any, way: Way) -> Outcome:
        seen.append(way)
        bad = 1 if way.shown != "image" else 2 if "random" in (way.plan or "") else 60
        right = tuple(
            bad > 1 and i % bad != way.seed % 2 for i in range(len(questions.seeds) * questions.n)
        )
        return Outcome(way.plan, right, TOKENS.get(way.plan or "", 30.0))

    monkeypatch.setattr(conditions, "ask", ask)
    monkeypatch.setattr(conditions, "load", lambda _: (SimpleNamespace(), SimpleNamespace()))
    return seen


def test_a_report_says_what_holds(
    asked: list[Way], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--questions", "60", "--scenes", "4", "5", "--out", str(tmp_path)]
    assert conditions.main(argv) == 0
    text = (tmp_path / "conditions.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    found = json.loads((tmp_path / "conditions.json").read_text())
    verdicts = {c["condition"]: (c["holds"], c["surely"]) for c in found["conditions"]}
    assert verdicts["accuracy without pruning, all but captions"] == (False, False)
    assert verdicts["accuracy with the question alone"] == (True, True)
    assert verdicts["`fastv:k=2,r=0.5` minus no pruning"] == (True, False)  # 108 questions only
    assert verdicts["`fastv:k=2,r=0.5` (fastv-50) minus `random:keep=84`"] == (True, True)
    assert verdicts["`uniform:keep=36` minus no pruning"] == (False, False)
    assert "| `random:keep=16` minus no pruning | -50.0 |" in text
    assert {way.seed for way in asked if way.plan == "random:keep=56"} == {0, 1, 2}
    count = len(asked)
    assert conditions.main(argv) == 0
    assert len(asked) == count, "kept answers were asked again"
    assert conditions.main([*argv, "--questions", "9"]) == 2
    assert "has answers to other questions; give another --out" in capsys.readouterr().err


def test_answers_of_other_weights_are_refused(
    asked: list[Way], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "model" / "model.safetensors", tmp_path / "out"
    weights.parent.mkdir()
    argv = ["--questions", "9", "--scenes", "4", "--only", "none"]
    argv += ["--out", str(out), "--model", str(weights.parent)]
    for content, code, asked_so_far in ((b"one", 0, 1), (b"one", 0, 1), (b"two", 2, 1)):
        weights.write_bytes(content)
        assert conditions.main(argv) == code
        assert len(asked) == asked_so_far
    assert "has answers of other weights; give another --out" in capsys.readouterr().err


def test_only_some_are_asked_and_no_table_is_written(asked: list[Way], tmp_path: Path) -> None:
    argv = ["--questions", "20", "--scenes", "6", "--out", str(tmp_path)]
    argv += ["--only", "fastv-50", "--random", "36"]
    assert conditions.main(argv) == 0
    plans = [way.plan for way in asked]
    assert plans == ["fastv:k=2,r=0.5", *["random:keep=36"] * 3]
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]


@pytest.mark.parametrize(
    ("bounds", "at_most", "verdict"),
    [
        ((99.2, 99.0, 99.4), False, "holds"),
        ((99.2, 98.9, 99.4), False, "holds, not surely"),
        ((98.9, 98.0, 99.4), False, "does not hold"),
        ((98.9, 98.0, 99.0), True, "holds"),
        ((99.1, 98.0, 99.4), True, "does not hold"),
        ((99.2, None, None), False, "holds, not surely"),
    ],
)
def test_verdicts(bounds: tuple[Any, Any, Any], at_most: bool, verdict: str) -> None:
    assert Condition("c", Estimate(*bounds), 99.0, at_most).row()[-1] == verdict


@pytest.mark.parametrize(("tokens", "keep"), [(84.0, 84), (52.2, 56), (14.0, 16), (20.1, 36)])
def test_a_random_choice_has_at_least_as_many_tokens(tokens: float, keep: int) -> None:
    assert budget(Outcome(None, (), tokens)) == keep


def test_a_file_in_place_of_the_folder_is_refused(
    asked: list[Way], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert conditions.main(["--out", str(file)]) == 2
    line = refusal(capsys)
    assert line.startswith(f"error: {file / 'answers'}")
    assert " cannot be written (Not a directory); correct this" in line
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "4").write_text("")
    assert conditions.main(["--scenes", "4", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / 'answers' / '4'} cannot be written (File exists)" in refusal(capsys)
    assert not asked


def test_the_help_says_what_only_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        conditions.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "ask only in these ways and keep the answers; prints and writes no table" in text
