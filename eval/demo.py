"""The accuracy of plans on the demo checkpoint by kind of question, offline.

    python -m eval.demo --out eval/results/demo   every method at 50, 25 and 11 % of the tokens,
                                                  in half an hour on one core
    python -m eval.demo PLAN [PLAN ...]           these plans and the unpruned model
    python -m eval.demo --kinds where PLAN        only some kinds of question

The questions are the held-out ones of weights/scenes.py: new scenes with handwriting that was not
used in training, the same for every plan. An answer is right if it equals the expected text.

Each plan is compared, on the same questions, with the unpruned model and with random patches at the
same budget: `random:keep=T`, with as many image tokens a layer. Plans that draw random numbers are
asked with each of --seeds; their score is the mean. The results go to --out as a JSON file with one
object for each plan, and as tables.

A PLAN may also use a method in a file of your own: ./mine.py:Mine:keep=16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillava import Batch, load
from minillava.app.command import (
    CommandParser,
    parse_non_negative_int,
    parse_path,
    parse_positive_int,
    run_command,
)
from minillava.app.output_file import check_output
from minillava.generate import Result, generate
from minillava.llava import LLaVA
from minillava.processing.processor import Processor
from minillava.pruning import METHODS
from minillava.request import Settings, check_plan, prompts_of
from weights import scenes

from . import cost, fit, store
from .comparison import Pair, format_pairs, format_rows, format_spread
from .credits import Credits, average
from .plans import NONE, read_plan, read_plans
from .statistics import CONFIDENCE, Estimate, compare, describe_too_few, estimate
from .suggest import suggest_plan

BATCH = 32
LENGTH = 48  # new tokens; the longest answer is a caption
SHARES = (0.5, 0.25, 0.11)
BY_HAND = ("hand",)  # a person's choice of patches is no method
NEED_MORE = ("trim", "cdpruner")  # than the demo's vision tower has
SEEDS = (0, 1_000_000, 2_000_000)  # question i draws with seed + i

Group = tuple[Batch, list[scenes.Example]]


@dataclass(frozen=True)
class Measured:
    """The answers under one plan. seeds: seed -> credits of all questions, captions among them."""

    plan: str
    tokens: float  # image tokens entering a layer, mean
    seeds: Mapping[int, Credits]
    kinds: tuple[str, ...]  # [question]

    @property
    def every(self) -> Credits:
        return average([*self.seeds.values()])

    def counted(self, credits: Credits) -> Credits:
        """Those that make the score: of all kinds but captions, or of captions if that is all."""
        other = np.array([kind != "caption" for kind in self.kinds])
        return credits.select(other if other.any() else ~other)

    def scores(self) -> dict[str, Estimate]:
        """Under "all" the score, then that of each kind of question."""
        found = {"all": estimate(self.counted(self.every))}
        kinds = self.every.split(self.kinds)
        return found | {k: estimate(kinds[k]) for k in scenes.KINDS if k in kinds}

    def spread(self) -> dict[int, float]:
        return {seed: self.counted(credits).score for seed, credits in self.seeds.items()}

    def minus(self, other: Measured) -> Pair:
        """This plan minus another, without captions."""
        first, second = other.counted(other.every), self.counted(self.every)
        return Pair(other.plan, self.plan, compare(first, second))

    def json(self) -> dict[str, Any]:
        scores = self.scores()
        return {
            "plan": self.plan,
            "questions": len(self.kinds),
            **{name: _rounded(found.value) for name, found in scores.items()},
            "intervals": {name: found.bounds for name, found in scores.items()},
            "seeds": self.spread(),
            "image_tokens_entering_a_layer": round(self.tokens, 2),
        }


def default_plans(model: LLaVA, processor: Processor) -> list[str]:
    """Every method at each share of the image tokens; "" is the unpruned model.

    Methods in the decoder prune the input of layer 2. Methods with several layers reduce the tokens
    by equal ratios. FitPrune's table is fitted on scenes of another seed. TRIM and CDPruner are
    left out: they read a CLIP text tower, and the demo's vision tower has none.
    """
    n_tokens, n_layers = model.config.vision.num_patches, model.config.text.num_hidden_layers
    found = [""]
    for share in SHARES:
        for name in METHODS:
            if name == "fitprune":
                found.append(_fitted(model, processor, round(100 * (1 - share))))
            elif name not in NEED_MORE + BY_HAND:
                found.append(suggest_plan(name, share, n_layers, n_tokens))
    return list(dict.fromkeys(found))


def _fitted(model: LLaVA, processor: Processor, save: int) -> str:
    pairs = fit.samples(None, 20, seed=0)
    prompts = [processor.prompt(text, 1) for text, _ in pairs]
    batch = processor(prompts, images=[[image] for _, image in pairs])
    return f"fitprune:delete={'/'.join(map(str, fit.fit(model, batch, save)))}"


def questions(processor: Processor, seed: int, n: int, kinds: Sequence[str] | None) -> list[Group]:
    """n held-out questions in batches, in the checkpoint's template."""
    items = list(scenes.held_out(seed, n, kinds))
    groups = []
    for at in range(0, n, BATCH):
        part = items[at : at + BATCH]
        prompts = [processor.prompt(example.question, 1) for _, example in part]
        batch = processor(prompts, images=[[scene.image] for scene, _ in part])
        groups.append((batch, [example for _, example in part]))
    return groups


