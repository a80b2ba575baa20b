"""eval.demo with a method in a file of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import user_method
from tiny import refusal

from eval import demo
from eval.credits import Credits


def test_a_users_method_beside_the_unpruned_model(tmp_path: Path) -> None:
    plan, out = f"{user_method.write(tmp_path)}:layer=3,keep=16", tmp_path / "found"
    assert demo.main(["--questions", "2", "--kinds", "where", "--out", str(out), plan]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["plan"] for row in rows] == ["none", plan, "random:keep=48"]
    assert rows[1]["image_tokens_entering_a_layer"] == (3 * 144 + 9 * 16) / 12
    assert f"| `{plan}` |" in out.with_suffix(".md").read_text()


def scored(plan: str, tokens: float, seeds: Mapping[int, list[int]]) -> demo.Measured:
    """Answers to eight questions and two captions."""
    names = [str(i) for i in range(10)]
    found = {seed: Credits.of(names, [*right, 1, 0]) for seed, right in seeds.items()}
    return demo.Measured(plan, tokens, found, (*["where", "count"] * 4, "caption", "caption"))


def test_each_plan_is_compared_with_random_patches_and_the_unpruned_model() -> None:
    right, wrong = [1] * 8, [0] * 8
    found = [
        scored("none", 64, {0: right}),
        scored("divprune:keep=16", 16.2, {0: right}),
        scored("random:keep=16", 16, {0: wrong, 7: [0, 0, 0, 0, 0, 0, 1, 1]}),
        scored("fastv:k=2,r=0.1", 63.9, {0: right}),
    ]
    text = demo.format_tables(found, 64)
    head, *rows = [line for line in text.splitlines() if line.startswith("|")][0:6:1]
    assert "all | 95 % | where | count | caption" in head
    assert rows[1].startswith("| `none` | 64.0 | 100.0 | 67.6 to 100.0 | 100.0 | 100.0 | 50.0")
    assert rows[3].startswith("| `random:keep=16` | 16.0 | 12.5 |")  # the mean over its seeds
    matched, _, unpruned = text.partition("Minus the unpruned model:")
    against = matched.partition("Minus random")[2]
    assert "| `divprune:keep=16` | `random:keep=16` | +87.50 |" in against
    assert "| 0 | 6 |" in against  # half of the seeds are right on the other two
    assert "fastv" not in against  # nothing random has its budget
    assert "| `divprune:keep=16` | `none` | +0.00 |" in unpruned
    assert "| `random:keep=16` | 0, 7 | 12.50 | 17.68 | 0.00 to 25.00 |" in unpruned
    assert found[2].json()["intervals"]["all"] is not None


def test_captions_alone_are_scored_and_too_few_questions_are_said() -> None:
    few = demo.Measured("none", 64, {0: Credits.of(["0"], [1])}, ("caption",))
    assert few.scores()["all"].value == 100
    assert "1 question is too few" in demo.format_tables([few], 64)


def test_plans_that_draw_are_asked_with_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    generate = demo.generate

    def listed(model: Any, batch: Any, plan: Any, **more: Any) -> Any:
        asked.append((plan.text, more["seed"]))
        return generate(model, batch, plan, **more)

    monkeypatch.setattr(demo, "generate", listed)
    out = tmp_path / "found"
    words = ["uniform:keep=8", "--questions", "2", "--kinds", "where", "--seeds", "3", "5"]
    assert demo.main([*words, "--out", str(out)]) == 0
    assert asked == [("", 3), ("uniform:keep=8", 3), ("random:keep=8", 3), ("random:keep=8", 5)]
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [[*row["seeds"]] for row in rows] == [["3"], ["3"], ["3", "5"]]


def test_a_mistake_in_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = user_method.write(tmp_path, user_method.FIRST.replace("int(k)", "199"))
    assert demo.main(["--questions", "2", plan]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "mine.py): choose(): Keep.index has" in error


@pytest.mark.parametrize(("name", "stem"), [
    ("found", "found"), ("found.json", "found"), ("found.md", "found"), ("keep-0.5", "keep-0.5"),
])  # fmt: skip
def test_the_names_of_its_files(name: str, stem: str, tmp_path: Path) -> None:
    assert demo._output_files(tmp_path / name) == [
        tmp_path / f"{stem}.json",
        tmp_path / f"{stem}.md",
    ]


def test_an_output_that_cannot_be_written_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "load", None)
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "found.md").mkdir()
    for out in (file / "x", file / "y" / "x", tmp_path / "found", tmp_path / ("x" * 300)):
        assert demo.main(["--out", str(out)]) == 2
        line = refusal(capsys)
        assert line.startswith(f"error: --out {out}")
        assert "; give another name" in line
