"""Accuracy by the layer K from which image tokens are pruned, and by the pruned share R.

    python -m eval.experiments.ablation --method fastv --limit 200 --out DIR
    python -m eval.experiments.ablation --method simignore --layers 2 4 6 --out DIR
    python -m eval.experiments.ablation --method ./mine.py:Mine --out DIR

fastv: `fastv:k=K,r=R` (arXiv 2403.06764, figure 7). simignore: image tokens unlike the text are
ignored in layers 0 to K-1, and FastV prunes the share R from layer K on, as in the released
pipeline (arXiv 2412.09817). Both mask tokens, as the papers do. So the tables show accuracy, and
nothing becomes faster; the FLOPs are those of the same plan if it dropped the tokens.

Any other method with the options layer and keep can be given, also one in a file of your own. It
runs as `METHOD:layer=K,keep=1-R` in its own mode, and the FLOPs are those of the run.

    python -m eval.experiments.ablation --method divprune --vary keep=8,16,32 --out DIR
    python -m eval.experiments.ablation --method fastv:mode=mask --vary k=1,2,4 r=0.5,0.75 --out DIR

--vary takes one or two options of any method with their values, in the place of K and R.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from minillava.app.command import parse_positive_int

from .. import cost, plots
from ..bench import Bench
from ..plans import NONE, read_plan, read_plans
from ..results import PlanResult
from ..run import format_published
from . import base, varied

MASKED = ("fastv", "simignore")
SHARES = [0.25, 0.5, 0.75, 0.9]
LEFT = 0.785  # share of tokens that Simignore's released 7B setting keeps, 452 of 576


def plan(method: str, layer: int, r: float) -> str:
    """The text of the plan with K = layer and R = r."""
    fastv = f"fastv:k={layer},r={r:g},mode=mask"
    if method == "fastv":
        return fastv
    if method != "simignore":
        return base.with_options(method, f"layer={layer},keep={float(round(1 - r, 4))}")
    return f"simignore:keep={LEFT},mode=mask,until={layer}+{fastv}"


def run(args: argparse.Namespace) -> str:
    if args.vary:
        if args.layers or args.r:
            raise ValueError("--vary stands in the place of --layers and --r; leave these out")
        return varied.run(args)
    args.r = args.r or SHARES
    _check_method(args.method)  # before anything is loaded
    began, bench = time.perf_counter(), base.open_bench(args)
    layers = args.layers or _layers(bench)
    plans = {(k, r): plan(args.method, k, r) for k in layers for r in args.r}
    done = base.ask_all(bench, read_plans([NONE, *plans.values()]))
    unpruned = done[NONE].scored.score
    scores = {at: done[text].scored.estimate() for at, text in plans.items()}
    rows = [
        {
            "K": k,
            "R, %": round(100 * r),
            unpruned.metric: scores[k, r].value,
            base.INTERVAL: scores[k, r],
            **_flops(bench, args.method, k, r, done[text]),
            "visible image tokens a layer": done[text].costs.image_tokens,
            "plan": f"`{text}`",
        }
        for (k, r), text in plans.items()
    ]
    title = f"{args.method}: K and R, {len(bench.items)} questions of {args.task}"
    plots.heat_map(
        args.out / "heat_map.png",
        [[scores[k, r] for r in args.r] for k in layers],
        [str(k) for k in layers],
        [f"{100 * r:g} %" for r in args.r],
        f"{title}; unpruned {unpruned.value:.1f}",
        ("R, share of the image tokens pruned", "K, first pruned layer", unpruned.metric),
    )
    plots.curves(
        args.out / "curves.png",
        {f"K={k}": [(100 * r, scores[k, r]) for r in args.r] for k in layers},
        title,
        ("R, % of the image tokens pruned", unpruned.metric),
        ("unpruned", done[NONE].scored.estimate()),
    )
    return base.write_report(
        args.out,
        args,
        title,
        {f"unpruned: {unpruned.metric} {unpruned.value:.2f}": rows},
        ["heat_map.png", "curves.png"],
        began,
        published=format_published(list(done.values())),
        comparisons=base.compare_with_unpruned(bench, done),
    )


def _layers(bench: Bench) -> list[int]:
    """Layers 1, 2, 3, 5 and then every fifth; all but the first if there are at most 8 layers."""
    n = bench.model.config.text.num_hidden_layers
    return list(range(1, n)) if n <= 8 else [k for k in (1, 2, 3, *range(5, n, 5)) if k < n]


def _check_method(method: str) -> None:
    try:
        read_plan(plan(method, 1, 0.5))
    except ValueError as error:
        raise ValueError(f"--method {method}: {error}") from None


def _flops(bench: Bench, method: str, layer: int, r: float, result: PlanResult) -> dict[str, float]:
    """The name of the column of FLOPs, and the share in percent by FastV's formula.

    fastv and simignore mask tokens here. Their share is that of the same plan if it dropped them.
    """
    if method not in MASKED:
        return {"FastV's FLOPs, %": 100 * result.costs.fastv_share}
    config, N = bench.model.config, bench.model.config.vision.num_patches
    prompt = round(result.costs.prompt_tokens)
    before = round(N * LEFT) if method == "simignore" else N
    after = min(before, max(1, round(N * (1 - r))))
    later = config.text.num_hidden_layers - layer
    entering = [prompt - N + before] * layer + [prompt - N + after] * later
    return {"FLOPs if dropped, %": 100 * cost.fastv_share(entering, prompt, config.text)}


def add_ablation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--method",
        default="fastv",
        metavar="M",
        help="fastv (default), simignore, METHOD with the options layer and keep, or with --vary "
        "any method",
    )
    add("--layers", type=parse_positive_int, nargs="+", metavar="K")
    add("--r", type=share, nargs="+", metavar="R", help="default 0.25 0.5 0.75 0.9")
    add(
        "--vary",
        type=varied.Axis.read,
        nargs="+",
        metavar="OPTION=V,V",
        help="one or two options with their values, instead of --layers and --r",
    )


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share from 0 to 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return base.experiment(__doc__ or "", argv, "ablation", run, add_ablation_options)


if __name__ == "__main__":
    sys.exit(main())
