"""The parts that experiments share: their command line, and how they write their results.

Each experiment asks the questions of a benchmark under several plans, as eval.run does. The default
is the digit scenes of the demo, which takes minutes on any machine; --task, --data and --model
select a real benchmark. Answers are kept in --out/answers, and an interrupted command continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minillava.app.command import CommandParser
from minillava.app.ranks import Ranks

from .. import comparison, cost, plots, store
from ..answers import Answers, read_answers
from ..bench import Bench, add_options
from ..plans import NONE, TypedPlan, file_name
from ..results import PlanResult, read_result
from ..run import add_seeds, read_seeds, run_locked
from ..score import find_task
from ..statistics import Estimate

Row = Mapping[str, Any]

INTERVAL = "95 %"  # the column of intervals
SEEDS = (0, 1_000_000, 2_000_000)  # apart by more than a benchmark has questions


def experiment(
    doc: str,
    argv: Sequence[str] | None,
    name: str,
    act: Callable[[argparse.Namespace], str],
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    batch: int = 32,
    seeds: bool = True,
) -> int:
    """Run the command of an experiment; returns its exit code.

    act: does the work and returns the text to print. more: adds further options. seeds: whether
    plans that draw random numbers are asked with several.
    """
    parser = CommandParser(
        prog=f"python -m eval.experiments.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, batch)
    if seeds:
        apart = ", ".join(map(str, SEEDS))
        add_seeds(parser, f"of plans that draw at random; default --seed plus {apart}")
    more(parser)

    def run(args: argparse.Namespace, ranks: Ranks) -> None:
        if ranks.size > 1:
            raise ValueError("an experiment runs in one process; use torchrun with eval.run only")
        plots.require_matplotlib()
        if seeds:
            args.seeds = read_seeds(args) if args.seeds else [args.seed + more for more in SEEDS]
            args.seed = args.seeds[0]
        print(act(args), flush=True)

    return run_locked(parser, argv, run)


def open_bench(args: argparse.Namespace) -> Bench:
    """Open the benchmark, with its answers in --out/answers."""
    changed = {**vars(args), "out": answers_folder(args.out)}
    return Bench.open(argparse.Namespace(**changed))


def answers_folder(out: Path) -> Path:
    """Create the folder of the answers."""
    folder = out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_format(args: argparse.Namespace, **form: str | None) -> argparse.Namespace:
    """The same arguments with another dtype or quantize, and a separate folder for the answers."""
    folder = args.out / "_".join(v for v in form.values() if v)
    return argparse.Namespace(**{**vars(args), **form, "out": folder})


def compare_with_unpruned(bench: Bench, done: Mapping[str, PlanResult]) -> list[str]:
    """Tables of the plans minus the unpruned one, and of their agreement with it, as text.

    done: the results by plan, from ask_all. Empty without right answers.
    """
    results = [done[NONE], *(result for text, result in done.items() if text != NONE)]
    if results[0].scored.estimate().low is None:
        return []
    plans = [_answers(bench, result.run.plan) for result in results]
    pairs = comparison.compare_all(plans, all_pairs=False)
    metric = results[0].scored.score.metric
    tables = [
        comparison.format_seeds(plans, metric),
        comparison.format_pairs(pairs, metric),
        comparison.format_agreement(plans),
    ]
    return list(filter(None, tables))


def ask_all(bench: Bench, plans: Mapping[str, TypedPlan]) -> dict[str, PlanResult]:
    """The results of plans, by text; those that draw at random with the mean score of all seeds.

    All are checked before the first is asked (ValueError).
    """
    _, *more = bench.args.seeds
    for each in (bench, *map(bench.with_seed, more)):
        each.check(list(plans.values()))
    found = {text: bench.ask_with_seeds(plan, more) for text, plan in plans.items()}
    return {
        text: replace(result, scored=_answers(bench, text).scored) if result.draws else result
        for text, result in found.items()
    }


def _answers(bench: Bench, plan: str) -> Answers:
    """The answers under a plan, with all its seeds of this command."""
    result = read_result(Path(bench.args.out) / f"{file_name(plan)}.jsonl")
    return read_answers(Path(bench.args.out), result, bench.task, bench.items)


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add --prune, for plans in addition to those of the experiment."""
    more = "further plans, also of a method in a file: ./mine.py:Mine:keep=16"
    parser.add_argument("--prune", nargs="+", default=[], metavar="PLAN", help=more)


