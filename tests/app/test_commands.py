"""Every program of minillava, eval and weights: one-line errors and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import refusal

from eval import demo, fit, lmms, published, rivals
from minillava.app.command import (
    CommandParser,
    parse_float,
    parse_int,
    parse_non_negative_int,
    parse_positive_int,
    quiet_decoders,
    run_command,
)
from weights import download, quantise
from weights.files import _open_atomically as open_atomically

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
COMMANDS = (
    "minillava.app.cli",
    "eval.analyse",
    "eval.attention",
    "eval.check",
    "eval.choose",
    "eval.compare.__main__",
    "eval.conditions",
    "eval.demo",
    "eval.explore.__main__",
    "eval.fit",
    "eval.forms",
    "eval.latency",
    "eval.parity",
    "eval.published",
    "eval.rivals",
    "eval.run",
    "eval.score",
    "eval.smallest",
    "eval.experiments.ablation",
    "eval.experiments.aokvqa",
    "eval.experiments.kv_cache",
    "eval.experiments.nine",
    "eval.experiments.oracle",
    "eval.experiments.scienceqa",
    "eval.experiments.simignore",
    "weights.convert",
    "weights.download",
    "weights.quantise",
    "weights.train_demo",
    "weights.train_text",
)


def main_of(name: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = importlib.import_module(name).main
    return main


def test_every_program_is_tested() -> None:
    """Each module that defines main() is in the list, or has tests elsewhere."""
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("eval", "weights")
        for path in (ROOT / folder).rglob("*.py")
        if "def main(" in path.read_text("utf-8")
    }
    assert found - {*COMMANDS} == {"eval.lmms"}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of(command)(["--nonsense"]) == 2
    refusal(capsys)


@pytest.mark.parametrize("command", [*COMMANDS, "eval.lmms"])
def test_help_ends_with_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "eval.lmms":
        if importlib.util.find_spec("lmms_eval") is not None:
            pytest.skip("lmms-eval prints its own help after ours")
        assert lmms.main(["--help"]) == 0
    else:
        with pytest.raises(SystemExit) as end:
            main_of(command)(["--help"])
        assert end.value.code == 0
    out, err = capsys.readouterr()
    assert "python -m" in out
    assert err == ""


BAD = [
    ("eval.latency", "--form foo", "'foo'"),
    ("eval.latency", "--repeats 0", "--repeats: '0' must be a whole number, 1 or more"),
    ("eval.latency", "--new-tokens -1", "--new-tokens"),
    ("eval.latency", "--text-tokens many", "'many' must be"),
    ("eval.latency", "--device gpu", "device='gpu', but must be cpu"),
    ("eval.latency", "--layers 2", "--layers 2 is of --shape; give --shape"),
    ("eval.latency", "--shape 7b --model x", "not allowed with"),
    ("eval.latency", "--shape 70b", "'70b'"),
    ("eval.latency", "--prune fastvv", "'fastvv'"),
    ("eval.latency", "--model no/such/folder", "no folder 'no/such/folder'"),
    ("eval.rivals", "--tokens -3", "--tokens: '-3' must be a whole number, 1 or more"),
    ("eval.rivals", "--repeats 0", "--repeats"),
    ("eval.rivals", "--tokens 576", "--tokens 576 must be more than the image's 576"),
    ("eval.rivals", "--ours int3", "'int3'"),
    ("eval.rivals", "--peers llama.cpp-q3", "'llama.cpp-q3'"),
    ("eval.rivals", "--layers 25", "--layers 25 must be at most 24"),
    ("eval.rivals", "--prune fastvv", "'fastvv'"),
    ("eval.rivals", "--prune pyramiddrop", "--prune pyramiddrop prunes at layer 24"),
    ("eval.compare.__main__", "--out a.png", "--prune"),
    ("eval.explore.__main__", "--port 65536", "--port 65536 must be from 0 to 65535"),
    ("eval.explore.__main__", "--port -1", "--port: '-1' must be a whole number, 0 or more"),
    ("eval.compare.__main__", "--prune fastv --out a.gif", "ends in .png, .svg or .html"),
    ("eval.compare.__main__", "--prune fastv --out no/such/a.svg", "there is no folder no/such"),
    (
        "eval.compare.__main__",
        "--prune fastv --out a.png --budgets 0",
        "'0' must be a whole number",
    ),
    ("eval.compare.__main__", "--prune fastv --out a.png --max-new-tokens 0", "'0' must be"),
    ("eval.compare.__main__", "--prune fastv --out a.png --prompt Why?", "--image FILE"),
    ("eval.compare.__main__", "--prune fastv --out a.png --image a.png", "add --prompt"),
    (
        "eval.compare.__main__",
        "--prune x --out a.png --image no.png --prompt Why?",
        "no file no.png",
    ),
    ("eval.conditions", "--model no/such --out a", "no folder 'no/such'"),
    ("eval.conditions", "--only fastv --out a", "'fastv'"),
    ("eval.demo", "--questions 0", "--questions: '0' must be a whole number, 1 or more"),
    ("eval.demo", "--seed -1", "--seed: '-1' must be a whole number, 0 or more"),
    ("eval.demo", "--kinds when", "'when'"),
    ("eval.demo", "fastv:k=two", "k=two: must be a whole number"),
    ("eval.demo", "--model no/such/folder", "no folder 'no/such/folder'"),
    ("eval.fit", "vtw --number 0", "--number"),
    ("eval.fit", "vtw --threshold low", "'low' is not a number"),
    ("eval.fit", "vtw --number 1 --first 12", "--first 12, but the model has 12 layers"),
    ("eval.fit", "fitprune --save 100", "--save 100 must be a percentage from 1 to 99"),
    ("eval.fit", "llava", "'llava'"),
    ("eval.fit", "vtw --samples no.jsonl", "no.jsonl"),
    ("eval.published", "--task sudoku", "'sudoku'"),
    ("weights.convert", "only-one", "DST"),
    ("weights.convert", "no/folder out", "there is no folder no/folder"),
    ("weights.download", "a b", "unrecognized arguments: b"),
    ("weights.download", "nonsense", "nonsense"),
    ("weights.quantise", "a b", "--bits"),
    ("weights.quantise", "a b --bits 3", "3"),
    ("weights.quantise", "no/such/folder b --bits 4", "no folder 'no/such/folder'"),
    ("weights.train_demo", "--stage reader", "--runs"),
    ("weights.train_demo", "--runs r --export last", "'last'"),
    ("weights.train_demo", "--runs r --export captions", "captions.pt is not there; train"),
    ("weights.train_demo", "--runs r --stage last", "'last'"),
    ("weights.train_demo", "--runs r --without sight", "--without sight: the losses are answers"),
    ("weights.train_demo", "--runs r --workers 0", "--workers: '0' must be a whole number"),
    ("weights.train_text", "a b", "unrecognized arguments: b"),
]


@pytest.mark.parametrize(("command", "words", "message"), BAD)
def test_bad_input_is_one_line(
    command: str,
    words: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # some check first that their folder can be written
    assert main_of(command)(words.split()) == 2
    assert message in refusal(capsys)


# ---------------------------------------------------------------- errors before the work


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any, **options: Any) -> Any:
        raise AssertionError("the work began before the error")

    for module, name in ((demo, "measure"), (fit, "divergences")):
        monkeypatch.setattr(module, name, work)


@pytest.mark.usefixtures("no_work")
def test_an_unwritable_path_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken.md").mkdir()
    for out in ("file/out", "taken"):
        assert demo.main(["--questions", "1", "--out", str(tmp_path / out)]) == 2
        refusal(capsys)
    monkeypatch.setattr(demo.os, "access", lambda path, mode: False)  # root may write anywhere
    assert demo.main(["--questions", "1", "--out", str(tmp_path / "x")]) == 2
    assert f"{tmp_path} is not writable; choose another folder" in refusal(capsys)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", ["eval.demo --questions 1", "eval.latency --prune"])
@pytest.mark.parametrize("plan", ["fastv:k=90,r=0.5", "divprune:keep=5000"])
def test_plans_beyond_the_model_are_refused_before_the_work(
    command: str, plan: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.latency.generate", None)
    name, *words = command.split()
    assert main_of(name)([*words, "random:keep=3", plan]) == 2
    assert plan.split(":")[0] in capsys.readouterr().err.splitlines()[-1]


def test_bad_samples_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "q.jsonl"
    for content, message in {
        "": "has no samples",
        '\n{"image": "a.png"}\n': "line 2: .*must be",
        "[1]": "line 1: '\\[1\\]' must be",
        "{": "line 1",
        '{"image": "a.png", "text": "?"}': "a.png",
    }.items():
        file.write_text(content)
        assert fit.main(["vtw", "--samples", str(file)]) == 2
        assert re.search(message, refusal(capsys))


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(("error", "code"), [
    (KeyboardInterrupt(), 130),
    (BrokenPipeError(), 141),
    (OSError(28, "No space left on device", "out/x"), 2),
    (MemoryError(), 2),
])  # fmt: skip
@pytest.mark.parametrize(("module", "name", "words"), [
    (quantise, "quantise", f"{ROOT} out --bits 8"),
    (download, "fetch_any", "some/model"),
    (published, "read_figures", ""),
    (demo, "load", ""),
    (rivals, "read_plans", ""),
])  # fmt: skip
def test_exit_codes(
    module: types.ModuleType, name: str, words: str, error: BaseException, code: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(module, name, fail)
    assert module.main(words.split()) == code
    if code == 2:
        refusal(capsys)
    else:
        assert capsys.readouterr() == ("", "")


def test_faults_of_the_program_are_raised() -> None:
    def fault() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        run_command(fault)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_and_removes_what_is_not_finished(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        with open_atomically(tmp_path / "out") as file:
            file.write(b"half")
            assert (tmp_path / "out.part").is_file()
            signal.raise_signal(number)
            raise AssertionError("went on")

    assert run_command(write) == code
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a parent may have asked
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGTERM)) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_runs_in_a_thread_too() -> None:
    with ThreadPoolExecutor() as pool:  # where no signal can be handled
        assert pool.submit(run_command, list).result() == 0


# ---------------------------------------------------------------- options


def parse(words: Sequence[str], **options: Any) -> Any:
    parser = CommandParser()
    parser.add_argument("--x", **options)
    return parser.parse_args(words).x


@pytest.mark.parametrize("text", ["--", "-x", "", "--x=--", " ", "=", "--x"])
def test_the_text_of_an_option_is_taken_as_typed(text: str) -> None:
    assert parse([f"--x={text}"]) == text
    assert parse([f"--x={text}"], nargs="+", action="extend") == [text]
    assert parse([f"--x={text}", "--x=b"], action="append") == [text, "b"]


def test_dashes_are_no_number_and_no_choice() -> None:
    with pytest.raises(ValueError, match="'--' is not a whole number"):
        parse(["--x=--"], type=parse_int)
    with pytest.raises(ValueError, match="invalid choice: '--'"):
        parse(["--x=--"], choices=["a"])


@pytest.mark.parametrize(
    "text", ["٣", "²", "1_000", "１２", "1.0", "1e3", "0x10", " 3", "3 ", "", "+", "9" * 5000, "½"]
)
def test_whole_numbers_are_written_with_the_digits_0_to_9(text: str) -> None:
    for kind in (parse_int, parse_positive_int, parse_non_negative_int):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            kind(text)


@pytest.mark.parametrize("text", ["٣", "1_000", "１２", "", "1,5", "0x1"])
def test_numbers_are_written_with_the_digits_0_to_9(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
        parse_float(text)


def test_numbers() -> None:
    assert [parse_int(text) for text in ("-3", "+3", "007", "9" * 31)] == [-3, 3, 7, 10**31 - 1]
    assert (parse_positive_int("2"), parse_non_negative_int("0")) == (2, 0)
    assert (parse_float("1e-320"), parse_float("-.5"), parse_float("7")) == (1e-320, -0.5, 7.0)


# ---------------------------------------------------------------- error lines and streams


def test_an_error_line_has_at_most_2000_characters(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError(f"begins {'é' * 5000}\n; do this")

    assert run_command(fail) == 2
    line = refusal(capsys)
    assert len(line.rstrip("\n")) == 2000
    assert line.startswith("error: begins é")
    assert line.rstrip().endswith("é ; do this")
    assert line.count("…") == 1


def test_closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None for a stream that was closed when it started."""
    monkeypatch.setattr(sys, "stderr", None)

    def act() -> None:
        print("to nobody", file=sys.stderr)
        raise ValueError("told to nobody")

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_command(lambda: print("answer")) == 0
        assert run_command(act) == 2
    assert out.getvalue() == "answer\n"
    assert sys.stderr is None

    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    monkeypatch.setattr(sys, "stdout", None)
    assert run_command(lambda: None) == 2
    assert told.getvalue().startswith("error: stdout is closed")


