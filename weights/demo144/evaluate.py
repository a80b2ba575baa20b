"""Measure a demo checkpoint's manners on held-out scenes: accuracy, plans, follow-up questions.

    python -m weights.demo144.evaluate FOLDER --n 1800 --seed 20261201 --out RESULTS.json

Each condition of the model card is one line with what was measured and whether it holds. A plan is
compared with random:keep=K on the same questions, where K is the plan's mean number of image tokens
that enter a layer, rounded. Finished plans are read from RESULTS.json, so that the same command
resumes. `--only NAME ...` asks some of the plans.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from minillava.app.command import (
    CommandParser,
    end_program,
    parse_non_negative_int,
    parse_positive_int,
    run_command,
)
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.loading.checkpoint import load
from minillava.processing.processor import Processor
from minillava.processing.templates import conversation
from minillava.pruning.parsing import parse_plan

from ..demo_data import write_atomically
from . import scenes

BATCH = 32
LENGTH = 48
# published settings for 576 tokens and 32 layers, scaled to 144 and 12
PLANS = {
    "fastv-50": "fastv:k=2,r=0.5",
    "fastv-75": "fastv:k=2,r=0.75",
    "simignore-7b": "simignore:keep=113,step=1,i_index=1,mode=mask,until=2+fastv:layer=2,keep=36",
    "sparsevlm-192": "sparsevlm:layers=1/3/6,keep=75/50/28",
    "sparsevlm-128": "sparsevlm:layers=1/3/6,keep=76/28/9",
    "sparsevlm-64": "sparsevlm:layers=1/3/6,keep=16/8/4",
    "pyramiddrop": "pyramiddrop:layers=3/6/9,ratios=0.5/0.25/0.125",
    "visionzip-192": "visionzip:dominant=40,contextual=8",
    "visionzip-128": "visionzip:dominant=27,contextual=5",
    "visionzip-64": "visionzip:dominant=14,contextual=2",
    "fastervlm-50": "fastervlm:keep=72",
    "fastervlm-75": "fastervlm:keep=36",
    "fastervlm-90": "fastervlm:keep=14",
    "divprune-56": "divprune:keep=0.098",
    "uniform-36": "uniform:keep=36",
    "uniform-16": "uniform:keep=16",
    "random-36": "random:keep=36",
    "random-16": "random:keep=16",
}
LOSS = {"fastv-50": 3.0, "fastv-75": 8.0}  # points that may be lost


def ask(
    model: LLaVA,
    processor: Processor,
    plan: str | None,
    seed: int,
    n: int,
    shown: str = "image",
    follow: bool = False,
) -> dict[str, Any]:
    """Ask n held-out questions: which are right, their kinds, and mean image tokens per layer.

    shown: "image", "grey" (an empty picture) or "nothing". follow: after a first question about
    the same picture, which has been answered rightly.
    """
    items = list(scenes.held_out(seed, n))
    right: list[int] = []
    entering: list[float] = []
    rng = np.random.default_rng([seed, 7])
    for at in range(0, n, BATCH):
        part = items[at : at + BATCH]
        prompts = []
        for scene, example in part:
            turns = []
            if follow:
                (first, *_) = scenes.questions(scene.things, rng, ["where", "colour", "what"])
                turns = [(first.question, first.answer)]
            images = int(shown != "nothing")
            prompts.append(conversation("llava-hf", example.question, turns, images))
        pictures = [[scene.image] for scene, _ in part]
        if shown == "grey":
            pictures = [[Image.new("RGB", p[0].size, (50, 50, 50))] for p in pictures]
        batch = processor(prompts, images=None if shown == "nothing" else pictures)
        chosen = None if plan is None else parse_plan(plan)
        result = generate(model, batch, chosen, max_new_tokens=LENGTH, seed=seed + at)
        counts = torch.tensor(result.report.image_tokens_entering, dtype=torch.float)
        entering.append(float(counts.mean()))
        for (_, example), tokens in zip(part, result.tokens, strict=True):
            right.append(int(processor.decode(tokens).strip() == example.answer))
    return {
        "plan": plan,
        "right": right,
        "kinds": [example.kind for _, example in items],
        "detail": [detail(scene, example) for scene, example in items],
        "average": float(np.mean(entering)),
    }


def detail(scene: scenes.Scene, example: scenes.Example) -> str:
    """ "none" for the background, "small" if a small thing decides the answer, otherwise "big"."""
    if example.kind == "ground":
        return "none"
    about = [thing for thing in scene.things if thing.name in example.about]
    return "small" if any(thing.is_small for thing in about) else "big"


def share(found: dict[str, Any], what: str | None = None) -> float:
    """Right answers in per cent, without captions; what: "none", "small" or "big" detail only."""
    rows = zip(found["right"], found["kinds"], found["detail"], strict=True)
    chosen = [ok for ok, kind, need in rows if kind != "caption" and what in (None, need)]
    return 100 * float(np.mean(chosen)) if chosen else float("nan")


def captions(found: dict[str, Any]) -> float:
    pairs = zip(found["right"], found["kinds"], strict=True)
    return 100 * float(np.mean([ok for ok, kind in pairs if kind == "caption"]))


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    parts = [f"{share(found, what):.1f}" for what in ("none", "big", "small")]
    kinds: dict[str, list[int]] = defaultdict(list)
    for ok, kind in zip(found["right"], found["kinds"], strict=True):
        kinds[kind].append(ok)
    by = " ".join(f"{kind} {100 * np.mean(v):.1f}" for kind, v in kinds.items())
    return (
        f"{name:24} {found['average']:6.1f} tokens  all {share(found):5.1f}  "
        f"(no detail, big, small: {', '.join(parts)})  {by}"
    )


def measure(folder: Path, n: int, seed: int, out: Path, only: Sequence[str]) -> None:
    """Ask everything that `out` does not have yet, and print the conditions."""
    model, processor = load(folder)
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    def get(name: str, plan: str | None, **how: Any) -> dict[str, Any]:
        key = f"{name} seed={seed} n={n}"
        if key not in done:
            done[key] = ask(model, processor, plan, seed, n, **how)
            write_atomically(out, json.dumps(done).encode())
            print(line(name, done[key]), flush=True)
        return dict(done[key])

    base = get("none", None)
    print(line("none", base))
    checks = [
        ("unpruned, all but captions >= 99", share(base), share(base) >= 99),
        ("unpruned captions >= 95", captions(base), captions(base) >= 95),
    ]
    if not only:
        for shown in ("grey", "nothing"):
            blind = share(get(shown, None, shown=shown))
            checks.append((f"{shown} <= a quarter of that", blind, blind <= share(base) / 4))
        later = share(get("follow-up", None, follow=True))
        checks.append(("follow-up within 1 point of first", later, later >= share(base) - 1))
    for name, plan in PLANS.items():
        if only and name not in only:
            continue
        found = get(name, plan)
        lost = share(base) - share(found)
        if name in LOSS:
            checks.append((f"{name} loses <= {LOSS[name]}", lost, lost <= LOSS[name]))
        if not name.startswith(("random", "uniform")):
            keep = max(1, round(found["average"]))
            other = share(get(f"random:keep={keep}", f"random:keep={keep}"))
            gain = share(found) - other
            checks.append(
                (f"{name} above random:keep={keep} ({other:.1f})", share(found), gain > 0)
            )
        else:
            checks.append((f"{name} falls visibly (>= 10)", lost, lost >= 10))
    for text, value, holds in checks:
        print(f"{'holds' if holds else 'FAILS'}  {text}: {value:.1f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m weights.demo144.evaluate",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=parse_positive_int, default=1800)
    parser.add_argument("--seed", type=parse_non_negative_int, default=20261201)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the answers")
    parser.add_argument("--only", nargs="+", choices=PLANS, default=[], metavar="NAME")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    measure(args.folder, args.n, args.seed, args.out, args.only)


if __name__ == "__main__":
    end_program(main())
