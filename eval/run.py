"""Ask a model the questions of a benchmark under one plan or several, score, and compare.

    python -m eval.run --task demo --limit 100 --prune none fastv:k=3,r=0.5 --out results/demo
    python -m eval.run --task scienceqa --data DIR --model llava-hf/llava-1.5-7b-hf \\
        --prune none simignore-7b --out results/scienceqa
    torchrun --nproc-per-node 2 -m eval.run --task gqa --data DIR --model M --out DIR

For each plan, --out gets PLAN.jsonl, a line for each answer as soon as it is there, in the shape of
LLaVA's answer files; and PLAN.json with the settings, the score and the costs. The same command
again goes on where an interruption has cut it off. summary.md has the table that is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from minillava.app import command as console
from minillava.app.command import CommandParser as Parser

from . import cost, predict, published, store
from .bench import Bench, Done, add_options
from .predict import NONE
from .ranks import Ranks, ranks


def run(args: argparse.Namespace, among: Ranks) -> list[Done]:
    """All plans of --prune in their order; in the first process also the table in --out."""
    plans = list(dict.fromkeys(args.prune))
    for plan in plans:
        predict.plan_of(plan)  # before anything is loaded
    bench = Bench.open(args, among)
    among.together(lambda: bench.check(plans))
    done = [bench.ask(plan) for plan in plans]
    among.first(lambda: store.write_whole(args.out / "summary.md", text_of(done, among) + "\n"))
    return done


# ---------------------------------------------------------------- output


def table(done: Sequence[Done]) -> str:
    """Markdown, one line a plan."""
    score = done[0].scored.score
    head = """plan | {metric} | questions | unparsed | image tokens a layer | FastV's FLOPs |
        SparseVLM's FLOPs | GFLOPs | vision s | prefill s | first token s | per token ms |
        choosing | cache MB | peak GB"""
    names = [" ".join(name.split()) for name in head.format(metric=score.metric).split("|")]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for d in done:
        c = d.costs
        cells = [
            f"`{d.run.plan}`",
            f"{d.scored.score.value:.2f}",
            str(d.scored.score.n),
            str(d.scored.score.unparsed),
            f"{c.image_tokens:.1f}",
            f"{100 * c.fastv_share:.1f} %",
            f"{100 * c.sparsevlm_share:.1f} %",
            f"{c.flops / 1e9:.2f}",
            _time(c.vision),
            _time(c.prefill),
            _time(c.first_token),
            _time(c.per_token, 1e3),
            "-" if c.choosing_share is None else f"{100 * c.choosing_share:.1f} %",
            f"{c.cache_bytes / 1e6:.2f}",
            "-" if c.peak_bytes is None else f"{c.peak_bytes / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(spread: cost.Spread | None, unit: float = 1.0) -> str:
    """Median and quartiles."""
    if spread is None:
        return "-"
    return f"{spread.median * unit:.4g} ({spread.low * unit:.4g}-{spread.high * unit:.4g})"


def text_of(done: Sequence[Done], among: Ranks) -> str:
    """What was asked and how, the table, and published figures that may stand beside it."""
    first, c = done[0], done[0].costs
    run = first.run
    head = (
        f"{first.scored.title}, {first.scored.split}: {c.questions} questions, {run.protocol} "
        f"protocol ({run.template}, {run.aspect}, {run.max_new_tokens} new tokens); {run.model}, "
        f"{run.quantize or run.dtype or 'default dtype'} on {run.device}, seed {run.seed}; "
        f"{among.size} process{'es' * (among.size > 1)}, batches of {c.batch}, "
        f"{torch.get_num_threads()} threads; times: median (quartiles) of a batch"
    )
    parts = [head, table(done)]
    parts += [d.scored.text() for d in done]
    parts += published_of(done)
    return "\n\n".join(parts)


def published_of(done: Sequence[Done]) -> list[str]:
    """Tables of published figures, if the model is one that has them."""
    name = done[0].run.model.lower().replace("v1.5", "1.5")
    model = next((m for m in published.LAYERS if m in name), None)
    if model is None:
        return []
    measured = [
        published.Measured(
            d.scored.task,
            d.scored.split,
            d.scored.score.metric,
            model,
            d.run.plan,
            d.scored.protocol,
            d.run.quantize or published.UNQUANTISED,
            d.scored.score.value,
        )
        for d in done
    ]
    tables = published.beside(measured, published.load())
    return [published.text_of(t) for t in tables if t.sources]


def warnings(done: Sequence[Done]) -> list[str]:
    """Plans whose prefill took no less time than the unpruned one's."""
    whole = next((d.costs.prefill for d in done if d.run.plan == NONE), None)
    if whole is None:
        return []
    return [
        f"{d.run.plan} does not pay here: its prefill takes "
        f"{d.costs.prefill.median / whole.median:.2f} times as long as the unpruned one"
        for d in done
        if d.run.plan != NONE and d.costs.prefill and d.costs.prefill.median >= whole.median
    ]


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument(
        "--prune", nargs="+", default=[NONE], metavar="PLAN", help=f"{NONE}: unpruned"
    )
    parser.add_argument("--json", action="store_true", help="a list with every number")

    def act(args: argparse.Namespace, among: Ranks) -> None:
        done = run(args, among)
        if among.rank:
            return
        print(
            json.dumps([d.json() for d in done]) if args.json else text_of(done, among), flush=True
        )
        for line in warnings(done):
            print(f"warning: {line}", file=sys.stderr)

    return command(parser, argv, act)


def command(
    parser: Parser, argv: Sequence[str] | None, act: Callable[[argparse.Namespace, Ranks], None]
) -> int:
    """Parse, and act alone in --out; returns the exit code of run_command. Of several processes
    the first speaks for all."""

    def run() -> None:
        args = parser.parse_args(argv)
        with ranks() as among:
            try:
                with store.locked(args.out) if among.rank == 0 else nullcontext():
                    act(args, among)
            except KeyboardInterrupt:
                if among.rank == 0:
                    print("stopped; the same command goes on from here", file=sys.stderr)
                raise
            except (ValueError, OSError):
                if among.rank:
                    sys.exit(2)
                raise

    return console.run_command(run)


if __name__ == "__main__":
    sys.exit(main())
