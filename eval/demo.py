"""How plans fare on the demo checkpoint: accuracy per kind of question, offline, in minutes.

    python -m eval.demo --out eval/results/demo   every method at 50, 25 and 11 % of the tokens
    python -m eval.demo PLAN [PLAN ...]           these plans, beside the unpruned model
    python -m eval.demo --kinds where PLAN        only some kinds of question

Questions are weights/scenes.py's held-out ones: new scenes with handwriting that was never trained
on, the same ones for every plan. An answer is right if it is the expected text exactly. Results go
to --out as one JSON object a plan, and as a table.
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

from minillava import Batch, load, parse_plan
from minillava.app.command import CommandParser as Parser
from minillava.app.command import parse_non_negative_int as natural
from minillava.app.command import parse_positive_int as positive
from minillava.app.command import run_command as command
from minillava.generate import Result, Settings, check_plan, generate, prompts_of
from minillava.llava import LLaVA
from minillava.processor import Processor
from minillava.pruning import METHODS
from weights import scenes

from . import fit, store

BATCH = 32
LENGTH = 48  # new tokens; the longest answer is a caption
SHARES = (0.5, 0.25, 0.11)
ADAPTIVE = ("prumerge", "prumerge-plus", "text-only")  # they have no budget
WITHOUT_A_TOWER = ("trim", "cdpruner")

Group = tuple[Batch, list[scenes.Example]]


def plans(model: LLaVA, processor: Processor) -> list[str]:
    """Every method at each share of the image tokens; "" is the unpruned model.

    Methods in the decoder act from layer 2 on (their first layers see everything), those with
    several layers go down in equal ratios; FitPrune's table is fitted on scenes of its own seed.
    TRIM and CDPruner read a CLIP text tower, and there is none for the demo's vision tower.
    """
    n_tokens, n_layers = model.config.vision.num_patches, model.config.text.num_hidden_layers
    found = [""]
    for share in SHARES:
        k = round(n_tokens * share)
        steps = [round(n_tokens * share ** (i / 3)) for i in (1, 2, 3)]
        side = max(1, round(k**0.5))
        special = {
            "fastv": f"fastv:k=2,keep={k}",
            "dart": f"dart:layer=2,keep={k}",
            "vtw": f"vtw:layer={round(n_layers * share)}",
            "fitprune": _fitted(model, processor, round(100 * (1 - share))),
            "pyramiddrop": "pyramiddrop:layers=2/4/6,ratios="
            + "/".join(f"{s / n_tokens:.3f}" for s in steps),
            "sparsevlm": f"sparsevlm:layers=2/4/6,keep={'/'.join(map(str, steps))}",
            "visionzip": f"visionzip:dominant={k - k // 6},contextual={k // 6}",
            "vscan": f"vscan:layer={n_layers // 2},keep={k + k // 2},final={k - k // 2}",
            "grid": f"grid:h={side},w={side}",
            "pool": f"pool:h={side},w={side}",
        }
        for name in METHODS:
            if name in ADAPTIVE:
                found.append(name)
            elif name not in WITHOUT_A_TOWER:
                found.append(special.get(name, f"{name}:keep={k}"))
    return list(dict.fromkeys(found))


def _fitted(model: LLaVA, processor: Processor, save: int) -> str:
    pairs = fit.samples(None, 20, seed=0)
    prompts = [processor.prompt(text, 1) for text, _ in pairs]
    batch = processor(prompts, images=[[image] for _, image in pairs])
    return f"fitprune:delete={'/'.join(map(str, fit.fit(model, batch, save)))}"


def questions(processor: Processor, seed: int, n: int, kinds: Sequence[str] | None) -> list[Group]:
    """n held-out questions in batches, in the checkpoint's own template."""
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
    """One plan on all questions: accuracy per kind, image tokens per layer, seconds."""
    plan, began = parse_plan(text or None), time.perf_counter()
    right: dict[str, list[bool]] = defaultdict(list)
    entering: list[float] = []
    for i, (batch, examples) in enumerate(groups):
        result = generate(model, batch, plan, max_new_tokens=LENGTH, seed=seed + i * BATCH)
        entering.append(_mean_entering(result))
        for tokens, example in zip(result.tokens, examples, strict=True):
            right[example.kind].append(processor.decode(tokens).strip() == example.answer)
    answers = [x for kind, xs in right.items() if kind != "caption" for x in xs]
    kinds = {kind: _percent(right[kind]) for kind in scenes.KINDS if kind in right}
    return {
        "plan": text or "none",
        "questions": sum(map(len, right.values())),
        "all": _percent(answers),  # captions apart
        **kinds,
        "image_tokens_entering_a_layer": round(sum(entering) / len(entering), 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _mean_entering(result: Result) -> float:
    counts = torch.tensor(result.report.image_tokens_entering, dtype=torch.float)
    return float(counts.mean())


def _percent(right: Sequence[bool]) -> float:
    return round(100 * sum(right) / max(len(right), 1), 1)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line a plan."""
    skip = {"plan", "questions", "image_tokens_entering_a_layer", "seconds"}
    kinds = [key for key in rows[0] if key not in skip]
    head = ["plan", "tokens/layer", *kinds]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        cells = [f"`{row['plan']}`", f"{row['image_tokens_entering_a_layer']:.1f}"]
        lines.append("| " + " | ".join([*cells, *(f"{row[k]:.1f}" for k in kinds)]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m eval.demo",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("plans", nargs="*", metavar="PLAN")
    add("--model", default=str(Path(__file__).parent.parent / "weights" / "demo"))
    add("--questions", type=positive, default=450, help="default 450")
    add("--kinds", nargs="+", choices=[*scenes.KINDS])
    add("--seed", type=natural, default=2026)
    add("--out", type=Path, help="write NAME.json and NAME.md")
    return command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    for text in args.plans:
        parse_plan(text)
    files = _out(args.out) if args.out else []
    model, processor = load(args.model)
    wanted = ["", *args.plans] if args.plans else plans(model, processor)
    groups = questions(processor, args.seed, args.questions, args.kinds)
    check(model, groups[0][0], wanted)
    rows = []
    for text in wanted:
        rows.append(measure(model, processor, groups, text, args.seed))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    seconds, threads = sum(row["seconds"] for row in rows), torch.get_num_threads()
    note = (
        f"{args.questions} held-out questions, seed {args.seed}; {seconds:.0f} s on {threads} "
        f"thread{'s' * (threads > 1)}, torch {torch.__version__.partition('+')[0]}"
    )
    print(f"{note}\n\n{table(rows)}", flush=True)
    found = {"seed": args.seed, "model": Path(args.model).name, "rows": rows}
    texts = (json.dumps(found, indent=1) + "\n", f"{note}\n\n{table(rows)}\n")
    for path, text in zip(files, texts, strict=False):
        store.write_whole(path, text)


def check(model: LLaVA, batch: Batch, texts: Sequence[str]) -> None:
    """Refuse plans that cannot run before minutes go into those before them (ValueError)."""
    layers, patches = model.config.text.num_hidden_layers, model.config.vision.num_patches
    settings, prompts = Settings(LENGTH, 0, (), 0.0, 1.0, 0), prompts_of(model, batch)
    for text in texts:
        check_plan(model, prompts, parse_plan(text or None).resolve(layers, patches), settings)


def _out(name: Path) -> list[Path]:
    """NAME.json and NAME.md, where they can be written."""
    name.parent.mkdir(parents=True, exist_ok=True)
    files = [name.with_suffix(".json"), name.with_suffix(".md")]
    for path in files:
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"--out {name}: {path} cannot be written; give another name")
    return files


if __name__ == "__main__":
    sys.exit(main())
