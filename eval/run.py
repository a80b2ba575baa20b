"""Ask a model the questions of a benchmark under one or more plans, score and compare them.

    python -m eval.run --task demo --limit 100 --prune none fastv:k=3,r=0.5 --out results/demo
    python -m eval.run --prune none random:keep=16 --seeds 0 1 2 --out results/demo
    python -m eval.run --task scienceqa --data DIR --model llava-hf/llava-1.5-7b-hf \\
        --prune none simignore-7b --out results/scienceqa
    torchrun --nproc-per-node 2 -m eval.run --task gqa --data DIR --model M --out DIR

For each plan, --out receives PLAN.jsonl with one line for each answer, in the format of LLaVA's
answer files, and PLAN.json with the settings, the score and the costs. Each answer is written at
once, and the same command continues after an interruption. summary.md holds the printed table,
with the plans of earlier calls that answered the same questions under the same settings: every
score with its 95 % interval, and the plans compared with each other on the same questions.

--seeds asks the plans that draw at random once for each seed; the answers of the second and further
seeds go to --out/seed-SEED. Their score is the mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from minillava.app.command import CommandParser, end_program, parse_int, run_command
from minillava.app.ranks import Ranks, process_group

from . import comparison, cost, published, results, store
from .answers import Answers, read_answers
from .bench import Bench, add_options
from .downsample import NAME, budget_of, read_downsampling
from .plans import NONE, TypedPlan, read_plan
from .results import PlanResult
from .statistics import CONFIDENCE, describe_too_few
from .summary import Costs


@dataclass(frozen=True)
class Asked:
    """The results of all plans of --prune, in their order, and the benchmark they are of."""

    bench: Bench
    results: list[PlanResult]


def run(args: argparse.Namespace, ranks: Ranks) -> Asked:
    """Ask and score all plans of --prune; those that draw at random with every seed."""
    first, *more = read_seeds(args)
    args = argparse.Namespace(**{**vars(args), "seed": first})
    plans = _read_plans(args.prune)  # before anything is loaded
    bench = Bench.open(args, ranks)
    for each in (bench, *map(bench.with_seed, more)):
        ranks.gather(lambda each=each: each.check(list(plans.values())))  # type: ignore[misc]
    found: dict[str, PlanResult] = {}
    for text in sorted(plans, key=lambda text: text != NONE):  # KLs are from the unpruned answers
        found[text] = bench.ask_with_seeds(plans[text], more)
    return Asked(bench, [found[text] for text in plans])


def _read_plans(texts: Sequence[str]) -> dict[str, TypedPlan]:
    """The plans by text, `downsample:keep=T` among them."""
    return {text: read_downsampling(text) or read_plan(text) for text in dict.fromkeys(texts)}


def add_seeds(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --seeds. text: its help."""
    parser.add_argument("--seeds", type=parse_int, nargs="+", metavar="S", help=text)


def read_seeds(args: argparse.Namespace) -> list[int]:
    """The seeds of --seeds, or the one of --seed. Raises ValueError for mistakes."""
    if args.seeds is None:
        return [args.seed]
    seeds = list(dict.fromkeys(args.seeds))
    if len(seeds) < len(args.seeds) or len(seeds) < 2:
        raise ValueError(
            f"--seeds {' '.join(map(str, args.seeds))}: give two or more different seeds, such as "
            "--seeds 0 1 2, or one with --seed"
        )
    if args.seed not in (0, seeds[0]):
        raise ValueError(f"--seed {args.seed} and --seeds cannot both be given; give --seeds alone")
    return seeds


# ---------------------------------------------------------------- output


