"""DIFFERENCES.md: every method has a row, the tests that it names exist; and tests of its rows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from contexts import make_context, make_model

from minillava import parse_plan
from minillava.pruning import METHODS, PRESETS, cdpruner, vscan
from minillava.pruning.average import average_entering

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "minillava" / "pruning" / "DIFFERENCES.md").read_text("utf-8")
ROWS = [line.strip("| \n").split("|") for line in PAGE.splitlines() if "::test_" in line]
NODES = sorted({row[-1].strip() for row in ROWS})


def test_every_row_has_five_cells_with_a_method_and_a_test() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        assert len(row) == 5, row
        assert row[0].strip().strip("`") in {*METHODS, "all"}
        assert all(cell.strip() for cell in row[2:])


def test_every_method_has_a_row_or_is_said_to_have_no_difference() -> None:
    without = re.findall(r"^No difference is known for .*?\n\n", PAGE, re.M | re.S)
    named = {row[0].strip().strip("`") for row in ROWS} | set(re.findall("`([a-z-]+)`", *without))
    assert named - {"all"} == {
        n for n, m in METHODS.items() if m.__module__.startswith("minillava.")
    }


@pytest.mark.parametrize("node", NODES)
def test_the_tests_named_exist(node: str) -> None:
    file, _, name = node.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert name.startswith("test_")
    assert name in {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}


# ---------------------------------------------------------------- rows that no other test shows


def test_divprune_keeps_the_reading_order() -> None:
    """The tokens are picked in another order than that of the grid, but do not stand in it."""
    model, method = make_model(4), parse_plan("divprune:keep=6").methods[0]
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(16, 40, generator=generator)
    hidden = {1: torch.zeros(1, 17, 24)}
    keep = method.choose(make_context(model, method, hidden, features=features))
    assert keep.index.tolist() != sorted(keep.index.tolist())
    assert not keep.ordered
    assert method.drops_only


def test_a_choice_in_two_halves_is_another_one() -> None:
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    rows[20:] = rows[20:] * 0.1 + rows[20]  # hardly anything in the second half is new
    rows = torch.nn.functional.normalize(rows)
    whole = cdpruner.choose_greedily(rows @ rows.T, 8).order.tolist()
    halves = [cdpruner.choose_greedily(half @ half.T, 4).order for half in rows.split(20)]
    split = [*halves[0].tolist(), *(halves[1] + 20).tolist()]
    assert sum(i >= 20 for i in split) == 4
    assert sum(i >= 20 for i in whole) < 4


@pytest.mark.parametrize(("keep", "released"), [(64, 64), (96, 96), (281, 269)])
def test_vscan_keeps_as_many_as_it_is_told(keep: int, released: int) -> None:
    """The released code takes keep - int(keep / 2) of all and (keep // 2) // 16 of each window."""
    local, whole = torch.rand(2, 576, generator=torch.Generator().manual_seed(0))
    assert len(vscan.scan_patches(local, whole, keep, "a test")[0]) == keep
    assert keep - int(keep * 0.5) + 16 * ((keep // 2) // 16) == released


def test_v2drops_quoted_shares_are_other_ones() -> None:
    def average(options: str) -> float:
        return average_entering(parse_plan(f"v2drop{options}").methods[0], 32, 576)

    assert parse_plan("v2drop").methods[0].left(576) == (288, 144, 1)
    assert average("") == pytest.approx(202.8125)
    assert average(":ratios=0.5/0.3/0.0") == pytest.approx(193.75)


def test_mustdrop_has_thresholds_and_no_budget() -> None:
    """The number of tokens that can stay is not a matter of its options."""
    for budget in (192, 128, 64):
        (method,) = parse_plan(PRESETS[f"mustdrop-{budget}"].plan).methods
        assert method.left(576) == METHODS["mustdrop"]().left(576)
