"""Every program of minillava, eval and weights: one-line errors and exit codes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import refusal

from eval import demo, fit, lmms, published, rivals
from minillava.app.command import run_command
from weights import download, quantise

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "minillava.app.cli",
    "eval.check",
    "eval.demo",
    "eval.fit",
    "eval.latency",
    "eval.published",
    "eval.rivals",
    "eval.run",
    "eval.score",
    "eval.experiments.ablation",
    "eval.experiments.aokvqa",
    "eval.experiments.kv_cache",
    "eval.experiments.nine",
    "eval.experiments.scienceqa",
    "eval.experiments.simignore",
    "weights.convert",
    "weights.download",
    "weights.quantise",
    "weights.train_demo",
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
    ("eval.rivals", "--dtype int3", "'int3'"),
    ("eval.rivals", "--gguf a.gguf", "--llama-bench and --gguf belong together"),
    ("eval.rivals", "--llama-bench no-program --gguf a", "--llama-bench no-program is no program"),
    ("eval.rivals", f"--llama-bench {sys.executable} --gguf no.gguf", "no file --gguf no.gguf"),
    ("eval.demo", "--questions 0", "--questions: '0' must be a whole number, 1 or more"),
    ("eval.demo", "--seed -1", "--seed: '-1' must be a whole number, 0 or more"),
    ("eval.demo", "--kinds when", "'when'"),
    ("eval.demo", "fastv:k=two", "k=two: must be a whole number"),
    ("eval.demo", "--model no/such/folder", "no folder 'no/such/folder'"),
    ("eval.fit", "vtw --number 0", "--number"),
    ("eval.fit", "vtw --threshold low", "'low' is not a number"),
    ("eval.fit", "vtw --number 1 --first 8", "--first 8, but the model has 8 layers"),
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
    ("weights.train_demo", "--workers 0", "--workers"),
    ("weights.train_demo", "--stage last", "'last'"),
]


@pytest.mark.parametrize(("command", "words", "message"), BAD)
def test_bad_input_is_one_line(
    command: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_of(command)(words.split()) == 2
    assert message in refusal(capsys)


# ---------------------------------------------------------------- errors before the work


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any, **options: Any) -> Any:
        raise AssertionError("the work began before the error")

    for module, name in ((demo, "measure"), (rivals, "transformers_times"), (fit, "divergences")):
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
    assert "x.json cannot be written; give another name" in refusal(capsys)


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


@pytest.mark.parametrize("prints", ["", "[]", "[1, 2]", '[{"avg_ns": 1}, {"avg_ns": 1}]'])
def test_unexpected_output_of_llama_bench_is_refused(prints: str, tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    bench.write_text(f"#!/bin/sh\ncat <<'X'\n{prints}\nX\n")
    bench.chmod(0o755)
    with pytest.raises(ValueError, match="printed something else than its results as JSON"):
        rivals.llama_cpp_times(str(bench), "x.gguf", 620, 1)


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
    (published, "load", ""),
    (demo, "load", ""),
    (rivals, "transformers_times", ""),
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
        "models/__init__.py": """
class MODEL_REGISTRY_V2:
    register_manifest = print
    def __new__(cls): ...
MODEL_REGISTRY_V2.register_manifest = staticmethod(lambda manifest: None)
""",
        "models/registry_v2.py": "def ModelManifest(name, simple_class_path): ...\n",
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
