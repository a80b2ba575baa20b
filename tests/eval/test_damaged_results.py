"""Damaged results of eval.run: one line names file and line, and the repaired folder goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import refusal

from eval import run
from eval.plans import file_name
from eval.store import AnswerFile
from eval.typed import find_type_error, parse_json

PLAN = "fastv:k=3,keep=16"
NAME = file_name(PLAN)
LIMIT = 4


def ask(out: Path, plan: str = PLAN) -> int:
    return run.main(["--out", str(out), "--limit", str(LIMIT), "--prune", plan])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all answers under PLAN."""
    out = tmp_path_factory.mktemp("finished")
    assert ask(out) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _limit_of_seconds() -> Iterator[None]:
    """Interrupt a test that waits for a pipe."""

    def interrupt(*_: object) -> None:
        raise AssertionError("this test waits for something")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def answers(out: Path) -> dict[int, str]:
    lines = (out / f"{NAME}.jsonl").read_bytes().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert len({row["metadata"]["number"] for row in rows}) == len(rows)
    return {row["metadata"]["number"]: row["text"] for row in rows}


def change_line(path: Path, i: int, change: Callable[[bytes], bytes]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[i] = change(lines[i].rstrip(b"\n")) + b"\n"
    path.write_bytes(b"".join(lines))


def in_row(**changes: Any) -> Callable[[bytes], bytes]:
    """Change entries of a row; None removes one."""
    return lambda line: _changed(json.loads(line), changes)


def in_metadata(**changes: Any) -> Callable[[bytes], bytes]:
    def change(line: bytes) -> bytes:
        row = json.loads(line)
        row["metadata"] = json.loads(_changed(row["metadata"], changes))
        return json.dumps(row).encode()

    return change


def _changed(entries: dict[str, Any], changes: dict[str, Any]) -> bytes:
    kept = {k: v for k, v in {**entries, **changes}.items() if k not in changes or v != "gone"}
    return json.dumps(kept).encode()


LINES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda line: line.replace(b'"number": 1', b'"number": 1e400'), "1e400 is too large"),
    (lambda line: line.replace(b'"number": 1', b'"number": NaN'), "it has NaN"),
    (lambda line: b"[" * 100_000, "nested too deeply"),
    (lambda line: b'{"a": ' * 100_000, "nested too deeply"),
    (lambda line: b"", "not JSON"),
    (lambda line: b"null", "it is None, but must be Row"),
    (lambda line: b"[1]", r"it is \[1\], but must be Row"),
    (lambda line: line[:50], "not JSON"),
    (lambda line: b"\xff\x80" + line, "not UTF-8 text"),
    (lambda line: b"\0" * 40, "not JSON"),
    (lambda line: b"9" * 5000, "4300"),
    (in_row(question_id="gone"), "it has no question_id"),
    (in_row(question_id=[1]), r"question_id is \[1\], but must be str | int"),
    (in_row(question_id=1.5), "question_id is 1.5"),
    (in_row(text=None), "text is None, but must be str"),
    (in_row(text=5), "text is 5"),
    (in_row(metadata="gone"), "it has no metadata"),
    (in_row(metadata=[]), r"metadata is \[\]"),
    (in_metadata(number="gone"), "metadata has no number"),
    (in_metadata(number="1"), "metadata.number is '1', but must be int"),
    (in_metadata(number=True), "metadata.number is True"),
    (in_metadata(number=-1), "metadata has -1, but counts are from 0"),
    (in_metadata(cache_bytes=10**200), "metadata has 1000+, but counts are from 0"),
    (in_metadata(plan="none"), "metadata.plan is 'none'"),
    (in_metadata(prompt_tokens=0), "metadata.prompt_tokens"),
    (in_metadata(tokens_entering=5), "metadata.tokens_entering is 5"),
    (in_metadata(tokens_entering=[1, "x"]), r"metadata.tokens_entering\[1\] is 'x'"),
    (in_metadata(image_tokens_entering=[]), "counts of other than 12 layers"),
    (in_metadata(prefill="gone"), "metadata has no prefill"),
    (in_metadata(prefill=[0.1]), r"metadata.prefill is \[0.1\]"),
    (in_metadata(per_token="0.1"), r"metadata.per_token is '0.1', but must be float \| None"),
    (in_metadata(prefill=10**400), "metadata.prefill is 1000"),
]


@pytest.mark.parametrize(("change", "reason"), LINES, ids=[reason[:40] for _, reason in LINES])
def test_a_damaged_line_is_named(
    change: Callable[[bytes], bytes], reason: str, finished: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"{NAME}.jsonl"
    shutil.copy(finished / path.name, path)
    change_line(path, 1, change)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=reason) as error:
        AnswerFile(path, PLAN, layers=12).merge()
    said = str(error.value)
    assert said.startswith(f"{path}, line 2 is not an answer of eval.run under the plan {PLAN}: ")
    assert "delete the line" in said
    assert path.read_bytes() == before


@pytest.mark.parametrize("i", [0, 11, 20])
def test_the_question_of_a_deleted_line_is_asked_again(
    i: int, finished: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / f"{NAME}.jsonl"
    change_line(path, 1, LINES[i][0])
    assert ask(out) == 2
    assert f"{path}, line 2 is not" in refusal(capsys)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:1] + lines[2:]))
    assert ask(out) == 0
    assert list(answers(out).items()) == list(answers(finished).items())  # in order, too


