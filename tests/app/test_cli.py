"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from minillava import load, pruning
from minillava.app import ask, chat, cli
from minillava.app.command import quiet_libraries
from minillava.app.open_image import open_image
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.processing.tokenizer import Tokenizer
from minillava.pruning import CATALOGUE, METHODS, PRESETS, Preset, option_fields, parse_plan

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
CHOICES = (
    "Which?\nOptions: (A) red (B) blue\n"
    "Answer with the option's letter from the given choices directly."
)


class Output(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Output]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line with the tiny model and at most ten tokens."""

    def run(*args: object, model: Path | None = TINY) -> Output:
        flags = [] if model is None else ["--model", model, "--max-new-tokens", 10]
        code = cli.main([str(arg) for arg in (*flags, *args)])
        return Output(code, *capsys.readouterr())

    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise = torch.randint(0, 256, (40 * 70 * 3,), generator=torch.manual_seed(0))
    Image.frombytes("RGB", (70, 40), bytes(noise.tolist())).save(path)
    return path


def read_record(output: Output) -> dict[str, Any]:
    """The JSON record of a successful run."""
    assert (output.code, output.err, output.out.count("\n")) == (0, "", 1)
    return json.loads(output.out)


def read_error(output: Output) -> str:
    """The one line of a failed run."""
    assert (output.code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert output.err.endswith("\n")
    assert len(output.err.splitlines()) == 1
    return output.err


# ---------------------------------------------------------------- answers


def test_the_answer_is_what_generate_gives(run: Run, photo: Path) -> None:
    flags = ("--image", photo, "--prompt", "Hi", "--prune", "fastv:k=1,r=0.5")
    plain, output = run(*flags), read_record(run(*flags, "--json"))

    model, processor = load(TINY)
    batch = processor(["USER: <image>\nHi ASSISTANT:"], [[Image.open(photo)]])
    result = generate(model, batch, parse_plan("fastv:k=1,r=0.5"), max_new_tokens=10)
    assert output["tokens"] == result.tokens[0]
    assert output["text"] == processor.decode(result.tokens[0])
    assert plain == Output(0, output["text"] + "\n", "")
    assert output["report"]["kept"][0]["positions"] == result.report.kept[0].positions
    assert output["report"]["prompt_tokens"] == result.report.prompt_tokens
    assert (output["plan"], output["model"]) == ("fastv:k=1,r=0.5", str(TINY))
    assert (output["tokens_mode"], output["focus"]) == ("hf", None)
    counts = [layer[0] for layer in output["report"]["image_tokens_entering"]]
    assert 0 < output["load_seconds"] < 600
    averages = output["average_image_tokens"]
    assert averages["entering"] == pytest.approx(sum(counts) / len(counts))
    assert averages["leaving"] == pytest.approx((sum(counts[1:]) + counts[-1]) / len(counts))
    assert averages["entering_at_most"] == averages["entering"]  # FastV leaves as many of any image


def test_without_arguments_it_asks_the_bundled_question(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(TINY, demo)
    shutil.copy(photo, demo / "example.png")
    (demo / "example.json").write_text('{"question": "Which?"}')
    monkeypatch.setattr(ask, "DEMO", demo)
    bundled = run(model=None)
    asked = run("--image", photo, "--prompt", "Which?", "--max-new-tokens", 256)
    assert bundled == asked
    assert bundled.code == 0
    assert len(bundled.out) > 1

    monkeypatch.setattr(ask, "DEMO", tmp_path / "wheel" / "demo")
    assert "--model" in read_error(run(model=None))
    assert "--model" in read_error(run("--prompt", "Hi", model=None))


def test_a_raw_prompt_has_no_template(run: Run, photo: Path) -> None:
    flags = ("--image", photo, "--prompt", "USER: <image>\nHi ASSISTANT:", "--raw-prompt")
    assert run(*flags) == run("--image", photo, "--prompt", "Hi")


def test_several_images_and_none(run: Run, photo: Path) -> None:
    tokens = [
        read_record(run(*flags, "--prompt", "Hi", "--json"))["report"]["prompt_tokens"][0]
        for flags in ((), ("--image", photo), ("--image", photo, photo))
    ]
    repeated = read_record(run("--image", photo, "--image", photo, "--prompt", "Hi", "--json"))
    assert tokens[1] > tokens[0] + 16
    assert tokens[2] > tokens[1] + 16
    assert repeated["report"]["prompt_tokens"] == [tokens[2]]


def test_a_preset_sets_tokens_and_focus_unless_focus_is_given(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = "simignore:keep=9+fastv:layer=1,keep=4"
    preset = Preset(plan, "here", focus="options", tokens="simignore")
    monkeypatch.setitem(pruning.PRESETS, "small", preset)
    flags = ("--image", photo, "--prompt", CHOICES, "--json", "--prune")
    output = read_record(run(*flags, "small:released=1"))
    assert (output["tokens_mode"], output["focus"]) == ("simignore", "options")
    assert output["plan"] == "small:released=1"
    output = read_record(run(*flags, "small", "--focus", "red"))
    assert (output["tokens_mode"], output["focus"]) == ("hf", "red")


def test_the_focus_changes_what_is_kept(run: Run, photo: Path) -> None:
    flags = ("--image", photo, "--prompt", "Hi", "--json", "--prune", "simignore:keep=5")
    focuses = ("a", "dog", "12", "the sky")
    kept = [
        read_record(run(*flags, "--focus", f))["report"]["kept"][0]["positions"] for f in focuses
    ]
    assert any(positions != kept[0] for positions in kept)


def test_stop_strings_sampling_and_limits_reach_the_loop(run: Run) -> None:
    flags = ("--prompt", "Hi", "--json")
    text = read_record(run(*flags))["text"]
    stop = [letter for letter in text if letter.isascii()][1]
    stopped = read_record(run(*flags, "--stop", stop))
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["report"]["stopped"] == ["stop"]

    hot = (*flags, "--temperature", 5, "--seed")
    assert read_record(run(*hot, 1))["tokens"] == read_record(run(*hot, 1))["tokens"]
    assert read_record(run(*hot, 1))["tokens"] != read_record(run(*hot, 2))["tokens"]
    assert read_record(run(*hot, 1, "--top-p", 1e-9))["text"] == text
    assert len(read_record(run(*flags, "--max-new-tokens", 3))["tokens"]) == 3
    assert read_record(run(*flags, "--no-cache"))["report"]["cache_lengths"][0] == [0]


def test_a_plan_without_an_image_is_noted(run: Run, photo: Path) -> None:
    flags = ("--prompt", "Hi", "--max-new-tokens", 2)
    plain, noted = run(*flags), run(*flags, "--prune", "fastv:k=1,r=0.5")
    assert (noted.code, noted.out, plain.err) == (0, plain.out, "")
    assert noted.err == "note: there is no image, so --prune fastv:k=1,r=0.5 has nothing to prune\n"
    assert run(*flags, "--prune", "none").err == ""
    assert run(*flags, "--image", photo, "--prune", "fastv:k=1,r=0.5").err == ""


def test_compiled_decoding_is_asked_for_and_a_plan_that_prevents_it_is_noted(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself is left out."""
    asked = []
    monkeypatch.setattr("minillava.loading.checkpoint.check_compilable", lambda *_: None)
    monkeypatch.setattr("minillava.loading.checkpoint.compile_decoding", asked.append)
    flags = ("--image", photo, "--prompt", "Hi", "--prune", "fastv:k=1,r=0.5")
    assert run(*flags, "--compile") == run(*flags)
    assert len(asked) == 1
    again = run(*flags[:-1], "fastv:k=1,r=0.5,mode=mask", "--compile")
    assert again.code == 0
    assert again.err.startswith("note: the plan chooses again for every token")
    assert again.err.count("\n") == 1
    assert "leave it out, or --no-cache" in read_error(run(*flags, "--compile", "--no-cache"))