def measure(
    model: LLaVA,
    processor: Processor,
    groups: Sequence[Group],
    text: str,
    seeds: Sequence[int] = SEEDS,
) -> Measured:
    """Ask all questions under one plan, with every seed if it draws random numbers."""
    clock, entering = cost.Clock(), list[float]()
    plan = cost.with_timed_choices(read_plan(text).plan, model, clock)
    found: dict[int, Credits] = {}
    for seed in seeds:
        right: list[bool] = []
        for i, (batch, examples) in enumerate(groups):
            result = generate(model, batch, plan, max_new_tokens=LENGTH, seed=seed + i * BATCH)
            entering.append(_mean_entering(result))
            right += [
                processor.decode(tokens).strip() == example.answer
                for tokens, example in zip(result.tokens, examples, strict=True)
            ]
        found[seed] = Credits.of([str(i) for i in range(len(right))], right)
        if not clock.drew:
            break
    kinds = tuple(example.kind for _, examples in groups for example in examples)
    return Measured(text or NONE, sum(entering) / len(entering), found, kinds)


def _mean_entering(result: Result) -> float:
    counts = torch.tensor(result.report.image_tokens_entering, dtype=torch.float)
    return float(counts.mean())


def measure_all(
    model: LLaVA,
    processor: Processor,
    groups: Sequence[Group],
    plans: Sequence[str],
    seeds: Sequence[int],
) -> list[Measured]:
    """Ask the plans, and random patches at the budget of each."""
    found: dict[str, Measured] = {}
    patches = model.config.vision.num_patches
    for text in plans:
        for wanted in (text, None):
            plan = text if wanted is not None else random_at(found[text].tokens, patches)
            if plan not in found:
                found[plan] = measure(model, processor, groups, plan, seeds)
                print(json.dumps(found[plan].json()), file=sys.stderr, flush=True)
    return [*found.values()]


def random_at(tokens: float, patches: int) -> str:
    """Random patches with as many image tokens a layer; the unpruned model if that is all."""
    keep = max(1, round(tokens))
    return f"random:keep={keep}" if keep < patches else ""