def format_table(found: Sequence[PlanResult], plans: Sequence[Answers] = ()) -> str:
    """The results as a Markdown table, a line for each plan.

    plans: their answers, for scores that are means over seeds.
    """
    score = found[0].scored.score
    scores = {answers.plan: answers.scored for answers in plans}
    head = """plan | {metric} | 95 % | questions | unparsed | image tokens a layer | FastV's FLOPs |
        SparseVLM's FLOPs | GFLOPs | vision s | prefill s | first token s | per token ms |
        choosing | cache MB | peak GB"""
    names = [" ".join(name.split()) for name in head.format(metric=score.metric).split("|")]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for result in found:
        c, scored = result.costs, scores.get(result.run.plan, result.scored)
        estimate, score = scored.estimate(), scored.score
        cells = [
            f"`{result.run.plan}`",
            f"{estimate.value:.2f}",
            str(estimate),
            str(score.n),
            f"{score.unparsed:g}",
            _image_tokens(c),
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


def _image_tokens(c: Costs) -> str:
    """The mean over questions. Where they differ also their quartiles, and what none can exceed."""
    each, most = c.image_tokens_each, c.image_tokens_most
    if each.low == each.high:
        return f"{c.image_tokens:.1f}"
    cap = "" if most is None else f", at most {most:.1f}"
    return f"{c.image_tokens:.1f} ({each.low:.1f}-{each.high:.1f}{cap})"


def _time(spread: cost.Spread | None, unit: float = 1.0) -> str:
    """A median with its quartiles."""
    if spread is None:
        return "-"
    return f"{spread.median * unit:.4g} ({spread.low * unit:.4g}-{spread.high * unit:.4g})"


def format_summary(
    found: Sequence[PlanResult], left_out: Mapping[str, str], plans: Sequence[Answers] = ()
) -> str:
    """What was asked and how, the table, its notes, and published figures for comparison.

    left_out: plan -> why the folder's result of this plan is not in the table. plans: the answers
    of the results, which are compared.
    """
    run, c = found[0].run, found[0].costs
    processes = found[0].processes
    head = (
        f"{found[0].scored.title}, {found[0].scored.split}: {c.questions} "
        f"question{'s' * (c.questions != 1)}, "
        f"{run.protocol} protocol ({run.template}, {run.aspect}, {run.max_new_tokens} new tokens); "
        f"{run.model}, {run.quantize or run.dtype or 'default dtype'} on {run.device}, "
        f"seed {run.seed}; {processes} process{'es' * (processes > 1)}, batches of {c.batch}, "
        f"{torch.get_num_threads()} threads; times: median (quartiles) of a batch"
    )
    notes = [f"`{plan}` is not in this table: {reason}" for plan, reason in left_out.items()]
    notes += [
        f"`{result.run.plan}`: {file} with sha256 {sha256[:12]}"
        for result in found
        for file, sha256 in (result.run.method_files or {}).items()
    ]
    if few := describe_too_few(found[0].scored.score.n, CONFIDENCE):
        notes.append(few)
    parts = [head, format_table(found, plans), *notes, *_comparisons(found, plans)]
    scores = {answers.plan: answers.scored for answers in plans}
    for result in found:
        plan = result.run.plan
        parts.append(f"`{plan}`: {scores.get(plan, result.scored).text()}")
    parts += format_published(found)
    return "\n\n".join(parts)


def _comparisons(found: Sequence[PlanResult], plans: Sequence[Answers]) -> list[str]:
    """The plans compared, their spread over seeds and their agreement with the unpruned model."""
    metric, ordered = found[0].scored.score.metric, comparison.unpruned_first(plans)
    parts = [comparison.format_seeds(plans, metric)]
    if len(plans) > 1:
        parts.append(comparison.format_pairs(comparison.compare_all(ordered), metric))
        parts.append(comparison.format_agreement(ordered))
    return list(filter(None, parts))


def format_published(found: Sequence[PlanResult]) -> list[str]:
    """The measured figures beside published ones, if there are any for this model."""
    name = found[0].run.model.lower().replace("v1.5", "1.5")
    model = next((m for m in published.LAYERS if m in name), None)
    if model is None:
        return []
    measured = [
        published.Measured(
            result.scored.task,
            result.scored.split,
            result.scored.score.metric,
            model,
            result.run.plan,
            result.scored.protocol,
            result.run.quantize or published.UNQUANTISED,
            result.scored.score.value,
        )
        for result in found
        if not budget_of(result.run.plan)
    ]
    return published.format_comparison(measured)


def describe_slow_plans(found: Sequence[PlanResult]) -> list[str]:
    """A line for each plan whose prefill is not faster than the unpruned one."""
    unpruned = next((r.costs.prefill for r in found if r.run.plan == NONE), None)
    if unpruned is None:
        return []
    return [
        f"{r.run.plan} does not pay off here: its prefill takes "
        f"{r.costs.prefill.median / unpruned.median:.2f} times as long as the unpruned one"
        for r in found
        if r.run.plan != NONE
        and not budget_of(r.run.plan)
        and r.costs.prefill
        and r.costs.prefill.median >= unpruned.median
    ]


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument(
        "--prune",
        nargs="+",
        default=[NONE],
        metavar="PLAN",
        help=f"plans to compare; {NONE} is the unpruned model, {NAME}:keep=T the unpruned model on "
        "a picture shrunk to the detail of T tokens",
    )
    add_seeds(parser, "two or more seeds, instead of --seed, for plans that draw at random")
    parser.add_argument("--json", action="store_true", help="print a JSON list with every number")

    return run_locked(parser, argv, _run_and_report)


def _run_and_report(args: argparse.Namespace, ranks: Ranks) -> None:
    asked = run(args, ranks)
    if ranks.rank:
        return
    found, left_out = results.add_earlier(args.out, asked.results)
    found, answers, unread = _read_all(args.out, found, asked)
    text = format_summary(found, {**left_out, **unread}, answers)
    store.write_atomically(args.out / "summary.md", text + "\n")
    print(
        json.dumps([result.json() for result in asked.results]) if args.json else text, flush=True
    )
    for line in describe_slow_plans(asked.results):
        print(f"warning: {line}", file=sys.stderr)


def _read_all(
    folder: Path, found: Sequence[PlanResult], asked: Asked
) -> tuple[list[PlanResult], list[Answers], dict[str, str]]:
    """Those results whose answers can be read, with them; and why others cannot, by plan, if they
    were not asked now. Without answers for a benchmark without right ones (VQAv2's test split)."""
    if math.isnan(found[0].scored.score.value):
        return list(found), [], {}
    read, answers, unread = [], [], {}
    for result in found:
        try:
            answers.append(read_answers(folder, result, asked.bench.task, asked.bench.items))
            read.append(result)
        except ValueError as error:
            if result in asked.results:
                raise
            unread[result.run.plan] = str(error)
    return read, answers, unread


def run_locked(
    parser: CommandParser,
    argv: Sequence[str] | None,
    act: Callable[[argparse.Namespace, Ranks], None],
) -> int:
    """Parse, then act with --out locked; returns the exit code of run_command.

    Of several processes only the first holds the lock and prints an error.
    """

    def parse_and_act() -> None:
        args = parser.parse_args(argv)
        with process_group() as ranks:
            try:
                with store.locked(args.out) if ranks.rank == 0 else nullcontext():
                    act(args, ranks)
            except KeyboardInterrupt:
                if ranks.rank == 0:
                    print("stopped; the same command continues from here", file=sys.stderr)
                raise
            except (ValueError, OSError):
                if ranks.rank:
                    sys.exit(2)
                raise

    return run_command(parse_and_act)


if __name__ == "__main__":
    end_program(main())
