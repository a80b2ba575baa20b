"""The accuracy of plans on the demo checkpoint by kind of question, offline and in minutes.

    python -m eval.demo --out eval/results/demo   every method at 50, 25 and 11 % of the tokens
    python -m eval.demo PLAN [PLAN ...]           these plans and the unpruned model
    python -m eval.demo --kinds where PLAN        only some kinds of question

The questions are the held-out ones of weights/scenes.py: new scenes with handwriting that was not
used in training, the same for every plan. An answer is right if it equals the expected text. The
results go to --out as a JSON file with one object for each plan, and as a table.

A PLAN may also use a method in a file of your own: ./mine.py:Mine:keep=16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minillava import Batch, load
from minillava.app.command import (
    CommandParser,
    parse_non_negative_int,
    parse_path,
    parse_positive_int,
    run_command,
)
from minillava.generate import Result, generate
from minillava.llava import LLaVA
from minillava.processing.processor import Processor
from minillava.pruning import METHODS
from minillava.request import Settings, check_plan, prompts_of
from weights import scenes

from . import fit, statistics, store
from .credits import Credits
from .plans import read_plan, read_plans
from .suggest import suggest_plan

BATCH = 32
LENGTH = 48  # new tokens; the longest answer is a caption
SHARES = (0.5, 0.25, 0.11)
BY_HAND = ("hand",)  # a person's choice of patches is no method
NEED_MORE = ("trim", "cdpruner", "mustdrop")  # than the demo's vision tower has

Group = tuple[Batch, list[scenes.Example]]


def default_plans(model: LLaVA, processor: Processor) -> list[str]:
    """Every method at each share of the image tokens; "" is the unpruned model.

    Methods in the decoder prune the input of layer 2. Methods with several layers reduce the tokens
    by equal ratios. FitPrune's table is fitted on scenes of another seed. TRIM and CDPruner are
    left out: they read a CLIP text tower, and the demo's vision tower has none. So is MustDrop,
    which needs a grid of patches that is divisible by 3.
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
    model: LLaVA, processor: Processor, groups: Sequence[Group], text: str, seed: int
) -> dict[str, Any]:
    """Ask all questions under one plan: accuracy by kind, image tokens per layer."""
    plan = read_plan(text).plan
    right: dict[str, list[bool]] = defaultdict(list)
    entering: list[float] = []
    for i, (batch, examples) in enumerate(groups):
        result = generate(model, batch, plan, max_new_tokens=LENGTH, seed=seed + i * BATCH)
        entering.append(_mean_entering(result))
        for tokens, example in zip(result.tokens, examples, strict=True):
            right[example.kind].append(processor.decode(tokens).strip() == example.answer)
    answers = [x for kind, xs in right.items() if kind != "caption" for x in xs]
    kinds = {kind: _percent(right[kind]) for kind in scenes.KINDS if kind in right}
    every = Credits.of([str(i) for i in range(len(answers))], answers)
    return {
        "plan": text or "none",
        "questions": sum(map(len, right.values())),
        "all": _percent(answers),  # all kinds but captions
        "95 %": str(statistics.estimate(every)) if answers else "-",  # of all
        **kinds,
        "image_tokens_entering_a_layer": round(sum(entering) / len(entering), 2),
    }


def _mean_entering(result: Result) -> float:
    counts = torch.tensor(result.report.image_tokens_entering, dtype=torch.float)
    return float(counts.mean())


def _percent(right: Sequence[bool]) -> float:
    return round(100 * sum(right) / max(len(right), 1), 1)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, a line for each plan."""
    skip = {"plan", "questions", "image_tokens_entering_a_layer"}
    kinds = [key for key in rows[0] if key not in skip]
    head = ["plan", "tokens/layer", *kinds]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        cells = [f"`{row['plan']}`", f"{row['image_tokens_entering_a_layer']:.1f}"]
        lines.append("| " + " | ".join([*cells, *(_cell(row[k]) for k in kinds)]) + " |")
    return "\n".join(lines)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}"


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
    add("--questions", type=parse_positive_int, default=450, help="default 450")
    add("--kinds", nargs="+", choices=[*scenes.KINDS])
    add("--seed", type=parse_non_negative_int, default=2026)
    add("--out", type=parse_path, metavar="NAME", help="write NAME.json and NAME.md")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    read_plans(args.plans)  # refuse mistakes before anything is loaded
    files = _output_files(args.out) if args.out else []
    model, processor = load(args.model)
    wanted = ["", *args.plans] if args.plans else default_plans(model, processor)
    groups = questions(processor, args.seed, args.questions, args.kinds)
    check_plans(model, groups[0][0], wanted)
    rows, began = [], time.perf_counter()
    for text in wanted:
        rows.append(measure(model, processor, groups, text, args.seed))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    seconds, threads = time.perf_counter() - began, torch.get_num_threads()
    note = (
        f"{args.questions} held-out questions, seed {args.seed}; {seconds:.0f} s on {threads} "
        f"thread{'s' * (threads > 1)}, torch {torch.__version__.partition('+')[0]}"
    )
    print(f"{note}\n\n{format_table(rows)}", flush=True)
    found = {"seed": args.seed, "model": Path(args.model).name, "rows": rows}
    texts = (json.dumps(found, indent=1) + "\n", f"{note}\n\n{format_table(rows)}\n")
    for path, text in zip(files, texts, strict=False):
        store.write_atomically(path, text)


def check_plans(model: LLaVA, batch: Batch, texts: Sequence[str]) -> None:
    """Refuse plans that cannot run, before any plan is run (ValueError)."""
    layers, patches = model.config.text.num_hidden_layers, model.config.vision.num_patches
    settings, prompts = Settings(LENGTH, 0, (), 0.0, 1.0, 0), prompts_of(model, batch)
    for text in texts:
        check_plan(model, prompts, read_plan(text).plan.resolve(layers, patches), settings)


def _output_files(name: Path) -> list[Path]:
    """NAME.json and NAME.md. Raises ValueError if one of them cannot be written."""
    name.parent.mkdir(parents=True, exist_ok=True)
    stem = name.with_suffix("") if name.suffix in (".json", ".md") else name
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md")]
    for path in files:
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"--out {name}: {path} cannot be written; give another name")
    return files


if __name__ == "__main__":
    sys.exit(main())
