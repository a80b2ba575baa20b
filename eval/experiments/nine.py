"""Nine benchmarks under several plans, as in FastV's table of lmms-eval results.

    python -m eval.experiments.nine --limit 200 --out DIR                     the demo's kinds
    python -m eval.experiments.nine --data ROOT --model HUB_ID --out DIR      the real ones

ROOT has a folder for each task: nocaps, flickr30k, coco2014, coco2017, mmmu, mme, gqa, seed_bench
(mme gives two columns). Missing ones are left out, and the result says what to download. All are
asked and scored as by lmms-eval. Published figures follow below, source by source.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .. import plots
from ..bench import Bench
from ..credits import average_of_groups
from ..plans import NONE, TypedPlan, read_plans
from ..results import PlanResult
from ..run import format_published
from ..score import find_task, read_questions
from ..statistics import Estimate, estimate
from ..tasks.base import Item
from . import base

TASKS = ("nocaps", "flickr30k", "coco2014", "coco2017", "mmmu", "gqa", "mme", "seed_bench")


def run(args: argparse.Namespace) -> str:
    began = time.perf_counter()
    plans = read_plans([NONE, *args.prune])  # before anything is loaded
    comparisons: list[str] = []
    if args.data is None:
        bench = base.open_bench(args)
        done = base.ask_all(bench, plans)
        scores = {plan: _kinds(d) for plan, d in done.items()}
        costs = {plan: base.cost_columns(d) for plan, d in done.items()}
        comparisons = base.compare_with_unpruned(bench, done)
        notes: list[str] = []
        published: list[str] = []
    else:
        scores, costs, notes, published, comparisons = _ask_benchmarks(args, plans)
    columns = list(scores[NONE])
    heights = {name: {plan: scores[plan][name] for plan in plans} for name in columns}
    if args.data is None:
        title, label = f"{len(columns)} kinds of question", "score"
        means = {plan: {"mean": _mean(d)} for plan, d in done.items()}
    else:  # the scales differ: no mean, and bars relative to no pruning
        title, label = f"{len(columns)} benchmarks", "% of unpruned"
        means = {}
        heights = {
            name: {plan: _percent_of(e, bars[NONE].value) for plan, e in bars.items()}
            for name, bars in heights.items()
        }
    rows = [
        {
            "plan": f"`{plan}`",
            **{name: e.value for name, e in scores[plan].items()},
            **{name: e.value for name, e in means.get(plan, {}).items()},
            **costs[plan],
        }
        for plan in plans
    ]
    intervals = [{"plan": f"`{plan}`", **scores[plan], **means.get(plan, {})} for plan in plans]
    plots.bars(args.out / "nine.png", heights, title, label)
    tables = {"Scores": rows, "95 % intervals of the scores": intervals}
    return base.write_report(
        args.out, args, title, tables, ["nine.png"], began, notes, published, comparisons
    )


def _kinds(done: PlanResult) -> dict[str, Estimate]:
    figures = done.scored.score.more.items()
    return {name: done.scored.estimate(name) for name, v in figures if isinstance(v, float)}


def _mean(done: PlanResult) -> Estimate:
    """The mean of the scores of all kinds of question."""
    return estimate(average_of_groups([*done.scored.score.parts.values()]))


def _percent_of(estimate: Estimate, whole: float) -> Estimate:
    """The estimate in percent of `whole`; 0 if that is 0."""
    if not whole:
        return Estimate(0.0, None, None)
    low, high = (None if b is None else 100 * b / whole for b in (estimate.low, estimate.high))
    return Estimate(100 * estimate.value / whole, low, high)


def _ask_benchmarks(
    args: argparse.Namespace, plans: Mapping[str, TypedPlan]
) -> tuple[
    dict[str, dict[str, Estimate]], dict[str, dict[str, Any]], list[str], list[str], list[str]
]:
    """Ask the real benchmarks.

    Returns scores by plan and column, costs of the first benchmark by plan, notes on missing
    benchmarks, published figures and comparisons as text. Raises ValueError if all benchmarks are
    missing.
    """
    there, notes = {}, []
    for name in TASKS:
        try:
            task, _ = find_task(name, "lmms")
            there[name] = read_questions(task, args.data / name, "lmms", args.limit)
        except ValueError as error:
            notes.append(f"left out: {name}: {error}")
    if not there:
        raise ValueError(f"--data {args.data} has none of the benchmarks; {notes[0]}")
    benches = _open_benches(args, there)
    for bench in benches.values():  # before any question is asked
        bench.check(list(plans.values()))
    published, comparisons = list[str](), list[str]()
    scores: dict[str, dict[str, Estimate]] = {plan: {} for plan in plans}
    costs: dict[str, dict[str, Any]] = {}
    for name, bench in benches.items():
        done = base.ask_all(bench, plans)
        for plan, d in done.items():
            scores[plan][f"{name} {d.scored.score.metric}"] = d.scored.estimate()
            if name == "mme":
                scores[plan]["mme cognition"] = d.scored.estimate("cognition")
            costs.setdefault(plan, base.cost_columns(d))
        published += format_published(list(done.values()))
        comparisons += [f"{name}\n\n{t}" for t in base.compare_with_unpruned(bench, done)]
        if name == "mme":
            published += format_published([_cognition(d) for d in done.values()])
    return scores, costs, notes, published, comparisons


def _open_benches(
    args: argparse.Namespace, questions: Mapping[str, Sequence[Item]]
) -> dict[str, Bench]:
    """The benchmarks by name. They share one model."""
    found: dict[str, Bench] = {}
    for name, items in questions.items():
        changed = {**vars(args), "task": name, "protocol": "lmms", "data": args.data / name}
        own = argparse.Namespace(**{**changed, "out": base.answers_folder(args.out) / name})
        own.out.mkdir(parents=True, exist_ok=True)
        first = next(iter(found.values()), None)
        task = find_task(name, "lmms")[0]
        found[name] = replace(first, args=own, task=task, items=items) if first else Bench.open(own)
    return found


def _cognition(done: PlanResult) -> PlanResult:
    """A result of MME with cognition in place of perception as its value."""
    score = done.scored.score
    other = replace(score, metric="cognition", value=score.more["cognition"])
    return replace(done, scored=replace(done.scored, score=other))


def add_plans(parser: argparse.ArgumentParser) -> None:
    plans = ["fastv:k=3,r=0.5", "fastv:k=2,r=0.5", "random:keep=0.5"]
    parser.add_argument("--prune", nargs="+", default=plans, metavar="PLAN")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(__doc__ or "", argv, "nine", run, add_plans)


if __name__ == "__main__":
    sys.exit(main())
