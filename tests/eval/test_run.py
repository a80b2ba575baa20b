"""eval.run and eval.score: answers that survive, scores that say what they are of."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import user_method
from tiny import refusal

from eval import predict, run, score, store
from eval.plans import file_name
from eval.summary import summarise
from weights.quantise import quantise

ROOT = Path(__file__).parents[2]
PLAN = "fastv:k=3,keep=16"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def ask(out: Path, *more: str, limit: int = 6, plan: str = PLAN) -> int:
    return run.main(["--out", str(out), "--limit", str(limit), "--prune", plan, *more])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def texts_of(path: Path) -> dict[int, str]:
    return {row["metadata"]["number"]: row["text"] for row in rows_of(path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions in one go, a question at a time."""
    out = tmp_path_factory.mktemp("whole")
    assert ask(out, limit=12) == 0
    return out / f"{file_name(PLAN)}.jsonl"


def test_predictions_have_the_shape_of_llavas(whole: Path) -> None:
    rows = rows_of(whole)
    assert [row["question_id"] for row in rows] == list(range(12))
    names = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert all(row.keys() == names for row in rows)
    assert rows[0]["model_id"] == "demo"
    assert len({row["answer_id"] for row in rows}) == 12
    told = rows[0]["metadata"]
    assert told["plan"] == PLAN
    assert told["image_tokens_entering"] == [144] * 3 + [16] * 9
    assert told["cache_bytes"] == sum(told["tokens_entering"]) * 2 * 128 * 4


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
def test_a_stored_form_is_named_without_quantize(form: str, tmp_path: Path) -> None:
    """So that its figures are not compared with those of unquantised weights."""
    quantise(ROOT / "weights" / "demo", tmp_path / "stored", form)
    assert ask(tmp_path / "out", "--model", str(tmp_path / "stored"), limit=2) == 0
    (result,) = (tmp_path / "out").glob("*.json")
    assert json.loads(result.read_text())["run"]["quantize"] == form


def test_the_result_says_how_it_came_about(whole: Path) -> None:
    result = json.loads(whole.with_suffix(".json").read_text())
    run_ = result["run"]
    assert (run_["task"], run_["protocol"], run_["plan"]) == ("demo", "llava", PLAN)
    assert run_.keys() >= {"template", "aspect", "max_new_tokens", "dtype", "quantize", "seed"}
    assert result["versions"].keys() == {"minillava", "torch", "python"}
    assert result["score"]["n"] <= 12
    assert result["score"]["figure"] == f"{result['score']['value']:.2f}"
    costs = result["costs"]
    assert costs["questions"] == 12
    assert costs["image_tokens"] == (3 * 144 + 9 * 16) / 12
    assert 0 < costs["fastv_share"] < costs["sparsevlm_share"] + 0.01 < 1.01
    assert costs["prefill"]["low"] <= costs["prefill"]["median"] <= costs["prefill"]["high"]


def test_batches_change_nothing(whole: Path, tmp_path: Path) -> None:
    assert ask(tmp_path, "--batch", "5", limit=12) == 0
    assert texts_of(tmp_path / whole.name) == texts_of(whole)


@pytest.mark.parametrize("plan", ["random:keep=9", "fastv:k=0,r=0.8"])
def test_methods_that_draw_do_not_depend_on_batches_or_interruptions(
    plan: str, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert ask(one, plan=plan, limit=9) == 0
    path = other / f"{file_name(plan)}.jsonl"
    assert ask(other, "--batch", "4", plan=plan, limit=9) == 0
    assert texts_of(path) == texts_of(one / path.name)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:4] + lines[7:]))
    assert ask(other, "--batch", "4", plan=plan, limit=9) == 0
    assert texts_of(path) == texts_of(one / path.name)
    assert len(rows_of(path)) == 9


