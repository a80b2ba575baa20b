"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from minillava import load, pruning
from minillava.app import chat as session
from minillava.app import cli
from minillava.app.command import one_voice
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.pruning import METHODS, PRESETS, Preset, option_fields, parse_plan

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
CHOICES = (
    "Which?\nOptions: (A) red (B) blue\n"
    "Answer with the option's letter from the given choices directly."
)


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command line with the tiny model, ten tokens at most."""

    def run(*args: object, model: Path | None = TINY) -> Said:
        flags = [] if model is None else ["--model", model, "--max-new-tokens", 10]
        code = cli.main([str(arg) for arg in (*flags, *args)])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise = torch.randint(0, 256, (40 * 70 * 3,), generator=torch.manual_seed(0))
    Image.frombytes("RGB", (70, 40), bytes(noise.tolist())).save(path)
    return path


def record(said: Said) -> dict[str, Any]:
    assert (said.code, said.err, said.out.count("\n")) == (0, "", 1)
    return json.loads(said.out)


def refused(said: Said) -> str:
    """The one line of an error."""
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.endswith("\n")
    assert len(said.err.splitlines()) == 1
    return said.err


# ---------------------------------------------------------------- answers


def test_the_answer_is_what_generate_gives(run: Run, photo: Path) -> None:
    flags = ("--image", photo, "--prompt", "Hi", "--prune", "fastv:k=1,r=0.5")
    plain, said = run(*flags), record(run(*flags, "--json"))

    model, processor = load(TINY)
    batch = processor(["USER: <image>\nHi ASSISTANT:"], [[Image.open(photo)]])
    result = generate(model, batch, parse_plan("fastv:k=1,r=0.5"), max_new_tokens=10)
    assert said["tokens"] == result.tokens[0]
    assert said["text"] == processor.decode(result.tokens[0])
    assert plain == Said(0, said["text"] + "\n", "")
    assert said["report"]["kept"][0]["positions"] == result.report.kept[0].positions
    assert said["report"]["prompt_tokens"] == result.report.prompt_tokens
    assert (said["plan"], said["model"]) == ("fastv:k=1,r=0.5", str(TINY))
    assert (said["tokens_mode"], said["focus"]) == ("hf", None)
    counts = [layer[0] for layer in said["report"]["image_tokens_entering"]]
    assert said["load_seconds"] > 0
    averages = said["average_image_tokens"]
    assert averages["entering"] == pytest.approx(sum(counts) / len(counts))
    assert averages["leaving"] == pytest.approx((sum(counts[1:]) + counts[-1]) / len(counts))


def test_without_arguments_it_asks_the_bundled_question(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(TINY, demo)
    shutil.copy(photo, demo / "example.png")
    (demo / "example.json").write_text('{"question": "Which?"}')
    monkeypatch.setattr(cli, "DEMO", demo)
    bundled = run(model=None)
    asked = run("--image", photo, "--prompt", "Which?", "--max-new-tokens", 256)
    assert bundled == asked
    assert bundled.code == 0
    assert len(bundled.out) > 1

    monkeypatch.setattr(cli, "DEMO", tmp_path / "wheel" / "demo")
    assert "--model" in refused(run(model=None))
    assert "--model" in refused(run("--prompt", "Hi", model=None))


def test_a_raw_prompt_has_no_template(run: Run, photo: Path) -> None:
    whole = ("--image", photo, "--prompt", "USER: <image>\nHi ASSISTANT:", "--raw-prompt")
    assert run(*whole) == run("--image", photo, "--prompt", "Hi")


def test_several_pictures_and_none(run: Run, photo: Path) -> None:
    tokens = [
        record(run(*flags, "--prompt", "Hi", "--json"))["report"]["prompt_tokens"][0]
        for flags in ((), ("--image", photo), ("--image", photo, photo))
    ]
    repeated = record(run("--image", photo, "--image", photo, "--prompt", "Hi", "--json"))
    assert tokens[1] > tokens[0] + 16
    assert tokens[2] > tokens[1] + 16
    assert repeated["report"]["prompt_tokens"] == [tokens[2]]


def test_a_preset_says_how_the_prompt_was_cut_and_focus_can_be_another(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = "simignore:keep=9+fastv:layer=1,keep=4"
    preset = Preset(plan, "here", focus="options", tokens="simignore")
    monkeypatch.setitem(pruning.PRESETS, "small", preset)
    flags = ("--image", photo, "--prompt", CHOICES, "--json", "--prune")
    said = record(run(*flags, "small:released=1"))
    assert (said["tokens_mode"], said["focus"]) == ("simignore", "options")
    assert said["plan"] == "small:released=1"
    said = record(run(*flags, "small", "--focus", "red"))
    assert (said["tokens_mode"], said["focus"]) == ("hf", "red")


def test_the_focus_changes_what_is_kept(run: Run, photo: Path) -> None:
    flags = ("--image", photo, "--prompt", "Hi", "--json", "--prune", "simignore:keep=5")
    focuses = ("a", "dog", "12", "the sky")
    kept = [record(run(*flags, "--focus", f))["report"]["kept"][0]["positions"] for f in focuses]
    assert any(positions != kept[0] for positions in kept)


def test_stop_strings_sampling_and_limits_reach_the_loop(run: Run) -> None:
    flags = ("--prompt", "Hi", "--json")
    text = record(run(*flags))["text"]
    stop = [letter for letter in text if letter.isascii()][1]
    stopped = record(run(*flags, "--stop", stop))
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["report"]["stopped"] == ["stop"]

    hot = (*flags, "--temperature", 5, "--seed")
    assert record(run(*hot, 1))["tokens"] == record(run(*hot, 1))["tokens"]
    assert record(run(*hot, 1))["tokens"] != record(run(*hot, 2))["tokens"]
    assert record(run(*hot, 1, "--top-p", 1e-9))["text"] == text
    assert len(record(run(*flags, "--max-new-tokens", 3))["tokens"]) == 3
    assert record(run(*flags, "--no-cache"))["report"]["cache_lengths"][0] == [0]


def test_methods_are_listed_without_a_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load", None)
    said = run("--list-methods", model=None)
    assert (said.code, said.err) == (0, "")
    words = set(said.out.replace("=", " ").replace(";", " ").replace("|", " ").split())
    blocks = {block.partition(":")[0]: block for block in said.out.split("\n\n")}
    for name, method in METHODS.items():
        assert method.paper.split(",")[0] in blocks[name]
        for option in option_fields(method):
            assert option in blocks[name] or not method.drops_only
    assert set(PRESETS) <= words
    assert "layer|k=2; r=0.5;" in blocks["fastv"]


# ---------------------------------------------------------------- chat


def test_a_chat_goes_on_from_turn_to_turn(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = LLaVA.encode

    def counted(model: LLaVA, pixels: torch.Tensor, plan: Any) -> Any:
        encoded.append(len(pixels))
        return encode(model, pixels, plan)

    monkeypatch.setattr(LLaVA, "encode", counted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("And\n\nwhy now\n"))
    flags = ("--image", photo, "--json", "--prune", "simignore:keep=5")
    said = run(*flags, "--prompt", "Hi", "--chat")
    assert (said.code, said.err, encoded) == (0, "", [1])  # no prompt signs in a pipe
    first, second, third = (json.loads(line) for line in said.out.splitlines())

    whole = f"USER: <image>\nHi ASSISTANT: {first['text']} USER: And ASSISTANT:"
    alone = record(run(*flags, "--prompt", whole, "--raw-prompt"))
    assert second["tokens"] == alone["tokens"]
    assert second["report"]["kept"] == alone["report"]["kept"]
    assert third["report"]["prompt_tokens"] > second["report"]["prompt_tokens"]


def test_a_chat_ends_where_a_pipe_goes_wrong_but_not_at_a_terminal(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "a <image>\nfine\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert "<image>" in refused(run("--image", photo, "--chat"))

    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(session, "_terminal", lambda: True)
    said = run("--image", photo, "--chat")
    assert said.code == 0
    assert said.out == run("--image", photo, "--prompt", "fine").out
    assert said.err.startswith("> error: the question 'a <image>'")
    assert said.err.endswith("\n> > ")


def test_a_chat_beyond_the_models_positions_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 3000 + "\n"))
    said = run("--prompt", "Hi", "--chat")
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert "positions" in said.err
    assert said.err.count("\n") == 1
    assert said.out.count("\n") == 1


# ---------------------------------------------------------------- overlays


def test_an_overlay_is_written_after_the_run(run: Run, photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.png"
    said = run("--image", photo, "--prompt", "Hi", "--prune", "uniform:keep=5", "--overlay", path)
    assert (said.code, said.err) == (0, "")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 336
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.png", "photo.png"]


def test_a_broken_overlay_leaves_what_was_there(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.png"
    path.write_text("old")

    def full(self: Image.Image, target: Path, kind: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    said = run("--image", photo, "--prompt", "Hi", "--overlay", path)
    assert said.code == 2
    assert said.err == "error: [Errno 28] No space left on device\n"
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.png", "photo.png"]


# ---------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--bogus", "--bogus --help"),
        ("--prompt", "--prompt one"),
        ("--mod x", "unrecognized --mod"),
        ("--prompt Hi --seed x", "--seed 'x' whole"),
        ("--prompt Hi --temperature warm", "--temperature 'warm' number"),
        ("--prompt Hi --image-aspect round", "round crop pad"),
        ("--prompt Hi --temperature nan", "temperature nan 0"),
        ("--prompt Hi --temperature -1", "temperature -1 0"),
        ("--prompt Hi --top-p 0", "top_p 0 above"),
        ("--prompt Hi --seed -1", "seed -1 0"),
        ("--prompt Hi --max-new-tokens -1", "max_new_tokens -1 0"),
        ("--prompt Hi --min-new-tokens 11", "min_new_tokens 11 10"),
        ("--prompt Hi --stop=", "stop empty"),
        ("--prompt=", "--prompt '' question"),
        ("--raw-prompt", "--raw-prompt --prompt"),
        ("--raw-prompt --chat --prompt Hi", "--raw-prompt --chat"),
        ("--image {photo}", "{photo} --prompt"),
        ("--prompt a<image>b", "a<image>b leave"),
        ("--prompt a<image>b --raw-prompt", "1 <image> 0"),
        ("--prompt Hi --image {tmp}/none.png", "{tmp}/none.png path"),
        ("--prompt Hi --image {tmp}", "{tmp}"),
        ("--prompt Hi --image ftp://x/y.png", "ftp://x/y.png http"),
        ("--prompt Hi --model {tmp}/none", "{tmp}/none folder org/name"),
        ("--prompt Hi --model {tmp}", "{tmp}"),
        ("--prompt Hi --revision x", "revision 'x' local"),
        ("--prompt Hi --device tpu", "'tpu' cpu cuda"),
        ("--prompt Hi --dtype float8", "'float8' float32 bfloat16"),
        ("--prompt Hi --quantize int3", "'int3' int8"),
        ("--prompt Hi --prune fast", "'fast' fastv"),
        ("--prompt Hi --prune fastv:q=1", "'q' layer"),
        ("--prompt Hi --prune {tmp}/no.py:Mine", "{tmp}/no.py FILE.py:Class"),
        ("--prompt Hi --image {photo} --prune fastv:layer=99", "layer=99 layers"),
        ("--prompt Hi --image {photo} --prune uniform:keep=99", "keep=99 16"),
        ("--prompt Hi --image {photo} --prune simignore:keep=5 --focus=", "'' text"),
        ("--prompt Hi --overlay {tmp}/x.png", "{tmp}/x.png --image"),
        ("--prompt Hi --image {photo} --overlay {tmp}/x.jpg", "{tmp}/x.jpg .png"),
        ("--prompt Hi --image {photo} --overlay {tmp}/no/x.png", "{tmp}/no folder"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, photo: Path, tmp_path: Path, flags: str, words: str
) -> None:
    names = {"photo": photo, "tmp": tmp_path}
    line = refused(run(*flags.format(**names).split()))
    for word in words.format(**names).split():
        assert word in line


def test_one_line_whatever_a_name_or_a_library_says(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" not in refused(run("--prompt", "Hi", "--image", "no\nsuch\r\x1b[31mone"))

    def noisy(*args: object, **kwargs: object) -> None:
        warnings.warn("mind this", UserWarning, stacklevel=1)
        log = logging.Logger("some.library")
        log.addHandler(logging.StreamHandler())
        log.warning("and that")
        raise ValueError("two\nlines")

    def show(*args: object, **kwargs: object) -> None:  # pytest keeps warnings to itself
        print("a warning", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)

    monkeypatch.setattr(cli, "load", noisy)
    assert refused(run("--prompt", "Hi")) == "error: two lines\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_too_little_memory_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(cli, "load", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    assert "out of memory" in refused(run("--prompt", "Hi"))


def test_our_own_faults_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(cli, "load", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="mat1"):
        run("--prompt", "Hi")


def test_ctrl_c_while_loading(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cli, "load", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert run("--prompt", "Hi") == Said(130, "", "")


def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with one_voice():
        print("é 中", flush=True)
    assert raw.getvalue() == b"\\xe9 \\u4e2d\n"


# ---------------------------------------------------------------- as a program


def program(*args: object) -> list[str]:
    """-W error: a warning while importing would be an end."""
    flags = ["-W", "error", "-m", "minillava.generate", "--model", TINY, "--max-new-tokens", 5]
    return [sys.executable, *(str(flag) for flag in (*flags, *args))]


def test_as_a_program_an_error_is_one_line_and_exit_code_2() -> None:
    command = program("--prompt", "Hi", "--prune", "fast")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    refused(Said(done.returncode, done.stdout, done.stderr))


@pytest.mark.slow
def test_as_a_program_it_ends_quietly_when_interrupted() -> None:
    pipe = subprocess.PIPE
    command = program("--prompt", "Hi", "--chat")

    def heed() -> None:  # tests that a shell runs in the background ignore the signal by birth
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=heed
    ) as p:
        assert p.stdout
        assert p.stdout.readline()  # the first answer; now it waits for a question
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 130
        assert p.stderr
        assert p.stderr.read() == ""


def test_as_a_program_it_ends_quietly_when_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = program("--prompt", "Hi")
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