def test_methods_are_listed_without_a_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "load", None)
    output = run("--list-methods", model=None)
    assert (output.code, output.err) == (0, "")
    words = set(output.out.replace("=", " ").replace(";", " ").replace("|", " ").split())
    blocks = {block.partition(":")[0]: block for block in output.out.split("\n\n")}
    for name, method in METHODS.items():
        assert CATALOGUE[name].paper.split(",")[0] in blocks[name]
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
    monkeypatch.setattr(sys, "stdin", io.StringIO("  And\n\nwhy now\n"))
    flags = ("--image", photo, "--json", "--prune", "simignore:keep=5")
    output = run(*flags, "--prompt", "Hi", "--chat")
    assert (output.code, output.err, encoded) == (0, "", [1])  # no "> " when stdin is a pipe
    first, second, third = (json.loads(line) for line in output.out.splitlines())

    prompt = f"USER: <image>\nHi ASSISTANT: {first['text']} USER: And ASSISTANT:"
    alone = read_record(run(*flags, "--prompt", prompt, "--raw-prompt"))
    assert second["tokens"] == alone["tokens"]
    assert second["report"]["kept"] == alone["report"]["kept"]
    assert third["report"]["prompt_tokens"] > second["report"]["prompt_tokens"]


def test_an_error_ends_a_chat_from_a_pipe_but_not_at_a_terminal(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "a <image>\nfine\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert "<image>" in read_error(run("--image", photo, "--chat"))

    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(chat, "_is_terminal", lambda: True)
    output = run("--image", photo, "--chat")
    assert output.code == 0
    assert output.out == run("--image", photo, "--prompt", "fine").out
    assert output.err.startswith("> error: the question 'a <image>'")
    assert output.err.endswith("\n> > ")


def test_a_chat_beyond_the_models_positions_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 3000 + "\n"))
    output = run("--prompt", "Hi", "--chat")
    assert output.code == 2
    assert output.err.startswith("error: ")
    assert "positions" in output.err
    assert output.err.count("\n") == 1
    assert output.out.count("\n") == 1


