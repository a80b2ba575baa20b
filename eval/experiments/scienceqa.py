"""ScienceQA with Simignore as released: score and time to the first token.

    python -m eval.experiments.scienceqa --limit 200 --out DIR
    python -m eval.experiments.scienceqa --task scienceqa --data DIR --model HUB_ID --out DIR

Table 1 of arXiv 2412.09817 has the unpruned model and the preset for its size: simignore-7b or
simignore-13b, which are Simignore's mask and then FastV. This table also has each part alone, and
the same number of tokens at random. A model of another shape, such as the demo, uses the 7B setting
in proportion. --prune adds further plans.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from .. import plots
from ..bench import Bench
from ..plans import NONE, read_plans
from ..run import format_published
from . import base

PRESETS = {32: "simignore-7b", 40: "simignore-13b"}  # by decoder layers


def plans(bench: Bench) -> dict[str, str]:
    """The name of each row -> its plan."""
    config = bench.model.config
    N, n_layers = config.vision.num_patches, config.text.num_hidden_layers
    left, after = round(N * 452 / 576), round(N * 144 / 576)
    layer = max(2, round(n_layers * 5 / 32))
    both = f"simignore:keep={left}+fastv:layer={layer},keep={after}"
    if N == 576 and n_layers in PRESETS:
        both = PRESETS[n_layers]
    return {
        "unpruned": NONE,
        "Simignore and FastV": both,
        "Simignore alone": f"simignore:keep={left}",
        "FastV alone": f"fastv:layer={layer},keep={after}",
        "random, as many": f"random:keep={after}",
    }


def run(args: argparse.Namespace) -> str:
    further = read_plans(args.prune)  # before anything is loaded
    began, bench = time.perf_counter(), base.open_bench(args)
    own = plans(bench)
    named = {**own, **dict(zip(further, further, strict=True))}
    done = base.ask_all(bench, {**read_plans(own.values()), **further})
    rows = [
        {
            "": name,
            **base.score_columns(done[text]),
            **base.cost_columns(done[text]),
            **base.timed(args.task, {"prefill, s": done[text].costs.prefill}),
            "plan": f"`{text}`",
        }
        for name, text in named.items()
    ]
    metric = done[NONE].scored.score.metric
    title, named_rows = f"Simignore on {args.task}", {row[""]: row for row in rows}
    heights = {name: {metric: row[base.INTERVAL]} for name, row in named_rows.items()}
    plots.bars(args.out / "score.png", heights, title, metric)
    plot_files = ["score.png", *base.time_plots(args.out, named_rows, title)]
    tables = {"One question at a time": rows}
    published = format_published(list(done.values()))
    return base.write_report(
        args.out,
        args,
        title,
        tables,
        plot_files,
        began,
        published=published,
        comparisons=base.compare_with_unpruned(bench, done),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(__doc__ or "", argv, "scienceqa", run, base.add_prune, batch=1)


if __name__ == "__main__":
    sys.exit(main())
