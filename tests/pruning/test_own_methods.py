"""Methods in files of their author's own: every beginner's mistake is told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minillava.app.cli import DEMO, main
from minillava.pruning.average import average_entering, most_entering
from minillava.pruning.base import Plan
from minillava.pruning.user_methods import load_file_method

EXAMPLE = DEMO / "example.png"

HEAD = """
from dataclasses import dataclass
import torch
from minillava.pruning.base import Context, Keep, Method, count, top

@dataclass(frozen=True)
class Mine(Method):
    keep: float = 0.5
    layer: int = 3
"""
STAGES = """
    def stages(self):
        return {stages}
"""
CHOOSE = """
    def choose(self, c):
        {body}
"""
FIRST = "return Keep(torch.arange(4))"
DECODER = '(("decoder", self.layer),)'

Tried = tuple[int, str, str]
Try = Callable[..., Tried]


@pytest.fixture
def tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Try:
    """Exit code, stdout and stderr of a method with such a body on the demo."""

    def run(
        body: str = FIRST,
        stages: str = '(("embed", 0),)',
        more: str = "",
        options: str = "",
        argv: tuple[str, ...] = (),
    ) -> Tried:
        file = tmp_path / "mine.py"
        text = HEAD + more + STAGES.format(stages=stages) + CHOOSE.format(body=body)
        file.write_text(text)
        code = main(["--prune", f"{file}:Mine{options}", "--max-new-tokens", "3", *argv])
        return code, *capsys.readouterr()

    return run


def refused(tried: Tried, *words: str) -> None:
    code, _, err = tried
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_sound_one_runs(tried: Try) -> None:
    code, out, err = tried()
    assert (code, err) == (0, "")
    assert out.strip()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return torch.arange(4)", "must return Keep(index) with index (K,) of int64, not tensor("),
        ("return None", "must return Keep(index) with index (K,) of int64, not None"),
        ("return Keep([0, 1])", "with index (K,) of int64, not Keep(index=[0, 1]"),
        ("return Keep(torch.tensor(3))", "not index () torch.int64"),
        ("return Keep(torch.arange(4).view(2, 2))", "not index (2, 2)"),
        ("return Keep(torch.arange(4.0))", "not index (4,) torch.float32"),
        ("return Keep(torch.tensor([]))", "not index (0,) torch.float32"),
        ("return Keep(torch.ones(144, dtype=torch.bool))", "mask.nonzero()"),
        (
            "return Keep(torch.tensor([7, 7, 9]))",
            "Keep.index has 7; name each of the 144 candidates, 0 to 143, at most once",
        ),
        (
            "return Keep(torch.tensor([3, 144]))",
            "has 144; name each of the 144 candidates, 0 to 143",
        ),
        ("return Keep(torch.tensor([-1, 3]))", "has -1; name each of the 144 candidates, 0 to 143"),
        ("return Keep(torch.arange(2), merged=c.features()[:2])", "say drops_only = False"),
        ("return Keep(torch.arange(2), extra=c.features()[:2])", "say drops_only = False"),
        ("return Keep(torch.arange(2), ordered=True)", "say drops_only = False"),
    ],
)
def test_a_choice_that_is_none(tried: Try, body: str, words: str) -> None:
    refused(tried(body), "error: mine (", "mine.py): choose()", words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('boom')", "ValueError: boom"),
        ("raise KeyError('boom')", "KeyError: 'boom'"),
        ("raise SystemExit(0)", "SystemExit"),
        ("assert False", "AssertionError"),
        ("return c.nothing", "AttributeError"),
        ("return c.attention(0)", "ValueError: mine: layer 0 has no layer before it"),
        (
            "return Keep(top(c.features()[:, 0] * float('nan'), 4, c.where))",
            "ValueError: NaN among the scores of the embed stage",
        ),
    ],
)
def test_an_exception_in_the_file_is_told_with_its_line(tried: Try, body: str, words: str) -> None:
    refused(tried(body), f"mine.py, line 15: {words}")


def test_an_error_between_tokens_has_a_line_of_its_own(tried: Try) -> None:
    """Whoever reads both streams on one terminal."""
    once = "type(self).asked = getattr(type(self), 'asked', 0) + 1; assert self.asked < 3; "
    question = ("--image", str(EXAMPLE), "--prompt", "What is in the picture?", "--no-cache")
    code, out, err = tried(once + "return Keep(torch.arange(144))", argv=question)
    assert code == 2
    assert err.startswith("error: ")
    assert "mine.py, line 15: AssertionError" in err
    assert out.strip()
    assert out.endswith("\n")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("merged=c.features()[:3]", "merged must be (2, 128) floats, not (3, 128)"),
        ("merged=c.features()[:2, :5]", "merged must be (2, 128) floats, not (2, 5)"),
        ("merged=c.features()[:2] / 0", "merged has NaN or infinite"),
        ("merged=[1.0]", "merged must be (2, 128) floats, not list"),
        ("extra=c.features()[0]", "extra must be (M, 128) floats, not (128,)"),
        ("extra=c.features()[:1, :5]", "extra must be (M, 128) floats, not (1, 5)"),
    ],
)
def test_merged_rows_that_are_none(tried: Try, rows: str, words: str) -> None:
    body = f"return Keep(torch.arange(2), {rows})"
    done = tried(body, more="    drops_only = False\n")
    refused(done, "error: mine (", f"mine.py): choose(): Keep.{words}")


@pytest.mark.parametrize(
    "stages",
    [
        '("embed", 0)',
        '(("embedding", 0),)',
        '(("embed", 3),)',
        '(("vision", 1),)',
        '(("decoder", 2.0),)',
        "()",
        "None",
        '[("embed", 0)]',
    ],
)
def test_a_stage_that_is_none(tried: Try, stages: str) -> None:
    refused(tried(stages=stages), "error: mine (", "mine.py): stages() gave", '("decoder", K)')


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (":keep=-3", "keep=-3"),
        (":keep=145", "keep=145, but there are 144"),
        (":keep=1.5", "keep=1.5"),
        (":kep=3", "no option 'kep'"),
        (":layer=2.5", "whole number"),
        (":keep=3,layer=99", ""),
    ],
)
def test_options(tried: Try, options: str, words: str) -> None:
    code, _, err = done = tried(options=options)
    if words:
        refused(done, words)
    else:  # a layer that its stages do not name
        assert (code, err) == (0, "")


def test_the_layer_before_the_first(tried: Try) -> None:
    body = "return Keep(top(c.attention(c.newest).mean(0), 4, c.where))"
    assert tried(body, DECODER)[0] == 0
    refused(tried(body, DECODER, options=":layer=0"), "layer 0 has no layer before it")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("c.attention(c.text_rows)", "is gone while decoding"),
        ("c.sequence()", "the prompt's hidden states are gone"),
        ("c.features()", "the prompt's hidden states are gone"),
    ],
)
def test_what_is_gone_while_decoding(tried: Try, body: str, words: str) -> None:
    body += "; return Keep(torch.arange(4))"
    more, mask = "    newest_row = True\n", ":mode=mask"
    assert tried(body, DECODER, more)[0] == 0
    done = tried(body, DECODER, more, options=mask)
    refused(done, "mine.py, line 16: ValueError: mine: ", words, "say choice_stands = True")
    assert tried(body, DECODER, options=mask)[0] == 0
    assert tried(body, DECODER, more + "    choice_stands = True\n", options=mask)[0] == 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("check(self, n_layers, n_tokens, starts):\n        1 / 0", "ZeroDivisionError"),
        ("left(self, n_tokens):\n        return [][0]", "IndexError"),
    ],
)
def test_what_else_it_overrides(tried: Try, asked: str, words: str) -> None:
    refused(tried(more=f"    def {asked}\n"), f"mine.py, line 11: {words}")


@pytest.mark.parametrize("said", ["16", "()", "(16, 8)", "(16.0,)", "[16]"])
@pytest.mark.parametrize("followed", ["", "+nuwa:layer=6"])
def test_what_is_left_is_a_number_for_each_stage(tried: Try, said: str, followed: str) -> None:
    """Whichever check of the plan asks first: of the prompt's length, or of what can follow."""
    more = f"    def left(self, n_tokens):\n        return {said}\n"
    done = tried(more=more, stages='(("vision", 0),)', options=followed)
    words = f"left(144) gave {said}; it must be a tuple of 1 int, one for each stage"
    refused(done, "error: mine (", f"mine.py): {words}")