def format_tables(found: Sequence[Measured], patches: int) -> str:
    """The scores, their intervals, the comparisons and the spread over seeds, as Markdown."""
    scores = {m.plan: m.scores() for m in found}
    kinds = list(next(iter(scores.values())))
    plans = {m.plan: m for m in found}
    head, rows, bounds = ["plan", "tokens/layer", "all", "95 %", *kinds[1:]], [], []
    for m in found:
        own = scores[m.plan]
        cells = [f"{own[kind].value:.1f}" for kind in kinds]
        rows.append([f"`{m.plan}`", f"{m.tokens:.1f}", cells[0], str(own["all"]), *cells[1:]])
        bounds.append([f"`{m.plan}`", *(str(own[kind]) for kind in kinds[1:])])
    parts = [format_rows(head, rows)]
    if few := describe_too_few(len(found[0].counted(found[0].every)), CONFIDENCE):
        parts.append(few)
    parts += ["95 % intervals of the kinds:", format_rows(["plan", *kinds[1:]], bounds)]
    pruned = [m for m in found if m.plan != NONE]
    matched = {m.plan: plans[random_at(m.tokens, patches) or NONE] for m in pruned}
    for name, pairs in {
        "Minus random patches at the same budget": [
            m.minus(matched[m.plan]) for m in pruned if matched[m.plan].plan not in (m.plan, NONE)
        ],
        "Minus the unpruned model": [m.minus(plans[NONE]) for m in pruned],
    }.items():
        if pairs:
            parts += [f"{name}:", format_pairs(pairs, "all")]
    if spread := format_spread({m.plan: m.spread() for m in found}, "all"):
        parts += ["Plans that draw random numbers:", spread]
    return "\n\n".join(parts)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.demo",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("plans", nargs="*", metavar="PLAN", help="default: every method at three budgets")
    add("--model", default=str(Path(__file__).parent.parent / "weights" / "demo"))
    add("--questions", type=parse_positive_int, default=300, help="default 300")
    add("--kinds", nargs="+", choices=[*scenes.KINDS])
    add("--seed", type=parse_non_negative_int, default=2026, help="of the scenes; default 2026")
    add(
        "--seeds",
        type=parse_non_negative_int,
        nargs="+",
        default=SEEDS,
        metavar="S",
        help=f"of plans that draw random numbers; default {' '.join(map(str, SEEDS))}",
    )
    add("--out", type=parse_path, metavar="NAME", help="write NAME.json and NAME.md")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    read_plans(args.plans)  # refuse mistakes before anything is loaded
    files = _output_files(args.out) if args.out else []
    model, processor = load(args.model)
    wanted = ["", *args.plans] if args.plans else default_plans(model, processor)
    groups = questions(processor, args.seed, args.questions, args.kinds)
    check_plans(model, groups[0][0], wanted)
    began = time.perf_counter()
    rows = measure_all(model, processor, groups, wanted, list(dict.fromkeys(args.seeds)))
    seconds, threads = time.perf_counter() - began, torch.get_num_threads()
    note = (
        f"{args.questions} held-out questions, seed {args.seed}; {seconds:.0f} s on {threads} "
        f"thread{'s' * (threads > 1)}, torch {torch.__version__.partition('+')[0]}"
    )
    text = f"{note}\n\n{format_tables(rows, model.config.vision.num_patches)}\n"
    print(text, end="", flush=True)
    found = {"seed": args.seed, "model": Path(args.model).name, "rows": [m.json() for m in rows]}
    for path, content in zip(files, (json.dumps(found, indent=1) + "\n", text), strict=False):
        store.write_atomically(path, content)


def check_plans(model: LLaVA, batch: Batch, texts: Sequence[str]) -> None:
    """Refuse plans that cannot run, before any plan is run (ValueError)."""
    layers, patches = model.config.text.num_hidden_layers, model.config.vision.num_patches
    settings, prompts = Settings(LENGTH, 0, (), 0.0, 1.0, 0), prompts_of(model, batch)
    for text in texts:
        check_plan(model, prompts, read_plan(text).plan.resolve(layers, patches), settings)


def _output_files(name: Path) -> list[Path]:
    """NAME.json and NAME.md. Raises ValueError if one of them cannot be written."""
    with contextlib.suppress(OSError):  # check_output says why
        name.parent.mkdir(parents=True, exist_ok=True)
    stem = name.with_suffix("") if name.suffix in (".json", ".md") else name
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md")]
    for path in files:
        if os.path.isdir(path):  # Path.is_dir would raise for a name that is too long
            raise ValueError(f"--out {name}: {path} is a folder; give another name")
        check_output("--out", path, (path.suffix,))
    return files


if __name__ == "__main__":
    sys.exit(main())
