"""eval.forms: how far stored forms of weights are from float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_batch, refusal

from eval import forms
from eval.forms import Answered, answer, compare, follow, main, read
from minillava import Batch
from minillava.generate import generate


def test_following_its_own_answers_gives_the_same_logits(model: Any) -> None:
    answered = answer(model, make_batch(model, "ttItt", "tttt", "tItIt"))
    kl, same = compare(answered.logits, follow(model, answered))
    assert len(kl) == int((~answered.logits[..., 0].isnan()).sum())
    assert kl.abs().max() < 1e-9
    assert same.all()


def test_other_tokens_are_followed_too(model: Any) -> None:
    """The logits are those of the tokens given, not of the model's own answer."""
    batch = make_batch(model, "ttItt")
    own = answer(model, batch)
    given = (own.tokens + 1) % 300
    logits = follow(model, Answered(batch, given, own.logits))
    longer = torch.cat((batch.ids, given[:, :-1]), dim=1)
    mask = torch.ones_like(longer, dtype=torch.bool)
    again = type(batch)(longer, mask, batch.pixels, None)
    last = generate(model, again, max_new_tokens=1, output_logits=True).logits
    torch.testing.assert_close(logits[:, -1], last[:, 0], atol=1e-4, rtol=1e-4)


def test_divergence_by_hand() -> None:
    expected = torch.tensor([[[0.0, 0.0], [torch.nan, torch.nan]]])
    found = torch.tensor([[[0.0, 1.0986122886681098], [5.0, 0.0]]])  # 1/4 and 3/4
    kl, same = compare(expected, found)
    assert kl.tolist() == pytest.approx([0.5 * torch.log(torch.tensor(4 / 3)).item()])
    assert same.tolist() == [False]


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "forms.json"
    argv = ["--form", "int8", "int4", "nf4", "--limit", "2", "--out", str(out)]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["float32", "int8", "int4", "nf4"]
    rows = json.loads(out.read_text())
    assert rows[0]["kl"] == 0
    assert 0 < rows[1]["kl"] < rows[2]["kl"]
    assert rows[3]["kl"] > 0
    assert rows[3]["arithmetic"] == "weights widened from nf4"
    assert main(["--form", "int3"]) == 2


def test_reading_a_text_gives_the_logits_of_its_prompts(model: Any) -> None:
    ids = torch.arange(20, 60)
    logits = read(model, ids)
    for n in (1, 17, 40):
        batch = Batch(ids[None, :n], torch.ones(1, n, dtype=torch.bool), None, None)
        last = generate(model, batch, max_new_tokens=1, output_logits=True).logits
        torch.testing.assert_close(logits[:, n - 1], last[:, 0], atol=1e-4, rtol=1e-4)


def test_the_table_of_a_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Which digit is red? What shape is blue? " * 60)
    argv = ["--text", str(text), "--form", "int8", "int4", "--out", str(tmp_path / "out.json")]
    assert main([*argv, "--limit", "2"]) == 0
    assert capsys.readouterr().out.startswith("512 tokens; float32's loss is ")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows[0]["kl"] == 0
    assert 0 < rows[1]["kl"] < rows[2]["kl"]
    for content, reason in ((b"short", "at least 256"), (b"\xff\xfe" * 300, "is not UTF-8")):
        text.write_bytes(content)
        assert main(argv) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("--text", "missing", "--text missing cannot be read (No such file or directory); give"),
        ("--text", "folder", "--text folder cannot be read (Is a directory); give a text file"),
        ("--text", "latin", "--text latin is not UTF-8 ("),
        ("--out", "none/x.json", "--out none/x.json: there is no folder none; create it first"),
        ("--out", "x.txt", "--out x.txt must be a file; give a name that ends in .json"),
        ("--out", "folder.json", "--out folder.json must be a file; give a name that ends in"),
    ],
)
def test_files_are_checked_before_a_model_is_loaded(
    option: str, name: str, reason: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forms, "load", None)
    for folder in ("folder", "folder.json"):
        Path(folder).mkdir()
    Path("latin").write_bytes(b"f\xfcr")
    assert main([option, name]) == 2
    assert reason in refusal(capsys)


def test_the_help_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "    python -m eval.forms --model DIR --text FILE            on running text" in lines
    assert any(line.startswith("- KL: mean") for line in lines)