@pytest.mark.parametrize("said", ["16", "(16, 8)"])
def test_what_is_left_is_asked_for_a_table(tried: Try, said: str, tmp_path: Path) -> None:
    """By the average over the layers that eval.cost counts, and the one that average= wants."""
    more = f"    def left(self, n_tokens):\n        return {said}\n"
    tried(more=more)
    method = load_file_method(f"{tmp_path / 'mine.py'}:Mine")()
    for count, of in ((average_entering, method), (most_entering, Plan((method,)))):
        with pytest.raises(ValueError, match=r"left\(64\) gave .*; it must be a tuple of 1 int"):
            count(of, 6, 64)


def test_a_decision_can_be_a_number_of_python(tried: Try) -> None:
    assert tried("return Keep(torch.arange(4), closest=0.5)")[0] == 0


@pytest.mark.parametrize(
    ("layers", "said"),
    [("(-2,)", "(-2,)"), ("(n_layers + 1,)", "(7,)"), ("3", "3")],
)
def test_hidden_states_that_the_tower_lacks(tried: Try, layers: str, said: str) -> None:
    done = tried(more=f"    def vision_layers(self, n_layers):\n        return {layers}\n")
    words = f"vision_layers() gave {said}; it must be a tuple of numbers from 0 to 6"
    refused(done, "error: mine (", f"mine.py): {words}")


