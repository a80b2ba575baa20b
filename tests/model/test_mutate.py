"""The script that mutates the code, on a module of a few lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import mutate
import pytest

SOURCE = '''"""A docstring: 1 < 2."""
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    LIMIT = 1

__all__ = ["first"]
Kind = Literal["a"]


def first(text: "str", n: int = 3, deep: bool = False) -> str:
    """Another one."""
    if not text and n <= 2 or n in (7, 8):
        raise ValueError(f"no {text}" + "at all")
    print("said", file=sys.stderr)
    rows = cast("list", text.strip())[n:]
    assert deep, "a message"
    return max(rows, key=f"k{n}") + rows[:n] * n
'''

EXPECTED = """
11 constant + 1: 4
11 constant False to True: True
13 not removed: (text)
13 logic and to or: or
13 logic or to and: and
13 compare <= to <: <
13 constant + 1: 3
13 compare in to not in: not in
13 constant + 1: 8
13 constant + 1: 9
14 statement removed: pass
15 statement removed: pass
16 name strip to rstrip: rstrip
16 slice + 1: (n) + 1
18 return None: None
18 name max to min: min
18 string f-string: 'X'
18 arithmetic + to -: -
18 arithmetic * to //: //
18 slice from 1: 1
18 slice + 1: (n) + 1
"""


def test_the_mutants_of_a_module() -> None:
    """Neither texts for people nor types are changed."""
    found = mutate.find_mutants("toy.py", SOURCE.encode())
    said = [f"{m.line} {m.operator}: {m.text.strip()}" for m in found]
    assert sorted(said) == sorted(EXPECTED.strip().splitlines())
    assert len({m.key for m in found}) == len(found)
    assert all(mutate.is_change(m, SOURCE.encode()) for m in found)
    assert [m.line for m in found if m.at_import] == [11, 11]
    (strip,) = (m for m in found if m.text == "rstrip")
    assert strip.apply(SOURCE.encode()).decode() == SOURCE.replace(".strip", ".rstrip")


def test_the_sample_depends_on_the_seed_and_has_five_of_each_file() -> None:
    sources = {"a.py": SOURCE.encode(), "b.py": SOURCE.encode(), "c.py": b"x = 1\n"}
    drawn = mutate.draw(sources, number=0, seed=0)
    assert [m.file for m in drawn] == ["a.py"] * 5 + ["b.py"] * 5 + ["c.py"]
    assert len({m.operator.split()[0] for m in drawn[:5]}) == 5  # the kinds take turns
    assert mutate.draw(sources, number=0, seed=0) == drawn
    assert mutate.draw(sources, number=0, seed=1) != drawn
    assert len(mutate.draw(sources, number=1000, seed=0)) == 43


def test_lines_lead_to_tests_through_fixtures_and_imports() -> None:
    entry = {
        "tests": {
            "t.py::slow": {"seconds": 2.0, "fixtures": []},
            "t.py::fast": {"seconds": 1.0, "fixtures": ["model"]},
            "t.py::broken": {"seconds": 0.1, "fixtures": ["model"], "failed": True},
        },
        "lines": {
            "a.py": {"1": [""], "11": [""], "13": ["fixture model"], "14": ["t.py::slow"]},
            "c.py": {"1": [""]},
        },
    }
    found = mutate.TestMap([entry])
    importers = mutate.find_importers({"a.py": b"from c import x", "t.py": b"from a import *"})
    by_line = {m.line: m for m in mutate.find_mutants("a.py", SOURCE.encode())}
    assert found.tests(by_line[13], importers) == ["t.py::fast", "t.py::slow"]
    assert found.tests(by_line[14], importers) == ["t.py::slow", "t.py::fast"]
    assert found.tests(by_line[11], importers) == ["t.py::fast", "t.py::slow"]
    (table,) = mutate.find_mutants("c.py", b"x = 1\n")
    assert found.tests(table, importers) == ["t.py::fast", "t.py::slow"]
    assert found.tests(table, defaultdict(list)) == []


def test_what_takes_too_long_is_stopped() -> None:
    assert mutate.in_fork(partial(time.sleep, 600), limit=0.2) is None
    assert mutate.in_fork(partial(max, 3, 4), limit=600) == 4


@pytest.mark.skipif(shutil.which("git") is None, reason="the script asks git for the files")
def test_a_run_says_which_mutants_survive_and_leaves_the_checkout_alone(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out.jsonl"
    (root / "tests").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    source = "def clip(x):\n    if x < 0:\n        x += 5\n    return min(x, 9)\n"
    (root / "toy.py").write_text(source)
    (root / "tests" / "test_toy.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nimport toy\n\n"
        "def test_clip():\n    assert toy.clip(-1) == 4\n    assert toy.clip(0) == 0\n"
        "    assert toy.clip(12) in (9, 10)\n"
    )
    script = [sys.executable, mutate.__file__, "toy.py", "--root", root, "--out", out, "--preload"]

    def run(*options: str) -> str:
        command = [*map(str, script), *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run("--only", ":2:").endswith("8 mutants, 6 not decided, 0 survived\n")
    first = out.read_text()
    out.write_text(first + '{"key": "torn')
    assert run().endswith("8 mutants, 0 not decided, 1 survived\n")
    assert out.read_text().startswith(first)  # what was decided is not decided again
    entries = [json.loads(line) for line in out.read_text().splitlines() if '"torn' not in line]
    assert {(entry["line"], entry["operator"]): entry["verdict"] for entry in entries} == {
        (2, "compare < to <="): "killed",
        (2, "constant + 1"): "killed",
        (3, "statement removed"): "killed",
        (3, "arithmetic + to -"): "killed",
        (3, "constant + 1"): "killed",
        (4, "return None"): "killed",
        (4, "name min to max"): "killed",
        (4, "constant + 1"): "survived",
    }
    assert (root / "toy.py").read_text() == source
    assert sorted(path.name for path in root.iterdir()) == [".git", "tests", "toy.py"]
