"""The smallest set of image tokens that keeps an answer, and how far each method is from it.

    python -m eval.experiments.oracle --limit 40 --out DIR
    python -m eval.experiments.oracle --prune divprune:keep=16 ./mine.py:Mine:keep=16 \\
        --budgets 32 16 8 --out DIR
    python -m eval.experiments.oracle --task gqa --data DIR --model M --prefills 300 --out DIR

For each question, eval.smallest looks for a small set of patches with which the unpruned answer
comes token by token: greedy deletion, many sets in a batch, the picture encoded once. A budget is a
number of image tokens of a picture that are left at the end. The oracle keeps an answer at a budget
if the set that was found is not larger; a method keeps it if, with so many tokens left, its answer
equals the unpruned one character by character. The patches stay at their original positions.

The oracle's share is a lower bound of what could be kept: a smaller set of other patches may
exist, above all where --prefills ended the search. So a method can keep an answer that the oracle
does not; the table counts these. The oracle knows the answer; no method does.

The sets are written to --out/smallest.jsonl, question by question, and the methods' answers to
--out/answers. An interrupted command continues.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from minillava.app.command import parse_positive_int

from .. import budgets, cost, plots, store
from ..analyse import line_name
from ..answers import read_rows
from ..bench import Bench
from ..comparison import SAME
from ..credits import Credits, average
from ..experiments import base
from ..plans import NONE, TypedPlan, read_plan, read_plans
from ..predict import Run, batch_of
from ..results import begin_result
from ..smallest import smallest
from ..statistics import Estimate, compare, estimate
from ..tasks.base import Item
from ..typed import find_type_error, parse_json, refuse_special_file

METHODS = (
    "fastv:k=2,keep=0.5",
    "divprune:keep=0.5",
    "fastervlm:keep=0.5",
    "vispruner:keep=0.5",
    "uniform:keep=0.5",
    "random:keep=0.5",
)
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
ORACLE = "oracle"


class Found(TypedDict):
    """A line of smallest.jsonl: the set that keeps the answer to a question."""

    number: int
    question_id: str | int
    text: str  # the unpruned answer
    patches: list[int]  # numbered on through all images
    images: int
    prefills: int
    minimal: bool  # no patch can be left out by itself


@dataclass(frozen=True)
class Sets:
    """The sets of all questions."""

    found: tuple[Found, ...]  # in the order of the questions

    def kept(self, names: Sequence[str], budget: int) -> Credits:
        """Whether the oracle keeps each answer with so many tokens left of a picture."""
        return Credits.of(names, [len(f["patches"]) <= budget * f["images"] for f in self.found])


# ---------------------------------------------------------------- the search


def search(bench: Bench, path: Path, run: Run, prefills: int | None) -> Sets:
    """The sets of all questions of a benchmark, after searching for those that `path` lacks."""
    begin_result(path, run)
    done = {f["number"]: f for f in read_sets(path, bench.items)}
    todo = [n for n in range(len(bench.items)) if n not in done]
    with (
        store.open_to_append(path) as file,
        tqdm(total=len(todo), desc=ORACLE, unit="q", disable=None) as bar,
    ):
        for number in todo:
            done[number] = _search_one(bench, number, run, prefills)
            store.append_rows(file, cast(Iterable[store.Row], [done[number]]))
            bar.update()
    return Sets(tuple(done[n] for n in range(len(bench.items))))


def _search_one(bench: Bench, number: int, run: Run, prefills: int | None) -> Found:
    item = bench.items[number]
    try:
        batch = batch_of(bench.processor, [item], run)
        new = run.max_new_tokens
        found = smallest(bench.model, batch, limit=prefills, max_new_tokens=new)
    except ValueError as error:
        raise ValueError(f"question {item.question_id}: {error}") from None
    return Found(
        number=number,
        question_id=item.question_id,
        text=bench.processor.decode(found.answer).strip(),
        patches=list(found.patches),
        images=len(item.images),
        prefills=found.prefills,
        minimal=found.minimal,
    )


def read_sets(path: Path, items: Sequence[Item]) -> list[Found]:
    """The lines of smallest.jsonl; an incomplete last line is removed.

    Raises ValueError for a damaged line, and for lines of other questions.
    """
    refuse_special_file(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    lines = content[:complete].split(b"\n")[:-1]
    found = [_read_line(line, f"{path}, line {i}", items) for i, line in enumerate(lines, 1)]
    if complete < len(content):
        with store.name_file_in_errors(path), path.open("rb+") as file:
            file.truncate(complete)
    return found


def _read_line(line: bytes, where: str, items: Sequence[Item]) -> Found:
    try:
        row = parse_json(line)
        reason = find_type_error(row, Found)
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(
            f"{where} is not a set of this experiment: {reason}; delete the line, and its question "
            "is asked again, or give another --out"
        )
    number = row["number"]
    if not 0 <= number < len(items):
        raise ValueError(
            f"{where} is of question {number}, but {len(items)} are asked; raise --limit, or give "
            "another --out"
        )
    if str(row["question_id"]) != str(items[number].question_id):
        raise ValueError(
            f"{where} is of question {row['question_id']}, but question {number} is now "
            f"{items[number].question_id}: the data has changed; give another --out"
        )
    return cast(Found, row)


# ---------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Compared:
    """A method at a budget beside the oracle."""

    budget: int
    method: str  # as given
    plan: str
    left: float  # image tokens of a picture at the end, not always as many as the budget
    kept: Credits
    oracle: Credits

    def row(self) -> base.Row:
        apart = compare(self.oracle, self.kept)
        return {
            "budget": self.budget,
            "plan": f"`{self.plan}`",
            "tokens left": f"{self.left:g}",
            "answers kept, %": self.kept.score,
            base.INTERVAL: estimate(self.kept),
            "oracle, %": self.oracle.score,
            "minus the oracle": apart.estimate.value,
            "95 % of this": apart.estimate,
            "oracle alone": apart.lost,
            "method alone": apart.gained,
            "": "" if apart.distinguishable else SAME,
        }


def keep_answers(bench: Bench, plan: TypedPlan, unpruned: Sequence[str]) -> Credits:
    """Whether each answer under a plan equals the unpruned one; the mean over its seeds."""
    _, *more = bench.args.seeds
    result = bench.ask_with_seeds(plan, more)
    names, found = [str(item.question_id) for item in bench.items], list[Credits]()
    for each in (bench, *map(bench.with_seed, more if result.draws else ())):
        rows = read_rows(each.path(plan))
        if [str(row.question_id) for row in rows] != names:
            raise ValueError(f"{each.path(plan)} answers other questions; give another --out")
        same = [row.text == said for row, said in zip(rows, unpruned, strict=True)]
        found.append(Credits.of(names, same))
    return average(found)


def run(args: argparse.Namespace) -> str:
    began, typed = time.perf_counter(), read_plans(args.prune or METHODS)
    if NONE in typed:
        raise ValueError(f"--prune {NONE} keeps every answer; give plans that prune")
    if args.prefills == 1:
        raise ValueError("--prefills 1 must be 2 or more: for the answer, and for the result")
    bench = base.open_bench(args)
    with_picture = [item for item in bench.items if item.images]
    left_out = len(bench.items) - len(with_picture)
    bench = replace(bench, items=with_picture)
    if not with_picture:
        raise ValueError(f"none of the {left_out} questions has a picture; raise --limit")
    patches = bench.model.config.vision.num_patches
    wanted = budgets.count_tokens(args.budgets or SHARES, patches)
    varied = {
        (budget, text): budgets.with_budget(plan, bench.model, budget)
        for budget in wanted
        for text, plan in typed.items()
    }
    unique = {plan.text: plan for plan in varied.values()}
    bench.check([read_plan(NONE), *unique.values()])
    limit = "" if args.prefills is None else f":prefills={args.prefills}"
    settings = replace(bench.run(read_plan(NONE)), plan=f"smallest{limit}")
    sets = search(bench, args.out / "smallest.jsonl", settings, args.prefills)
    said = [found["text"] for found in sets.found]
    kept = {text: keep_answers(bench, plan, said) for text, plan in unique.items()}
    names = [str(item.question_id) for item in bench.items]
    compared = [
        Compared(
            budget,
            text,
            plan.text,
            budgets.tokens_left(plan, bench.model),
            kept[plan.text],
            sets.kept(names, budget),
        )
        for (budget, text), plan in varied.items()
    ]
    return _report(args, sets, compared, left_out, began)


# ---------------------------------------------------------------- output


def _report(
    args: argparse.Namespace,
    sets: Sets,
    compared: Sequence[Compared],
    left_out: int,
    began: float,
) -> str:
    n = len(sets.found)
    title = f"smallest sets that keep the answer, {n} questions of {args.task}"
    plots.curves(
        args.out / "oracle.png",
        curves(compared),
        title,
        ("image tokens left of a picture", "answers kept, %"),
        log_x=len({c.budget for c in compared}) > 1,
    )
    notes = [
        f"methods that draw at random: the mean over the seeds {', '.join(map(str, args.seeds))}",
        "oracle: the set that greedy deletion found is not larger than the budget; a smaller one "
        "may exist. oracle alone, method alone: questions whose answer is kept by one of them only",
    ]
    if left_out:
        notes.append(f"{left_out} questions without a picture are left out")
    tables = {
        "The methods beside the oracle": [c.row() for c in compared],
        "The smallest sets": [_sizes(sets)],
    }
    return base.write_report(args.out, args, title, tables, ["oracle.png"], began, notes)


def curves(compared: Sequence[Compared]) -> dict[str, list[tuple[float, plots.Height]]]:
    """The shares of answers kept over budgets, a line for the oracle and for each method."""
    methods = list(dict.fromkeys(c.method for c in compared))
    short = dict(zip(methods, map(line_name, methods), strict=True))
    if len(set(short.values())) < len(methods):  # they differ in a budget alone
        short = {method: method for method in methods}
    lines: dict[str, list[tuple[float, plots.Height]]] = {ORACLE: []}
    oracle: dict[int, Estimate] = {}
    for c in compared:
        oracle.setdefault(c.budget, estimate(c.oracle))
        lines.setdefault(short[c.method], []).append((c.budget, estimate(c.kept)))
    lines[ORACLE] = list(oracle.items())
    return lines


def _sizes(sets: Sets) -> Mapping[str, object]:
    sizes = [len(found["patches"]) / found["images"] for found in sets.found]
    return {
        "questions": len(sizes),
        "patches of a picture, median [quartiles]": cost.Spread.of(sizes),
        "largest": max(sizes),
        "no patch needed": sizes.count(0),
        "search ended before no patch more could go": sum(not f["minimal"] for f in sets.found),
        "prefills of a question": cost.Spread.of([float(f["prefills"]) for f in sets.found]),
    }


def add_oracle_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prune", nargs="+", metavar="PLAN", help="methods, asked at each budget; default: six")
    add(
        "--budgets",
        type=budgets.parse_budget,
        nargs="+",
        metavar="N",
        help="image tokens left at the end, or shares; default: 1/2 to 1/64 of all",
    )
    add("--prefills", type=parse_positive_int, metavar="N", help="of a search at most; 2 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(__doc__ or "", argv, "oracle", run, add_oracle_options)


if __name__ == "__main__":
    sys.exit(main())
