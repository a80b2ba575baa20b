"""Simignore alone: the measure of similarity, and the number of image tokens kept.

    python -m eval.experiments.simignore --limit 200 --out DIR
    python -m eval.experiments.simignore --beside divprune ./mine.py:Mine --out DIR

The similarity of image and text rows is measured by cosine, Euclidean or Manhattan distance (arXiv
2412.09817, the ablations of the measure and of the number of ignored tokens). random and uniform
are the baselines with the same number of tokens, and --beside adds further methods.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from .. import plots
from ..plans import NONE, read_plan, read_plans
from ..run import format_published
from . import base
from .ablation import share

MEASURES = ("cosine", "euclidean", "manhattan")
BESIDE = "further methods that have the option keep, such as divprune or ./mine.py:Mine"


def run(args: argparse.Namespace) -> str:
    for method in args.beside:  # before anything is loaded
        read_plan(base.with_options(method, "keep=1"))
    began, bench = time.perf_counter(), base.open_bench(args)
    lines = {measure: f"simignore:measure={measure},keep=" for measure in MEASURES}
    others = ["random", "uniform", *args.beside]
    lines |= {method: base.with_options(method, "keep=") for method in others}
    N = bench.model.config.vision.num_patches
    counts = [max(1, round(N * s)) for s in args.share]
    plans = {(name, k): f"{stem}{k}" for name, stem in lines.items() for k in counts}
    done = base.ask_all(bench, read_plans([NONE, *plans.values()]))
    unpruned = done[NONE].scored.score
    rows = [
        {
            "choice": name,
            "image tokens": k,
            **base.score_columns(done[text]),
            **base.cost_columns(done[text]),
        }
        for (name, k), text in plans.items()
    ]
    title = f"Simignore: measure and budget, {len(bench.items)} questions of {args.task}"
    plots.curves(
        args.out / "budget.png",
        {n: [(k, done[plans[n, k]].scored.estimate()) for k in counts] for n in lines},
        title,
        ("image tokens kept", unpruned.metric),
        ("unpruned", done[NONE].scored.estimate()),
    )
    table = {f"unpruned: {unpruned.metric} {unpruned.value:.2f}, {N} image tokens": rows}
    published = format_published(list(done.values()))
    return base.write_report(
        args.out,
        args,
        title,
        table,
        ["budget.png"],
        began,
        published=published,
        comparisons=base.compare_with_unpruned(bench, done),
    )


def add_budgets(parser: argparse.ArgumentParser) -> None:
    shares = [0.125, 0.25, 0.5, 0.785, 0.9]
    parser.add_argument(
        "--share", type=share, nargs="+", default=shares, metavar="S", help="kept shares"
    )
    parser.add_argument("--beside", nargs="+", default=[], metavar="M", help=BESIDE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(__doc__ or "", argv, "simignore", run, add_budgets)


if __name__ == "__main__":
    sys.exit(main())