def test_arguments_that_do_not_fit(tried: Try) -> None:
    """Python raises this one where the method is called, not in its file."""
    refused(tried(more="    def check(self):\n        pass\n"), "mine.py", "TypeError")


def test_variants_that_fail(tried: Try) -> None:
    more = "    def variants(self, n_layers, n_tokens):\n        self.x\n"
    assert tried(more=more)[0] == 0
    refused(tried(more=more, options=":average=9"), "mine.py, line 11: AttributeError")


def test_what_it_prints_stays_out_of_the_answer(tried: Try) -> None:
    code, out, err = tried(
        "print('looking'); " + FIRST, more="    print('made')\n", argv=("--json",)
    )
    assert code == 0
    assert json.loads(out)["plan"]
    assert err.split() == ["made", "looking"]


@pytest.mark.parametrize("folder", [".", "deeper/.."])
def test_a_file_named_from_where_one_stands(
    tried: Try, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tried()
    (tmp_path / "deeper").mkdir()
    file = tmp_path / "mine.py"
    file.write_text(file.read_text().replace(FIRST, "raise RuntimeError('one\\ntwo')"))
    monkeypatch.chdir(tmp_path)
    done = main(["--prune", f"{folder}/mine.py:Mine"]), *capsys.readouterr()
    refused(done, "mine.py, line 15: RuntimeError: one two")


@pytest.mark.parametrize("missing", ["stages", "choose"])
def test_a_class_without_what_it_needs(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    parts = {"stages": STAGES.format(stages='(("embed", 0),)'), "choose": CHOOSE.format(body=FIRST)}
    file.write_text(HEAD + "".join(text for name, text in parts.items() if name != missing))
    refused((main(["--prune", f"{file}:Mine"]), *capsys.readouterr()), f"no method {missing}")


def test_a_name_that_is_taken_and_a_file_without_a_class(
    tried: Try, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(tried(more="    name = 'fastv'\n"), "the name 'fastv' is taken")
    refused((main(["--prune", str(tmp_path / "mine.py")]), *capsys.readouterr()), "FILE.py:Class")


# ---------------------------------------------------------------- declarations and mistakes


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("mode: str = 'drop'", "the option 'mode' is the engine's; choose another name"),
        ("average: int = 3", "the option 'average' is the engine's"),
        ("numbering = 'compakt'", "numbering='compakt' must be original or compact"),
        ("strength = 'kep'", "strength='kep' must be one of ['keep', 'layer']"),
        ("identity = 'kep=1.0'", "identity='kep=1.0' must give options of it"),
    ],
)
def test_a_declaration_that_nothing_would_read(tried: Try, declared: str, words: str) -> None:
    refused(tried(more=f"    {declared}\n"), words)


@pytest.mark.parametrize(
    ("body", "options", "words"),
    [
        ("self.k = 3", "", "FrozenInstanceError"),
        ("self.k = 3", "", "what is to be kept between calls goes into c.memory"),
        (
            "return Keep(top(c.vision_state()[0], 3, c.where))",
            "",
            "top() ranks scores (n,), not (145, 128); mean over heads?",
        ),
        ("", ":keep=99999", "keep=99999, but there are 144 image tokens"),
        (
            "",
            ":until=5",
            "error: mine: until=5 ends a mask",
        ),  # a fault of the plan, not of the file
        ("", ":average=32", "define left(n_tokens), a tuple with one number for each stage"),
    ],
)
def test_mistakes_in_a_method(tried: Try, body: str, options: str, words: str) -> None:
    refused(tried(body or FIRST, options=options), words)
