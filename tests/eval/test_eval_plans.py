"""Plans as they are typed: which files they name, and how the files of their results are named."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import user_method

from eval import published
from eval.plans import file_name, files_of, read_plan, read_plans
from minillava.pruning import METHODS, PRESETS


@pytest.mark.parametrize(("text", "name"), [
    ("none", "none"),
    ("fastv:k=2,r=0.5", "fastv_k=2,r=0.5"),
    ("pyramiddrop:layers=2/4/6,ratios=.5/0.25/0.125",
     "pyramiddrop_layers=2-4-6,ratios=.5-0.25-0.125"),
    ("simignore:keep=452,i_index=1,mode=mask,until=5+fastv:layer=5,keep=144",
     "simignore_keep=452,i_index=1,mode=mask,until=5+fastv_layer=5,keep=144"),
    ("prumerge-plus", "prumerge-plus"),
    ("fastv:layer=-1", "fastv_layer=-1"),
    ("sparsevlm:layers=" + "/".join("1234567") + ",keep=" + "/".join(["123"] * 30),
     "sparsevlm_layers=1-2-3-4-5-6-7,keep=123-123-123-123-123-123-123-123-123-123-123-123-123-123-"
     "123-123--bc48426c7d61"),
])  # fmt: skip
def test_plain_plans_have_the_names_that_they_always_had(text: str, name: str) -> None:
    assert file_name(text) == name


def test_methods_and_presets_are_plain() -> None:
    names = [*METHODS, *PRESETS]
    assert [file_name(name) for name in names] == names


STRANGE = [
    "", " ", "-", "--", ".", "..", "/", "./mine.py:Mine", "mine.py:Mine", "-mine.py:Mine",
    "/a/mine.py:Mine", "a/b.py:Mine:keep=16", "a-b.py:Mine:keep=16", "a_b.py:Mine:keep=16",
    "MINE.py:Mine", "é.py:Mine", "日本.py:Mine", "fastv:k=2,r=.5", "fastv:k=2,r=0.5",
    "fastv: k=2,r=0.5", "fastv:k=2, r=0.5", "fastv:k=2,keep=1", "fastv:k=2,keep=1.",
    "hand:patches=3/7-12", "hand:patches=3-7/12", "x" * 300, "x" * 301, "+", "none", "None",
]  # fmt: skip


@pytest.mark.parametrize("text", STRANGE)
def test_no_name_is_hidden_or_looks_like_an_option(text: str) -> None:
    name = file_name(text)
    assert name
    assert name[0] not in "-."
    assert len(name) <= 120
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,=+_-")


def test_no_two_plans_share_a_file() -> None:
    """Not on a system either that takes capitals for small letters."""
    for one, other in itertools.combinations(STRANGE, 2):
        assert file_name(one).lower() != file_name(other).lower(), (one, other)


def test_a_name_is_readable() -> None:
    assert file_name("./mine.py:Mine:keep=16").startswith("mine.py_Mine_keep=16-")


# ---------------------------------------------------------------- methods in files


def test_a_plan_with_the_digest_of_its_file(tmp_path: Path) -> None:
    method = user_method.write(tmp_path)
    plan = read_plan(f"fastv:k=2,r=0.5+{method}:keep=16")
    file = tmp_path / "mine.py"
    assert plan.method_files == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert [m.name for m in plan.plan.methods] == ["fastv", "mine"]
    assert read_plan("fastv:k=2,r=0.5").method_files is None


def test_a_plan_given_twice_is_read_once(tmp_path: Path) -> None:
    method, mark = user_method.write_mark(tmp_path)
    assert list(read_plans(["none", method, method])) == ["none", method]
    assert mark.read_text() == "run "


def test_naming_the_files_of_a_plan_runs_none(tmp_path: Path) -> None:
    method, mark = user_method.write_mark(tmp_path)
    assert files_of(f"divprune:keep=9+{method}:keep=3") == [str(tmp_path / "mine.py")]
    assert not published.same_plan(method, "fastv:k=2,r=0.5", "llava-1.5-7b")
    assert not mark.exists()
