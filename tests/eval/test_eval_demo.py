"""eval.demo with a method in a file of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import user_method

from eval import demo


def test_a_users_method_beside_the_unpruned_model(tmp_path: Path) -> None:
    plan, out = f"{user_method.write(tmp_path)}:layer=4,keep=16", tmp_path / "found"
    assert demo.main(["--questions", "2", "--kinds", "where", "--out", str(out), plan]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["plan"] for row in rows] == ["none", plan]
    assert rows[1]["image_tokens_entering_a_layer"] == (4 * 64 + 4 * 16) / 8
    assert f"| `{plan}` |" in out.with_suffix(".md").read_text()


def test_a_mistake_in_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = user_method.write(tmp_path, user_method.FIRST.replace("int(k)", "99"))
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