def with_options(method: str, options: str) -> str:
    """Append options to a method, which may have some already.

    "./mine.py:Mine", "keep=9" -> "./mine.py:Mine:keep=9"
    """
    given = method.rpartition(".py:")[2]
    return f"{method}{',' if ':' in given else ':'}{options}"


def write_report(
    out: Path,
    args: argparse.Namespace,
    title: str,
    tables: Mapping[str, Sequence[Row]],
    plot_files: Sequence[str],
    began: float,
    notes: Sequence[str] = (),
    published: Sequence[str] = (),
    comparisons: Sequence[str] = (),
) -> str:
    """Write results.json and results.md, and return the text of results.md.

    tables: title -> rows, which have the same columns. published: tables of comparable published
    figures, as text. comparisons: tables of plans compared on the same questions, as text.
    """
    name, (_, protocol) = Path(args.model).name, find_task(args.task, args.protocol)
    threads = torch.get_num_threads()
    setting = (
        f"{args.task}, {protocol} protocol, {name}, seed {args.seed}, "
        f"{threads} thread{'s' * (threads > 1)}, torch {torch.__version__.partition('+')[0]}; "
        f"{time.perf_counter() - began:.0f} s for what earlier runs had not done"
    )
    parts = [f"# {title}", setting, *notes]
    for heading, rows in tables.items():
        parts += [f"## {heading}", format_table(rows)]
    if comparisons:
        parts += ["## Plans compared on the same questions", *comparisons]
    if published:
        parts += ["## Beside published figures", *(f"```\n{t}\n```" for t in published)]
    parts += [f"![{Path(p).stem}]({p})" for p in plot_files]
    text = "\n\n".join(parts) + "\n"
    found = {"title": title, "setting": setting, "notes": list(notes), "tables": tables}
    found |= {"published": list(published)} if published else {}
    found |= {"comparisons": list(comparisons)} if comparisons else {}
    store.write_atomically(
        out / "results.json", json.dumps(found, indent=1, ensure_ascii=False, default=asdict) + "\n"
    )
    store.write_atomically(out / "results.md", text)
    return text


def format_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table. Numbers have two decimals; below 1 they have three digits.

    A Spread is its median and, in brackets, its quartiles; an Estimate is its interval.
    """
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, cost.Spread):
        return f"{_cell(value.median)} [{_cell(value.low)}, {_cell(value.high)}]"
    if isinstance(value, Estimate):
        return str(value)
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"
    return str(value)


def cost_columns(result: PlanResult) -> dict[str, Any]:
    """The columns of costs that every table has; times as Spread."""
    c = result.costs
    many = f" of {c.batch}" if c.batch > 1 else ""
    return {
        "image tokens a layer": c.image_tokens,
        "FastV's FLOPs, %": 100 * c.fastv_share,
        **timed(result.run.task, {f"first token{many}, s": c.first_token}),
        "cache, MB": c.cache_bytes / 1e6,
    }


def timed(task: str, columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """Columns of times. The demo has none: its prompts take milliseconds, which are noise."""
    return {} if task == "demo" else columns


def time_plots(out: Path, rows: Mapping[str, Row], title: str) -> list[str]:
    """Draw the times to the first token, if the rows have them; returns the names of the files.

    rows: name of the bar -> row.
    """
    found = [c for c in next(iter(rows.values())) if c.startswith("first token")]
    if not found:
        return []
    (column,) = found
    heights = {name: {column: row[column]} for name, row in rows.items()}
    plots.bars(out / "first_token.png", heights, title, column)
    return ["first_token.png"]


def score_columns(result: PlanResult) -> dict[str, Any]:
    """The columns of the score that every table has."""
    score = result.scored.score
    return {
        score.metric: score.value,
        INTERVAL: result.scored.estimate(),
        "unparsed": score.unparsed,
        "questions": score.n,
    }