def test_what_c_libraries_print_is_discarded(capfd: pytest.CaptureFixture[str]) -> None:
    def decode() -> None:
        with quiet_decoders():
            os.write(2, b"noise of a library")
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        decode()
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


# program, redirections -> exit code, stdout, beginning of stderr
FULL = "error: [Errno 28] No space left on device"
STREAMS = [
    ("{ask}", ">&-", 2, "", "error: stdout is closed"),
    ("{ask}", "2>&-", 0, "{answer}", ""),
    ("{ask}", "<&-", 0, "{answer}", ""),
    ("{ask}", "<&- >&- 2>&-", 2, "", ""),
    ("{ask}", ">/dev/full", 2, "", FULL),
    ("{ask}", "2>/dev/full", 0, "{answer}", ""),
    ("{ask} --json", ">/dev/full", 2, "", FULL),
    ("{ask} --chat", "<&-", 0, "{answer}", ""),
    ("{ask} --prune no", "2>&-", 2, "", ""),
    ("{ask} --prune no", "2>/dev/full", 2, "", ""),
    ("--help", ">/dev/full", 2, "", FULL),
    ("--help", ">&-", 2, "", "error: stdout is closed"),
    ("--list-methods", ">/dev/full", 2, "", FULL),
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize(("words", "streams", "code", "out", "err"), STREAMS)
def test_closed_and_full_streams_of_a_process(
    words: str, streams: str, code: int, out: str, err: str
) -> None:
    def ask(words: str, streams: str) -> Any:
        asks = f"--model {TINY} --prompt Hi --max-new-tokens 5"
        command = f"{sys.executable} -m minillava.generate {words.format(ask=asks)} {streams}"
        return subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)

    answer = ask("{ask}", "").stdout if out else ""
    done = ask(words, streams)
    assert (done.returncode, done.stdout) == (code, out.format(answer=answer))
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") == bool(err)