@pytest.mark.parametrize("line", ["word " * 50_000, "x" * 300_000])
def test_a_question_that_cannot_fit_is_refused_before_it_is_tokenised(
    run: Run, photo: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encode = Tokenizer.encode

    def spy(self: Tokenizer, text: str, bos: bool = True) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, bos)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    monkeypatch.setattr(chat, "MAX_LINE", 250_000)
    monkeypatch.setattr(chat, "_is_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\nfine\n"))
    output = run("--image", photo, "--chat")
    assert output.code == 0
    assert "> error: the question has more than 204800 characters" in output.err
    assert output.err.count("error") == 1
    assert output.out == run("--image", photo, "--prompt", "fine").out
    assert max(lengths) < 200


@pytest.mark.parametrize("stdin", [None, io.StringIO("")])
def test_a_chat_ends_with_its_input(
    run: Run, stdin: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("--chat") == Output(0, "", "")
    assert run("--prompt", "Hi", "--chat") == run("--prompt", "Hi")


# ---------------------------------------------------------------- overlays


def test_an_overlay_is_written_after_the_run(run: Run, photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.png"
    output = run("--image", photo, "--prompt", "Hi", "--prune", "uniform:keep=5", "--overlay", path)
    assert (output.code, output.err) == (0, "")
    with Image.open(path) as drawing:
        assert drawing.format == "PNG"
        assert min(drawing.size) > 336
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.png", "photo.png"]


def test_a_failed_overlay_keeps_the_old_file(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.png"
    path.write_text("old")

    write = Path.write_bytes

    def fail(self: Path, data: bytes) -> int:
        write(self, data[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    output = run("--image", photo, "--prompt", "Hi", "--overlay", path)
    assert output.code == 2
    assert output.err == "error: [Errno 28] No space left on device\n"
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.png", "photo.png"]


# ---------------------------------------------------------------- errors


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
        ("--prompt Hi --prune {tmp}/pipe.py:Mine", "regular file {tmp}/pipe.py FILE.py:Class"),
        ("--prompt Hi --image {photo} --prune fastv:layer=99", "layer=99 layers"),
        ("--prompt Hi --image {photo} --prune uniform:keep=99", "keep=99 16"),
        ("--prompt Hi --image {photo} --prune simignore:keep=5 --focus=", "'' text"),
        ("--prompt Hi --overlay {tmp}/x.png", "{tmp}/x.png --image"),
        (f"--prompt Hi --image {{photo}} --overlay {'x' * 255}.png", "too long"),
        (f"--prompt Hi --image {{photo}} --overlay {'x' * 250}.png", "too long"),
        ("--prompt Hi --image {photo} --overlay {tmp}/x.jpg", "{tmp}/x.jpg .png"),
        ("--prompt Hi --image {photo} --overlay {tmp}/no/x.png", "{tmp}/no folder"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, photo: Path, tmp_path: Path, flags: str, words: str
) -> None:
    names = {"photo": photo, "tmp": tmp_path}
    os.mkfifo(tmp_path / "pipe.py")
    line = read_error(run(*flags.format(**names).split()))
    for word in words.format(**names).split():
        assert word in line


def test_names_and_library_output_do_not_break_the_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" not in read_error(run("--prompt", "Hi", "--image", "no\nsuch\r\x1b[31mone"))

    def load_noisily(*args: object, **kwargs: object) -> None:
        warnings.warn("a warning", UserWarning, stacklevel=1)
        log = logging.Logger("some.library")
        log.addHandler(logging.StreamHandler())
        log.warning("a log message")
        raise ValueError("two\nlines")

    def show(*args: object, **kwargs: object) -> None:  # pytest captures warnings
        print("a warning", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)

    monkeypatch.setattr(ask, "load", load_noisily)
    assert read_error(run("--prompt", "Hi")) == "error: two lines\n"


def test_noise_of_an_image_decoder_does_not_break_the_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """libtiff itself prints about a TIFF whose compressed data is no such data."""
    path = tmp_path / "broken.tif"
    Image.new("L", (20, 20)).save(path, compression="tiff_adobe_deflate")
    content = bytearray(path.read_bytes())
    at = content.index(b"\x78")  # where the zlib data begins
    content[at : at + 2] = b"\0\0"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.tif cannot be read"):
        open_image(path)
    assert "ZIPDecode" in capfd.readouterr().err
    code = cli.main(["--model", str(TINY), "--prompt", "Hi", "--image", str(path)])
    assert "broken.tif cannot be read" in read_error(Output(code, *capfd.readouterr()))


def test_help_and_usage_errors_load_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ask, "load", None)
    monkeypatch.setattr(ask, "open_image", None)
    missing = ("--model", "/no/such", "--image", "/no/such.png", "--prompt", "Hi")
    assert run(*missing, "--list-methods", model=None).code == 0
    with pytest.raises(SystemExit):
        cli.main([*missing, "--help"])
    assert "usage" in capsys.readouterr().out
    for wrong in ("--nonsense", "--seed=x", "--prune=no", "--temperature=-1", "--stop="):
        read_error(run(*missing, wrong, model=None))
    code = (
        "import sys\nfrom minillava.app.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules\n"
        "assert main(['--nonsense']) == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


ODD = """
    -- -x - ٣ ² 1_000 1e400 nan inf -0 -1 0 1 2 1e-320 0.5 é 中文 <image> </s> %s{} ../.. / ~ ~no/x
    /dev/zero /dev/null {pipe} {pipe}.py:Mine /dev/zero.py:Mine {photo} {tmp} http://[::1 https://
    file:///etc/passwd fastv:k=1,r=0.5 fastv:k=٣,r=0.5 fastv:k=1,r=nan random:keep=3 random:keep=-0
    random:keep=1e400 + crop pad float16 int8 cuda cuda:200 cuda:٣ cuda:-1 meta cpu options
""".split()  # noqa: SIM905
ODD += ["", " ", "\n", "a\0b", "\x1b[31m", "\ud800", "9" * 5000, "x" * 5000, f"cuda:{'9' * 30}"]
ODD += [f"fastv:k={'9' * 5000},r=0.5", "x\0.py:Mine", f"{'x' * 5000}.py:Mine"]
TEXTS = """
    model revision image prompt prune focus max-new-tokens min-new-tokens temperature top-p seed
    stop device dtype quantize image-aspect overlay
""".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("start", "step"), [(0, 8), *(pytest.param(i, 8, marks=pytest.mark.slow) for i in range(1, 8))]
)
def test_every_option_with_odd_values_gives_an_answer_or_one_line(
    run: Run, photo: Path, tmp_path: Path, start: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    for name in (pipe, tmp_path / "pipe.py"):
        os.mkfifo(name)
    monkeypatch.chdir(tmp_path)
    rng = random.Random(start)
    cases = [(option, value) for option in TEXTS for value in ODD]
    rng.shuffle(cases)
    seen = set()
    for option, value in cases[start::step]:
        for name, path in {"pipe": pipe, "photo": photo, "tmp": tmp_path}.items():
            value = value.replace(f"{{{name}}}", str(path))
        words = ["--prompt=Hi", f"--image={photo}"][: rng.randint(0, 2)]
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        output = run("--max-new-tokens=2", *words, f"--{option}={value}", "--chat")
        seen.add(output.code)
        if output.code == 2:
            assert output.err.startswith("error: "), (option, value)
            assert output.err.count("\n") == 1, (option, value)
            assert len(output.err) <= 2001
        else:
            assert output.code == 0, (option, value)
            without_effect = "note: there is no image, so --prune "
            assert not output.err or output.err.startswith(without_effect), (option, value)
    assert seen == {0, 2}


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
def test_out_of_memory_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(ask, "load", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    assert "out of memory" in read_error(run("--prompt", "Hi"))


def test_faults_of_the_program_are_raised(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(ask, "load", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="mat1"):
        run("--prompt", "Hi")


def test_ctrl_c_while_loading(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ask, "load", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert run("--prompt", "Hi") == Output(130, "", "")


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with quiet_libraries():
        print("é 中", flush=True)
    assert raw.getvalue() == b"\\xe9 \\u4e2d\n"


def test_the_package_itself_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minillava", "--list-methods"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("minillava", run_name="__main__")
    assert ended.value.code == 0
    assert "pyramiddrop" in capsys.readouterr().out


# ---------------------------------------------------------------- as a process


def make_command(*args: object) -> list[str]:
    """A process with -W error, which a warning while importing would end."""
    flags = ["-W", "error", "-m", "minillava.generate", "--model", TINY, "--max-new-tokens", 5]
    return [sys.executable, *(str(flag) for flag in (*flags, *args))]


def test_as_a_process_an_error_is_one_line_and_exit_code_2() -> None:
    command = make_command("--prompt", "Hi", "--prune", "fast")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    read_error(Output(done.returncode, done.stdout, done.stderr))


@pytest.mark.slow
def test_as_a_process_it_ends_quietly_when_interrupted() -> None:
    pipe = subprocess.PIPE
    command = make_command("--prompt", "Hi", "--chat")

    def reset() -> None:  # a process that a shell runs in the background ignores SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=reset
    ) as p:
        assert p.stdout
        assert p.stdout.readline()  # the first answer; then it waits for a question
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 130
        assert p.stderr
        assert p.stderr.read() == ""


def test_as_a_process_it_ends_quietly_when_its_output_is_closed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = make_command("--prompt", "Hi")
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_as_a_process_a_signal_ends_it_at_any_moment_without_a_word(
    number: signal.Signals, code: int, photo: Path, tmp_path: Path
) -> None:
    """Also while torch is imported; before that Python itself ends, in another way."""
    command = make_command("--image", photo, "--prompt", "Hi", "--overlay", tmp_path / "x.png")
    pipe = subprocess.PIPE

    def reset() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for delay in (0.5, 0.8, 1.2, 1.8, 2.5, 3.5):
        with subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe, preexec_fn=reset
        ) as p:
            time.sleep(delay)
            p.send_signal(number)
            assert p.wait(60) in (code, 0, -number)  # 0: it had finished; -number: at its end
            assert p.stderr
            assert p.stderr.read() == ""
        assert not list(tmp_path.glob("*.part"))
