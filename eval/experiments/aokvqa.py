"""Score, time to the first token and memory under FastV, with 16-bit and with 4-bit weights.

    python -m eval.experiments.aokvqa --limit 200 --out DIR
    python -m eval.experiments.aokvqa --task aokvqa --data DIR --model HUB_ID --out DIR

The table of FastV's README (arXiv 2403.06764): K=2, R = 25, 50 and 75 %, one question at a time.
There, memory is that of a GPU and 4-bit is bitsandbytes nf4; here it is this process's, and 4-bit
is our int4. Memory is given twice: computed (weights as they are held, cache, and the largest
moment of the activations), and measured (the peak of resident memory less what was there before the
model was loaded, with the library's own buffers). The column for CUDA is empty unless measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from minillava.linear import weight_bytes

from .. import cost, plots
from ..bench import Bench, Done
from ..predict import NONE
from . import base

FORMS = {
    "16-bit": {"dtype": "float16", "quantize": None},
    "4-bit": {"dtype": None, "quantize": "int4"},
}
PLANS = {NONE: None, **{f"fastv:k=2,r={r / 100:g}": r for r in (25, 50, 75)}}  # -> R in percent


def run(args: argparse.Namespace) -> str:
    began, rows = time.perf_counter(), []
    for form, settings in FORMS.items():
        before = cost.resident_bytes()
        bench = base.bench(base.with_form(args, **settings))
        done = base.ask_all(bench, list(PLANS))
        rows += [_row(form, bench, d, before) for d in done.values()]
        metric = done[NONE].scored.score.metric
        first = next(name for name in rows[0] if name.startswith("first token"))
        del bench, done
    title = f"FastV at K=2 on {args.task}: score, first token, memory"
    names = [f"{row['weights']}\n{row['R, %'] or 'unpruned'}" for row in rows]
    for picture, column in (("score", metric), ("first_token", first)):
        heights = {n: {column: row[column]} for n, row in zip(names, rows, strict=True)}
        plots.bars(args.out / f"{picture}.png", heights, f"{title}; below: R in %", column)
    tables = {"One question at a time": rows}
    return base.report(args.out, args, title, tables, ["score.png", "first_token.png"], began)


def _row(form: str, bench: Bench, done: Done, before: int) -> dict[str, Any]:
    config, itemsize, c = bench.model.config, bench.model.dtype.itemsize, done.costs
    weights, peak = weight_bytes(bench.model), c.peak_bytes
    activations = cost.activation_bytes(round(c.prompt_tokens), config, itemsize)
    on_cpu = bench.model.device.type == "cpu"
    return {
        "weights": form,
        "R, %": PLANS[done.run.plan],
        **base.unparsed(done),
        **base.costs(done),
        "weights, MB": weights / 1e6,
        "memory computed, MB": (weights + c.cache_bytes + activations) / 1e6,
        "memory measured, MB": (peak - before) / 1e6 if peak and on_cpu else None,
        "CUDA memory, MB": None if on_cpu or peak is None else peak / 1e6,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(__doc__ or "", argv, "aokvqa", run, batch=1)


if __name__ == "__main__":
    sys.exit(main())