def test_an_incomplete_last_line_stays_while_another_line_is_damaged(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / f"{NAME}.jsonl"
    path.write_bytes(b"x\n" + path.read_bytes() + b'{"ques')
    before = path.read_bytes()
    assert ask(out) == 2
    assert "line 1 is not" in refusal(capsys)
    assert path.read_bytes() == before


def test_a_doubled_line_is_removed(finished: Path, out: Path) -> None:
    path = out / f"{NAME}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[2]]))
    assert ask(out) == 0
    assert answers(out) == answers(finished)


@pytest.mark.parametrize("tail", [b'{"question', b"\0\0\0", b"{}"])
def test_an_incomplete_last_line_is_asked_again(tail: bytes, finished: Path, out: Path) -> None:
    path = out / f"{NAME}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + tail)
    assert ask(out) == 0
    assert answers(out) == answers(finished)


def test_a_file_of_answers_that_is_empty_or_missing_is_filled(finished: Path, out: Path) -> None:
    path = out / f"{NAME}.jsonl"
    path.write_bytes(b"")
    assert ask(out) == 0
    assert answers(out) == answers(finished)
    path.unlink()
    assert ask(out) == 0
    assert answers(out) == answers(finished)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\x00", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"null", "it is None"),
        (b"{}", "it has no run"),
        (b'{"run": []}', "run is [], but must be"),
        (b'{"run": null}', "run is None, but must be"),
        (b'{"run": "x"}', "run is 'x', but must be"),
        (b'{"run": [["task", "demo"]]}', "run is [["),
        (b'{"run": {"seed": NaN}}', "it has NaN"),
        (b'{"run": {}}', "was begun with task=None, not 'demo'"),
    ],
)
def test_damaged_settings_are_named_and_the_restored_folder_goes_on(
    content: bytes, reason: str, finished: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / f"{NAME}.json"
    path.write_bytes(content)
    assert ask(out) == 2
    said = refusal(capsys)
    assert str(path.with_suffix("")) in said
    assert reason in said
    assert "another --out" in said
    if reason == "it has no run":  # one for all
        shutil.copy(finished / path.name, path)
        assert ask(out) == 0
        assert answers(out) == answers(finished)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (("costs", "fastv_share", "x"), "costs.fastv_share is 'x', but must be float"),
        (("costs", "prefill", {"median": 1}), "costs.prefill"),
        (("costs", "tokens_entering", None), "costs.tokens_entering is None"),
        (("score", "value", "x"), "score.value is 'x'"),
        (("score", "more", []), "score.more is []"),
        (("run", "seed", "x"), "run.seed is 'x'"),
        (("run", "colour", "x"), "run has colour, which is not known"),
    ],
)
def test_a_damaged_result_of_another_plan_is_left_out_of_the_table(
    entries: tuple[str, str, object], reason: str, out: Path
) -> None:
    path = out / f"{NAME}.json"
    found = json.loads(path.read_text())
    found[entries[0]][entries[1]] = entries[2]
    path.write_text(json.dumps(found))
    assert ask(out, plan="none") == 0
    text = (out / "summary.md").read_text()
    assert f"`{PLAN}` is not in this table: its file is damaged" in text
    assert reason in text


def test_an_unreadable_result_of_another_plan_is_named_below_the_table(out: Path) -> None:
    (out / f"{NAME}.json").write_bytes(b"{")
    (out / "other.json").write_bytes(b"{")
    os.mkfifo(out / "pipe.json")
    assert ask(out, plan="none") == 0
    text = (out / "summary.md").read_text()
    assert f"`{NAME}.json` is not in this table: it is not a result of eval.run" in text
    assert "other.json" not in text
    assert "pipe.json" not in text


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize(
    "name",
    [f"{NAME}.jsonl", f"{NAME}.json", f"{NAME}.jsonl.part-0", ".lock", "summary.md"],
)
def test_a_folder_or_pipe_in_place_of_a_file_is_named(
    name: str,
    make: Callable[[Path], None],
    finished: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (out / name).unlink(missing_ok=True)
    make(out / name)
    assert ask(out) == 2
    said = refusal(capsys)
    assert f"{out / name} is a " in said
    assert "remove or rename it" in said
    (out / name).rmdir() if (out / name).is_dir() else (out / name).unlink()
    if (finished / name).exists():
        shutil.copy(finished / name, out / name)
    assert ask(out) == 0
    assert answers(out) == answers(finished)


def test_a_disk_without_room_is_named_and_the_same_command_goes_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (finished / f"{NAME}.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 // 3, hard))
    try:
        assert ask(tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = refusal(capsys)
    assert f"{tmp_path / NAME}.jsonl cannot be written (File too large)" in said
    assert (tmp_path / f"{NAME}.jsonl").read_bytes().count(b"\n") == 2
    assert ask(tmp_path) == 0
    assert answers(tmp_path) == answers(finished)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_only_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert ask(tmp_path) == 2
    assert f"{tmp_path}" in refusal(capsys)


def test_a_file_in_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert ask(tmp_path / "out") == 2
    assert f"{tmp_path / 'out'} cannot be written" in refusal(capsys)


# ---------------------------------------------------------------- types


def test_types_of_values() -> None:
    assert find_type_error(3, float) is None
    assert find_type_error(float("nan"), float) == "it is nan, but must be float"
    assert find_type_error(10**400, float) is not None
    assert find_type_error(True, int) == "it is True, but must be int"
    assert find_type_error(None, int | None) is None
    assert find_type_error({"a": 1}, dict[str, str], "x") == "x.a is 1, but must be str"
    assert find_type_error([1], tuple[int, ...]) is None
    assert find_type_error("x" * 99, int) == f"it is '{'x' * 59}…, but must be int"


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", "1e400", "[" * 10**5, "", "1 2", b"\xff"])
def test_what_is_not_json(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="it"):
        parse_json(text)