def test_half_a_line_is_cut_off_and_asked_again(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / whole.name
    assert ask(tmp_path, limit=12) == 0
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    assert ask(tmp_path, limit=12) == 0
    assert texts_of(path) == texts_of(whole)
    assert path.read_bytes().count(b"\n") == 12


@pytest.mark.slow
def test_a_killed_run_goes_on_without_a_lost_or_doubled_line(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eval.run", "--limit", "12", "--prune", PLAN]
    command += ["--out", str(tmp_path)]
    path = tmp_path / whole.name
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = path.read_bytes()
    assert ask(tmp_path, limit=12) == 0
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert texts_of(path) == texts_of(whole)
    assert len(rows_of(path)) == 12


def test_a_higher_limit_goes_on_and_a_lower_one_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, limit=5) == 0
    assert ask(tmp_path, limit=12) == 0
    assert texts_of(tmp_path / whole.name) == texts_of(whole)
    capsys.readouterr()
    assert ask(tmp_path, limit=5) == 2
    assert "raise --limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [["--seed", "7"], ["--quantize", "int8"], ["--dtype", "float16"], ["--protocol", "lmms"]],
)
def test_answers_of_other_settings_are_not_mixed(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, limit=2) == 0
    capsys.readouterr()
    assert ask(tmp_path, *more, limit=2) == 2
    assert "was begun with" in refusal(capsys)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(whole: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", "29517", "-m", "eval.run", "--limit", "12", "--prune", PLAN]
    command = [*torchrun, "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    path = tmp_path / whole.name
    assert [row["question_id"] for row in rows_of(path)] == list(range(12))
    assert texts_of(path) == texts_of(whole)
    # each has half of the work, and its own first two batches
    cold = [row["question_id"] for row in rows_of(path) if not row["metadata"]["warm"]]
    assert cold == [0, 1, 2, 3]
    alone = json.loads(whole.with_suffix(".json").read_text())
    assert result["score"] == alone["score"]
    assert not list(tmp_path.glob("*.part-*"))


def test_parts_of_an_interrupted_torchrun_are_taken_in(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / whole.name
    assert ask(tmp_path, limit=12) == 0
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    answers = store.AnswerFile(path, PLAN, layers=8)
    answers.part(0).write_bytes(b"".join(lines[4:9:2]) + lines[9][:20])
    answers.part(1).write_bytes(b"".join(lines[3:8:2]))
    assert ask(tmp_path, limit=12) == 0
    assert [row["question_id"] for row in rows_of(path)] == list(range(12))
    assert not list(tmp_path.glob("*.part-*"))


def test_an_error_keeps_what_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = predict.generate, []

    def breaks(*args: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == 4:
            raise ValueError("the model's logits are not numbers")
        return real(*args, **more)

    monkeypatch.setattr(predict, "generate", breaks)
    assert ask(tmp_path) == 2
    error = capsys.readouterr().err
    assert error == "error: question 3: the model's logits are not numbers\n"
    assert len(texts_of(tmp_path / f"{file_name(PLAN)}.jsonl")) == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prune", "fastv:k=99,r=0.5"], "99"),
        (["--prune", "nonsense"], "nonsense"),
        (["--prune", "none", "fastv:k=2,r=2"], "r=2"),
        (["--limit", "0"], "--limit"),
        (["--batch", "x"], "--batch"),
        (["--task", "cooking"], "cooking"),
        (["--protocol", "mine"], "mine"),
        (["--model", "nowhere/at/all"], "nowhere"),
        (["--data", "somewhere"], "demo"),
        (["--task", "gqa"], "gqa"),
        (["--device", "gpu9"], "gpu9"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--limit", "2", "--out", str(tmp_path / "out"), *argv]) == 2
    assert words in refusal(capsys)


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with store.locked(tmp_path):
        assert ask(tmp_path, limit=1) == 2
    assert "another process writes" in capsys.readouterr().err


def test_the_table_and_the_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = ["none", "divprune:keep=8"]
    assert run.main(["--limit", "4", "--out", str(tmp_path), "--prune", *plans]) == 0
    printed = capsys.readouterr().out
    assert all(f"| `{plan}` |" in printed for plan in plans)
    assert (tmp_path / "summary.md").read_text() == printed
    found = [Slow("none", 1.0), Slow("a", 0.5), Slow("b", 1.5)]
    (warning,) = run.describe_slow_plans(found)  # type: ignore[arg-type]
    assert warning.startswith("b does not pay off here: its prefill takes 1.50 times")


class Slow:
    """What run.describe_slow_plans reads of a plan."""

    def __init__(self, plan: str, seconds: float) -> None:
        from types import SimpleNamespace as Names

        self.run = Names(plan=plan)
        self.costs = Names(prefill=Names(median=seconds))


def test_costs_leave_the_first_batches_out() -> None:
    from minillava.config import TextConfig

    def row(prefill: float, warm: bool) -> dict[str, Any]:
        times = {"vision": 0.1, "prefill": prefill, "first_token": prefill, "per_token": None}
        tokens = {"prompt_tokens": 5, "tokens_entering": [5, 3], "image_tokens_entering": [4, 2]}
        rest = {"new_tokens": 1, "cache_bytes": 8, "choosing": 0.0, "peak_bytes": None, "batch": 1}
        return {"metadata": {**times, **tokens, **rest, "warm": warm}}

    config = TextConfig(num_hidden_layers=2)
    costs = summarise([row(9.0, False), row(1.0, True), row(2.0, True), row(3.0, True)], config)
    assert costs.prefill is not None
    assert (costs.prefill.median, costs.prefill.n) == (2.0, 3)
    assert costs.per_token is None
    assert costs.tokens_entering == [5, 3]
    assert summarise([row(9.0, False)], config).prefill.median == 9.0  # type: ignore[union-attr]


def test_numbers_of_image_tokens_that_differ_are_shown_with_their_spread(model: Any) -> None:
    from minillava.config import TextConfig

    def row(*entering: int) -> dict[str, Any]:
        times = {"vision": 0.1, "prefill": 1.0, "first_token": 1.0, "per_token": None}
        tokens = {"prompt_tokens": 9, "tokens_entering": [9, 9], "image_tokens_entering": entering}
        rest = {"new_tokens": 1, "cache_bytes": 8, "choosing": 0.0, "peak_bytes": None, "batch": 1}
        return {"metadata": {**times, **tokens, **rest, "warm": True}}

    rows: list[Any] = [row(8, 2), row(8, 4), row(8, 6), row(8, 4), row(8, 4)]
    config = TextConfig(num_hidden_layers=2)
    costs = summarise(rows, config, most=7.5)
    assert (costs.image_tokens_each.median, costs.image_tokens_most) == (6.0, 7.5)
    assert run._image_tokens(costs) == "6.0"  # the quartiles do not differ
    costs = summarise([*rows, row(8, 0), row(8, 8)], config, most=7.5)
    assert run._image_tokens(costs) == "6.0 (5.5-6.5, at most 7.5)"
    assert run._image_tokens(summarise([*rows[:3]], config)) == "6.0 (5.0-7.0)"


# ---------------------------------------------------------------- methods in files


def test_a_users_method_is_read_once_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, mark = user_method.write_mark(tmp_path)
    plan, out = f"{method}:keep=16", tmp_path / "out"
    assert ask(out, plan=plan) == 0
    assert mark.read_text() == "run "
    path = out / f"{file_name(plan)}.jsonl"
    assert rows_of(path)[0]["metadata"]["image_tokens_entering"] == [144] * 3 + [16] * 9
    monkeypatch.setattr(predict, "generate", None)
    assert ask(out, plan=plan) == 0


def test_answers_of_an_edited_method_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    user_method.write(Path())
    plan, out = "./mine.py:Mine:keep=4", tmp_path / "out"
    assert ask(out, plan=plan) == 0
    path = out / f"{file_name(plan)}.jsonl"
    before = texts_of(path)
    user_method.write(Path(), user_method.LAST)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(predict, "generate", None)  # before any question of any plan is asked
        argv = ["--out", str(out), "--limit", "6", "--prune", "random:keep=3", plan]
        assert run.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for words in (plan, "mine.py", "edited", "another --out", f"delete {path.name} and "):
        assert words in error
    assert texts_of(path) == before
    for name in re.search("delete (.*) and (.*)\n", error).groups():  # type: ignore[union-attr]
        (out / name).unlink()
    assert ask(out, plan=plan) == 0
    assert texts_of(path) != before


def test_answers_without_a_record_of_the_methods_content_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = user_method.write(tmp_path), tmp_path / "out"
    assert ask(out, plan=plan, limit=1) == 0
    path = out / f"{file_name(plan)}.json"
    found = json.loads(path.read_text())
    del found["run"]["method_files"]
    path.write_text(json.dumps(found))
    assert ask(out, plan=plan, limit=1) == 2
    assert "mine.py" in capsys.readouterr().err


def test_answers_of_plain_plans_from_before_there_was_such_a_record_go_on(tmp_path: Path) -> None:
    assert ask(tmp_path, limit=1) == 0
    path = tmp_path / f"{file_name(PLAN)}.json"
    found = json.loads(path.read_text())
    del found["run"]["method_files"]
    path.write_text(json.dumps(found))
    assert ask(tmp_path, limit=2) == 0


# ---------------------------------------------------------------- summary.md


def plans_in(text: str) -> list[str]:
    table = text.split("\n\n")[1]
    return re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)


def test_the_summary_keeps_the_plans_of_earlier_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["fastv:k=3,keep=16", "none"]
    assert run.main(["--limit", "4", "--out", str(tmp_path), "--prune", *first]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert ask(tmp_path, plan="divprune:keep=8", limit=4) == 0
    text = (tmp_path / "summary.md").read_text()
    assert plans_in(text) == ["none", "fastv:k=3,keep=16", "divprune:keep=8"]
    assert text.splitlines()[4:6] == rows[1::-1]  # every figure as it was
    assert "not in this table" not in text
    assert capsys.readouterr().out == text
    titles = re.findall(r"^.* protocol: accuracy .*$", text, re.MULTILINE)
    assert len(titles) == 3


@pytest.mark.parametrize(("more", "reason"), [
    (["--limit", "5"], "it was asked with questions=4 ("),
    (["--seed", "3"], "it was asked with seed=0, not 3"),
    (["--quantize", "int8"], "it was asked with quantize=None, not int8"),
    (["--batch", "2"], "it was asked with batch=1, not 2"),
])  # fmt: skip
def test_results_of_other_questions_or_settings_are_named_and_not_in_the_table(
    more: list[str], reason: str, tmp_path: Path
) -> None:
    assert ask(tmp_path, limit=4) == 0
    argv = ["--limit", "4", "--out", str(tmp_path), "--prune", "divprune:keep=8", *more]
    assert run.main(argv) == 0
    text = (tmp_path / "summary.md").read_text()
    assert plans_in(text) == ["divprune:keep=8"]
    assert f"`{PLAN}` is not in this table: {reason}" in text


def test_other_questions_of_the_same_number_are_not_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from eval import bench

    assert ask(tmp_path, limit=2) == 0
    asked = bench.read_questions

    def others(*args: Any) -> Any:
        return [replace(item, text=f"{item.text} Look closely.") for item in asked(*args)]

    monkeypatch.setattr(bench, "read_questions", others)
    assert ask(tmp_path, plan="divprune:keep=8", limit=2) == 0
    text = (tmp_path / "summary.md").read_text()
    assert plans_in(text) == ["divprune:keep=8"]
    assert f"`{PLAN}` is not in this table: it was asked with questions=2 (" in text


def test_a_table_without_plans_that_were_interrupted_or_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, mark = user_method.write_mark(tmp_path)
    plan, out = f"{method}:keep=4", tmp_path / "out"
    assert ask(out, plan=plan, limit=2) == 0
    assert ask(out, plan="random:keep=4", limit=2) == 0
    text = (out / "summary.md").read_text()
    assert plans_in(text) == [plan, "random:keep=4"]
    assert re.search(r"`: .*mine\.py with sha256 [0-9a-f]{12}\n", text)

    path = out / f"{file_name('random:keep=4')}.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in found.items() if k not in ("score", "costs")}))
    (out / "other.json").write_text("[1]")
    user_method.write(tmp_path, f"open({str(mark)!r}, 'a').write('read back ')")
    assert ask(out, plan="none", limit=2) == 0
    text = (out / "summary.md").read_text()
    assert plans_in(text) == ["none"]
    assert "`random:keep=4` is not in this table: not all of its questions are answered" in text
    edited = f"`{plan}` is not in this table: {tmp_path / 'mine.py'} was edited since"
    assert edited in text
    assert mark.read_text() == "run "  # what is read back never runs


# ---------------------------------------------------------------- eval.score


@pytest.mark.parametrize("inner", [5, [5], {"a": 5}, None, "x"])
def test_a_question_file_with_values_of_a_wrong_kind(
    inner: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, told = tmp_path / "q.json", tmp_path / "p.jsonl"
    path.write_text(json.dumps([{"id": "1", "conversations": inner}]))
    told.write_text('{"question_id": "1", "text": "A"}\n')
    argv = ["--task", "scienceqa", "--questions", str(path), "--predictions", str(told)]
    assert score.main(argv) == 2
    assert "q.json" in refusal(capsys)


def test_score_of_our_own_file(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--task", "demo", "--limit", "12", "--predictions", str(whole)]
    assert score.main(argv) == 0
    alone = json.loads(whole.with_suffix(".json").read_text())["score"]
    printed = capsys.readouterr().out
    assert alone["figure"] in printed
    assert "unparsed" in printed
    assert score.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == alone


def test_predictions_are_matched_by_id_and_not_by_order(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = whole.read_text().splitlines(keepends=True)
    path = tmp_path / "shuffled.jsonl"
    strange = json.dumps({"question_id": "x9", "text": "8"}) + "\n"
    path.write_text("".join([*reversed(lines[1:]), strange, lines[3]]))
    argv = ["--task", "demo", "--limit", "12", "--predictions", str(path), "--json"]
    assert score.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["missing"], found["unknown"], found["duplicates"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("{\n", "line 1"),
        ('{"question_id": 1}\n', "no text"),
        ('{"text": "a"}\n', "no id"),
        ('{"question_id": "zz", "text": "a"}\n', "none of the 1 predictions"),
        ('{"question_id": 1, "text": {"a": 1}}\n', "dict"),
    ],
)
def test_score_names_what_is_wrong_in_a_file(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    assert score.main(["--task", "demo", "--limit", "3", "--predictions", str(path)]) == 2
    assert words in refusal(capsys)
