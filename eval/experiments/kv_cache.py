"""The gain of a KV cache, and of pruning in addition: 300 tokens with and without.

    python -m eval.experiments.kv_cache --out DIR
    python -m eval.experiments.kv_cache --times 1 --new-tokens 30 --model HUB_ID --out DIR

One question is answered with exactly --new-tokens tokens (min_new_tokens): without a cache, so that
the whole sequence runs again for each token; with a cache; and with a cache and a plan that drops
tokens. Counted are the rows that pass through a decoder layer for the whole answer, mean over the
layers, and the bytes of the cache; seconds only for other tasks than the demo. The prompt contains
the image --times times. If it is longer than the model's positions, the
model gets more of them, because time and bytes are measured, not the answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from minillava import Batch
from minillava.app.command import parse_positive_int
from minillava.generate import generate
from minillava.request import Settings, check_plan, prompts_of

from .. import cost, plots, predict
from ..bench import Bench
from ..plans import NONE, TypedPlan, read_plan
from . import base

ROWS = "rows through a layer"
TIMES = ("seconds", "first token, s", "per token, ms")


def run(args: argparse.Namespace) -> str:
    began = time.perf_counter()
    unpruned, pruned = read_plan(NONE), read_plan(args.prune)
    bench = base.open_bench(argparse.Namespace(**{**vars(args), "limit": 1}))
    variants = {
        "no cache": (unpruned, False),
        "cache": (unpruned, True),
        f"cache, {args.prune}": (pruned, True),
    }
    for times in args.times:  # before any question is asked
        for plan in (unpruned, pruned):
            _check(bench, plan, times, args.new_tokens)
    rows = []
    for times in args.times:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for _ in range(args.repeats):
            for name, (plan, cached) in variants.items():
                found[name].append(_answer(bench, plan, cached, times, args.new_tokens))
        for name, runs in found.items():
            rows.append({"picture": f"x {times}", "": name, **_with_spreads(args.task, runs)})
    title = f"{args.new_tokens} new tokens with and without a KV cache"
    shown = {"rows": ROWS, **base.timed(args.task, {"seconds": "seconds"}), "cache": "cache, MB"}
    for plot, column in shown.items():
        heights: dict[str, dict[str, float | cost.Spread]] = {}
        for row in rows:
            heights.setdefault(f"picture {row['picture']}", {})[row[""]] = row[column]
        if plot == "cache":
            heights = {g: {n: v for n, v in bars.items() if v} for g, bars in heights.items()}
        plots.bars(args.out / f"{plot}.png", heights, title, column, log=plot != "cache")
    notes = ["Cache: keys and values of all rows at the end, in bytes of the arithmetic's dtype."]
    if args.task != "demo":
        notes.append(f"Times: medians and quartiles of {args.repeats} runs, in turns.")
    files = [f"{plot}.png" for plot in shown]
    return base.write_report(args.out, args, title, {"One question": rows}, files, began, notes)


def _with_spreads(task: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several equal runs: counts of the first, times of all."""
    times = {c: cost.Spread.of([run[c] for run in runs]) for c in TIMES}
    counts = {c: v for c, v in runs[0].items() if c not in TIMES}
    return {**counts, **base.timed(task, times)}


def _batch(bench: Bench, plan: TypedPlan, times: int, new_tokens: int) -> Batch:
    """The first question with its image `times` times. The model gets the positions it needs."""
    item = replace(bench.items[0], images=bench.items[0].images * times)
    batch = predict.batch_of(bench.processor, [item], bench.run(plan))
    config, needed = bench.model.config, batch.ids.shape[1] + new_tokens
    if needed > config.text.max_position_embeddings:
        text = replace(config.text, max_position_embeddings=needed)
        bench.model.config = replace(config, text=text)
    return batch


def _check(bench: Bench, plan: TypedPlan, times: int, new_tokens: int) -> None:
    """Refuse a plan that cannot run on a prompt (ValueError)."""
    prompts = prompts_of(bench.model, _batch(bench, plan, times, new_tokens))
    settings = Settings(new_tokens, new_tokens, (), 0.0, 1.0, bench.args.seed)
    config = bench.model.config
    resolved = plan.plan.resolve(config.text.num_hidden_layers, config.vision.num_patches)
    check_plan(bench.model, prompts, resolved, settings)


def _answer(
    bench: Bench, plan: TypedPlan, cached: bool, times: int, new_tokens: int
) -> dict[str, Any]:
    model, run, batch = bench.model, bench.run(plan), _batch(bench, plan, times, new_tokens)
    began = time.perf_counter()
    result = generate(
        model,
        batch,
        plan.plan,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        seed=run.seed,
        use_cache=cached,
    )
    seconds = time.perf_counter() - began
    report = result.report
    held = [n + new_tokens - 1 for (n,) in report.cache_lengths] if cached else []
    return {
        "prompt tokens": report.prompt_tokens[0],
        ROWS: _rows_computed(report.tokens_entering, new_tokens, cached),
        "seconds": seconds,
        "first token, s": report.first_token,
        "per token, ms": 1e3 * report.per_token,
        "cache after the prefill, MB": report.cache_bytes / 1e6,
        "cache, MB": cost.cache_bytes(held, model.config.text, model.dtype.itemsize) / 1e6,
    }


def _rows_computed(entering: Sequence[Sequence[int]], new_tokens: int, cached: bool) -> float:
    """Rows that pass through a layer for a whole answer, mean over the layers.

    entering [layer][0] in the prefill. Each further token is one more row; without a cache, all
    rows before it are computed again.
    """
    later = new_tokens - 1
    again = 0 if cached else later
    rows = [n * (1 + again) + (later if cached else later * (later + 1) // 2) for (n,) in entering]
    return sum(rows) / len(rows)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--new-tokens", type=parse_positive_int, default=300, metavar="N")
    add(
        "--times",
        type=parse_positive_int,
        nargs="+",
        default=[1, 10],
        metavar="X",
        help="images in the prompt, default 1 and 10",
    )
    add("--prune", default="fastv:k=2,r=0.5", metavar="PLAN")
    add("--repeats", type=parse_positive_int, default=3)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(
        __doc__ or "", argv, "kv_cache", run, add_cache_options, batch=1, seeds=False
    )


if __name__ == "__main__":
    sys.exit(main())