ALLOCATE_AND_FREE = """
import resource, torch
from minillava.app.command import run_command
def act():
    for turn in range(30):
        if turn == 20:  # before, the allocator is still adapting
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        a, b = torch.ones(10_000_000), torch.ones(10_000_000)
        del a, b
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_a_program_keeps_memory_that_its_layers_freed() -> None:
    def count_page_faults(call: str) -> int:
        code = ALLOCATE_AND_FREE + call
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        return int(done.stdout)

    assert 10 * count_page_faults("run_command(act)") < count_page_faults("act()")


@pytest.mark.parametrize(
    "words",
    [
        "eval.published",
        pytest.param("eval.published --task mmmu --method fastv", marks=pytest.mark.slow),
        pytest.param("eval.run --help", marks=pytest.mark.slow),
    ],
)
def test_a_process_ends_quietly_when_its_output_is_closed(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", *words.split()]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# ---------------------------------------------------------------- lmms-eval


def test_errors_of_lmms_eval_are_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for lmms-eval that parses its command line with argparse."""
    if importlib.util.find_spec("lmms_eval") is not None:
        pytest.skip("lmms-eval is installed: see test_lmms.py")
    for file, text in {
        "__init__.py": "",
        "__main__.py": "def cli_evaluate_single(args):\n    raise SystemError('no')\n",
        "cli/__init__.py": "",
        "cli/dispatch.py": """
import argparse
import lmms_eval.__main__ as own
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks")
    parser.add_argument("--verbosity")
    own.cli_evaluate_single(parser.parse_args())
""",
    }.items():
        path = tmp_path / "lmms_eval" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        for words, message in {
            "--no_such_flag": "unrecognized arguments: --no_such_flag",
            "--verbosity INFO": "--tasks is missing",
            "--tasks pope": "SystemError: no",
        }.items():
            assert lmms.main(words.split()) == 2
            assert message in refusal(capsys)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "line",
    [
        "eval.run --limit 1 --out=",
        "eval.run --limit 1 --out OUT --task gqa --data=",
        "eval.demo --out=",
        "eval.forms --out=",
        "eval.fit vtw --samples=",
        "eval.score --task demo --predictions=",
        "minillava.app.cli --prompt Hi --overlay=",
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = line.split()
    assert main_of(name)(options) == 2
    assert "'' is empty, but must be a path" in refusal(capsys)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["weights.quantise", "weights.convert"])
@pytest.mark.parametrize("paths", [("", "to"), ("from", "")])
def test_an_empty_folder_is_refused(
    name: str, paths: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_of(name)([*paths, *(["--bits", "8"] if name == "weights.quantise" else [])]) == 2
    refusal(capsys)


@pytest.mark.parametrize("text", ["1_0", "\u0663"])
def test_a_seed_has_ascii_digits_alone(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("eval.run")(["--task", "gqa", "--out", "never", f"--seed={text}"]) == 2
    assert "is not a whole number" in refusal(capsys)


@pytest.mark.parametrize(("torchrun", "printed"), [(False, "at exit\n"), (True, "")])
@pytest.mark.parametrize("code", [0, 2])
def test_a_process_of_torchrun_ends_at_once(torchrun: bool, printed: str, code: int) -> None:
    """What is still there when Python ends cannot abort it then, and its exit code is kept."""
    program = (
        "import atexit; from minillava.app.command import end_program\n"
        f"atexit.register(print, 'at exit'); end_program({code})"
    )
    env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"TORCHELASTIC_RUN_ID": "1"} if torchrun else {})
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, printed, "")
