"""eval.check: cases with the official results come out right, wrong ones are told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import refusal

from eval import check

CASES = sorted((Path(__file__).parents[1] / "metric_cases").glob("*.json"))


def _write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def _error(arguments, capsys) -> str:
    assert check.main([str(a) for a in arguments]) == 2
    return refusal(capsys)


def test_there_is_a_file_of_every_kind():
    assert {path.stem for path in CASES} == {
        "cider_edge" if name == "cider" else name for name in check.KINDS if name != "mmmu_rows"
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_official_results(path):
    checked = check.check(path)
    assert checked.misses == ()
    assert checked.right == checked.total == len(json.loads(path.read_text())["cases"])


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_result_that_is_changed_is_missed(path, tmp_path):
    """Each field that is compared, in each kind: another value is told."""
    document = json.loads(path.read_text())
    kind = check.KINDS[check.check(path).kind]
    case = document["cases"][0]
    for name in {*kind.gives, *kind.further} & case.keys():
        wrong = _write(tmp_path, path.name, {"cases": [case | {name: _other(case[name])}]})
        misses = check.check(wrong).misses
        assert name in {miss.field for miss in misses}, name


def _other(value):
    if isinstance(value, dict):
        return {k: _other(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_other(v) for v in value] or ["x"]
    if isinstance(value, bool):
        return not value
    return value + 1e-6 if isinstance(value, int | float) else f"{value or ''}x"


def test_a_miss_is_printed_and_ends_with_1(tmp_path, capsys):
    path = _write(
        tmp_path,
        "mme_parse_2.json",
        {"cases": [{"text": "yes", "label": "yes"}, {"text": "know", "label": "yes"}]},
    )
    assert check.main([str(path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{path}: 1/2 (mme_parse)",
        '  case 2, label: expected "yes", came "no"',
        "total: 1/2",
    ]


def test_json(tmp_path, capsys):
    path = _write(tmp_path, "mme_parse.json", {"cases": [{"text": "know", "label": "yes"}]})
    assert check.main(["--json", str(path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["right"], found["total"]) == (0, 1)
    assert found["files"][0]["misses"][0] == {
        "case": "1",
        "field": "label",
        "expected": "yes",
        "came": "no",
    }


def test_rows_of_published_mmmu_outputs_are_known_by_their_fields(tmp_path):
    rows = [
        {
            "id": "1",
            "question_type": "multiple-choice",
            "answer": "B",
            "options": ["1", "2"],
            "response": "B",
            "parsed": "B",
            "random": False,
            "correct": True,
        },
        {
            "id": "2",
            "question_type": "multiple-choice",
            "answer": "A",
            "options": ["1", "2"],
            "response": "A) 1",
            "parsed": None,
            "random": True,
            "correct": None,
        },
        {
            "id": "3",
            "question_type": "short-answer",
            "answer": "1.06",
            "response": "0",
            "parsed": [0.0],
            "random": False,
            "correct": False,
        },
    ]
    path = _write(tmp_path, "a_model.json", {"correct_without_random": 1, "rows": rows})
    assert (check.check(path).right, check.check(path).total) == (4, 4)
    del rows[0]["options"]
    path = _write(tmp_path, "a_model.json", {"rows": rows})
    with pytest.raises(ValueError, match="1 has no list of options"):
        check.check(path)


def test_a_corpus_of_items(tmp_path, capsys):
    """Its images are the cases, its means one more."""
    case = json.loads(next(p for p in CASES if p.stem == "cider_edge").read_text())["cases"][0]
    items = [
        {
            "id": image,
            "candidate": case["candidates"][image],
            "references": references,
            "candidate_tokens": case["candidate_tokens"][image][0],
            "reference_tokens": case["reference_tokens"][image],
            "cider": score,
        }
        for (image, references), score in zip(
            case["references"].items(), case["cider_each"], strict=True
        )
    ]
    document = {"cider": case["cider"], "rouge_l": case["rouge_l"], "items": items}
    path = _write(tmp_path, "cider_mine.json", document)
    assert check.main([str(path)]) == 0
    assert f"tokens by {check.check(path).tokeniser}" in capsys.readouterr().out
    path = _write(tmp_path, "cider_mine.json", document | {"cider": 1.0})
    assert [(m.case, m.field) for m in check.check(path).misses] == [("whole file", "cider")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gqa.json", {"cases": [{"prediction": "x"}]}, "case 1 of .* has no answer"),
        ("mme_parse.json", {"cases": [{"text": 5, "label": "no"}]}, "a text that is not of .*: 5"),
        ("mme_parse.json", {"cases": []}, "no list of cases"),
        ("mme_parse.json", {"cases": [1]}, "no list of cases"),
        ("mme_parse.json", "yes", "no list of cases"),
        ("other.json", {"cases": [{"x": 1}]}, "kinds are aokvqa, cider, gqa"),
        (
            "pope_score.json",
            {"cases": [{"rows": [{"label": "x", "text": "y"}], "llava": {}, "lmms": {}}]},
            "pope_score.json: 'x' is not a label",
        ),
        (
            "cider.json",
            {"cases": [{"candidates": {"1": "a"}, "references": {"2": ["a"]}, "cider": 0}]},
            "different images",
        ),
    ],
)
def test_bad_input_is_one_line(name, content, words, tmp_path, capsys):
    assert re.search(words, _error([_write(tmp_path, name, content)], capsys))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "gqa.json"
    path.write_bytes(b"\xef\xbb\xbf" + next(p for p in CASES if p.stem == "gqa").read_bytes())
    assert check.main([str(path)]) == 0


def test_files_that_cannot_be_read(tmp_path, capsys):
    assert "there is no file" in _error([tmp_path / "none.json"], capsys)
    assert "cannot be read" in _error([tmp_path], capsys)
    (tmp_path / "gqa.json").write_text("{")
    assert "not a JSON file" in _error([tmp_path / "gqa.json"], capsys)
    (tmp_path / "gqa.json").write_bytes(b"\xff\xfe")
    assert "not a JSON file" in _error([tmp_path / "gqa.json"], capsys)
    assert "required" in _error([], capsys)
