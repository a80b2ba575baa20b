"""Score, time to the first token and memory of FastV, with 16-bit and with 4-bit weights.

    python -m eval.experiments.aokvqa --limit 200 --out DIR
    python -m eval.experiments.aokvqa --task aokvqa --data DIR --model HUB_ID --out DIR

This is the table of FastV's README (arXiv 2403.06764): K=2, R = 25, 50 and 75 %, one question at a
time. As there, 4-bit means bitsandbytes' nf4 with double quantisation, in the decoder and the
projector. There, memory is that of a GPU and arithmetic is in float16. Here, a CPU computes in
float32, and memory is that of the first question's prompt and first token, in two columns. The
computed memory is the sum of the weights as they are held, the cache and the peak of the
activations. The measured memory, on a CPU, is the peak of resident memory of a separate process
minus what it held before the model was loaded; it includes the library's own memory (memory.py).
The column for CUDA is empty unless it was measured. --prune adds further plans.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .. import plots
from ..plans import NONE, read_plans
from ..results import PlanResult
from ..run import format_published
from . import base
from .memory import Memory, measure_peaks, memory_of

FORMATS = {
    "16-bit": {"dtype": "float16", "quantize": None},
    "4-bit": {"dtype": None, "quantize": "nf4"},
}
PLANS = {NONE: None, **{f"fastv:k=2,r={r / 100:g}": r for r in (25, 50, 75)}}  # -> R in percent


def run(args: argparse.Namespace) -> str:
    began, rows, published, comparisons = time.perf_counter(), [], [], []
    plans = read_plans([*PLANS, *args.prune])
    for form, settings in FORMATS.items():
        own = base.with_format(args, **settings)
        measured = measure_peaks(own, list(plans))  # before this process holds a model
        bench = base.open_bench(own)
        done = base.ask_all(bench, plans)
        rows += [
            _row(form, done[text], memory_of(bench, plan, peak))
            for (text, plan), peak in zip(plans.items(), measured, strict=True)
        ]
        published += format_published(list(done.values()))
        comparisons += [
            f"{form} weights\n\n{text}" for text in base.compare_with_unpruned(bench, done)
        ]
        metric = done[NONE].scored.score.metric
        del bench, done
    title = f"FastV at K=2 on {args.task}"
    named_rows = {f"{row['weights']}\n{_bar_label(row)}": row for row in rows}
    below = f"{title}; below: R in %"
    shown = {"score": [metric], "memory": [f"{m}, MB" for m in MEMORIES]}
    for plot, columns in shown.items():
        there = [c for c in columns if all(row[c] is not None for row in rows)]
        heights = {
            name: {c: row[base.INTERVAL if c == metric else c] for c in there}
            for name, row in named_rows.items()
        }
        label = "MB" if plot == "memory" else columns[0]
        plots.bars(args.out / f"{plot}.png", heights, below, label)
    tables = {"One question at a time": rows}
    plot_files = ["score.png", *base.time_plots(args.out, named_rows, below), "memory.png"]
    return base.write_report(
        args.out,
        args,
        title,
        tables,
        plot_files,
        began,
        published=published,
        comparisons=comparisons,
    )


MEMORIES = ("memory computed", "memory measured")


def _row(form: str, result: PlanResult, memory: Memory) -> dict[str, Any]:
    return {
        "weights": form,
        "R, %": PLANS.get(result.run.plan),
        **base.score_columns(result),
        **base.cost_columns(result),
        "weights, MB": memory.weights / 1e6,
        "cache, MB": memory.cache / 1e6,
        "activations, MB": memory.activations / 1e6,
        "memory computed, MB": memory.computed / 1e6,
        "memory measured, MB": _mb(memory.measured),
        "CUDA memory, MB": _mb(memory.cuda),
        "plan": f"`{result.run.plan}`",
    }


def _bar_label(row: Mapping[str, Any]) -> str:
    """The label of a bar: R in percent, "unpruned", or the plan if it has no R."""
    plan = row["plan"].strip("`")
    return "unpruned" if plan == NONE else str(row["R, %"] or plan)


def _mb(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(__doc__ or "", argv, "aokvqa", run, base.add_prune, batch=1)


if __name__ == "__main__":
    sys.exit(main())
