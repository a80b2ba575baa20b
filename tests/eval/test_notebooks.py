"""The notebooks run from top to bottom, in the folder where jupyter runs them."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parents[2] / "eval" / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(path: Path) -> list[Any]:
    """What the last expression of each cell gives, as jupyter shows it; None without one."""
    names: dict[str, Any] = {"__name__": "notebook"}
    shown = []
    for n, source in enumerate(code_of(path)):
        body, last = ast.parse(source).body, None
        if isinstance(body[-1], ast.Expr):
            last = ast.Expression(body.pop().value)
        where = f"{path.name}, cell {n}"
        exec(compile(ast.Module(body, []), where, "exec", dont_inherit=True), names)
        shown.append(
            None if last is None else eval(compile(last, where, "eval", dont_inherit=True), names)
        )
    return shown


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.chdir(request.param.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return [request.param.stem, *run(request.param)]


def test_each_notebook_runs(shown: list[Any]) -> None:
    name, *values = shown
    if name == "fastv":
        texts, (answer, entering), *pictures = values
        assert texts == ["1"]
        assert answer == ["1"]
        assert entering == [[157]] * 3 + [[49]] * 9
        assert all(isinstance(picture, Image.Image) for picture in pictures)
    elif name == "own_method":
        assert isinstance(values[-1], Image.Image)
        assert values[1]["Unlike, 16 of 144"] > values[1]["random, 16 of 144"] + 20
    else:
        right = values[-1]
        assert min(right.values()) > 90
        assert all(abs(right[k, "original"] - right[k, "compact"]) < 4 for k in ("what", "where"))


def test_there_are_three_and_they_hold_no_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["fastv", "own_method", "positions"]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_fastv_has_30_lines() -> None:
    """Of the method, the run and the pictures; imports and blank lines are not counted."""
    (path,) = (path for path in NOTEBOOKS if path.stem == "fastv")
    lines = [line for source in code_of(path) for line in source.split("\n") if line.strip()]
    assert len([x for x in lines if not x.startswith(("import ", "from ", "sys.path"))]) <= 30
