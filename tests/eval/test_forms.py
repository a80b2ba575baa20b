"""eval.forms: how far stored forms of weights are from float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_batch

from eval.forms import Answered, answer, compare, follow, main
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
