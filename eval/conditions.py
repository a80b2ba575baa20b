"""Whether published settings do to the demo what they do to LLaVA-1.5.

    python -m eval.conditions --out eval/results/conditions
    python -m eval.conditions --questions 300 --scenes 7 --only none fastv-50 --out DIR

The questions are held-out ones of weights/scenes.py, the same for every plan. Each
condition is a line with what was measured, its 95 % interval and whether it holds. A plan is
compared with random:keep=K on the same questions, over several seeds, where K is the smallest of
16, 36, 56 and 84 that is not below the plan's mean number of image tokens that enter a layer.
Captions are counted apart, and are right if the whole sentence is.

Answers are kept in --out/answers, so that an interrupted command continues, and two commands with
different --only and --random can run at the same time; these write no table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from minillava import load
from minillava.app.command import (
    CommandParser,
    parse_non_negative_int,
    parse_path,
    parse_positive_int,
    run_command,
)
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.processing.processor import Processor
from minillava.processing.templates import conversation
from minillava.pruning.parsing import parse_plan
from weights import scenes

from . import store
from .comparison import format_rows
from .credits import Credits, average
from .plans import digest_file
from .statistics import Estimate, compare, estimate

DEMO = Path(__file__).parent.parent / "weights" / "demo"
BATCH = 32
LENGTH = 48  # new tokens; the longest answer is a caption
SEEDS = (0, 1, 2)  # of plans that draw at random
FALL = 10.0  # points that "visibly" means
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
    "divprune": "divprune:keep=0.098",
}
RANDOM = (16, 36, 56, 84)  # tokens of random choices
SMALL = (36, 16)  # of these, the ones at which accuracy has to fall
UNIFORM = {f"uniform-{k}": f"uniform:keep={k}" for k in SMALL}
OTHERS = ("none", "grey", "nothing", "follow-up")  # no plans: how the question is asked
LOSS = {"fastv-50": 3.0, "fastv-75": 8.0}  # points that may be lost


@dataclass(frozen=True)
class Way:
    """How all questions are asked. shown: "image", "grey" (an empty picture) or "nothing"."""

    plan: str | None = None
    shown: str = "image"
    follow: bool = False  # after another question about the picture, with its right answer
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of asking all questions in one way."""

    plan: str | None
    right: tuple[bool, ...]  # of each question
    tokens: float  # image tokens that enter a layer, in the mean


@dataclass(frozen=True)
class Questions:
    """n held-out questions of each of several seeds."""

    seeds: tuple[int, ...]
    n: int

    @cached_property
    def of_seed(self) -> dict[int, Questions]:
        return {seed: Questions((seed,), self.n) for seed in self.seeds}

    @cached_property
    def items(self) -> list[tuple[scenes.Scene, scenes.Example]]:
        """The scenes of several seeds are those of each: none is drawn twice."""
        if len(self.seeds) > 1:
            return [item for questions in self.of_seed.values() for item in questions.items]
        return list(scenes.held_out(self.seeds[0], self.n))

    @cached_property
    def details(self) -> list[str]:
        """Of each question: "caption", or the detail that its answer needs."""
        return ["caption" if e.kind == "caption" else detail(s, e) for s, e in self.items]

    def credits(self, outcome: Outcome, *details: str) -> Credits:
        """The credits of the questions that need one of these details."""
        at = [i for i, what in enumerate(self.details) if what in details]
        return Credits.of([str(i) for i in at], [outcome.right[i] for i in at])

    def short(self, outcome: Outcome) -> Credits:
        """The credits of all questions but captions."""
        return self.credits(outcome, "none", "big", "small")


def detail(scene: scenes.Scene, example: scenes.Example) -> str:
    """ "none" for the background, "small" if a small thing decides the answer, otherwise "big"."""
    if example.kind == "ground":
        return "none"
    about = [thing for thing in scene.things if thing.name in example.about]
    return "small" if any(thing.is_small for thing in about) else "big"


@dataclass(frozen=True)
class Measurement:
    """The questions, the model, and the folder where outcomes are kept."""

    model: LLaVA
    processor: Processor
    questions: Questions
    folder: Path
    weights: str  # digest of the model's files: answers of other weights are not used

    def outcome(self, name: str, way: Way) -> Outcome:
        """The kept outcome, or that of asking now."""
        parts = [self._of_seed(name, way, seed) for seed in self.questions.seeds]
        right = tuple(ok for part in parts for ok in part.right)
        return Outcome(way.plan, right, float(np.mean([part.tokens for part in parts])))

    def _of_seed(self, name: str, way: Way, seed: int) -> Outcome:
        path = self.folder / str(seed) / f"{name}.json".replace(":", "_")
        asked = {"questions": self.questions.n, "seed": seed, "plan": way.plan}
        by = {"weights": self.weights}
        if path.exists():
            kept = json.loads(path.read_text())
            for what, now in (("to other questions", asked), ("of other weights", by)):
                if {key: kept.get(key) for key in now} != now:
                    raise ValueError(f"{path} has answers {what}; give another --out")
            return Outcome(way.plan, tuple(c == "1" for c in kept["right"]), kept["tokens"])
        questions = self.questions.of_seed[seed]
        found = ask(self.model, self.processor, questions, way)
        right = "".join("01"[ok] for ok in found.right)
        kept = {**asked, **by, "right": right, "tokens": found.tokens}
        store.write_atomically(path, json.dumps(kept))
        share = estimate(questions.short(found))
        print(
            f"{name} on scenes of seed {seed}: {share.value:.1f}, {found.tokens:.1f} tokens",
            file=sys.stderr,
            flush=True,
        )
        return found

    def named(self, name: str) -> Outcome:
        """The outcome of a name in PLANS, UNIFORM or OTHERS."""
        if name in OTHERS:
            shown = name if name in ("grey", "nothing") else "image"
            return self.outcome(name, Way(shown=shown, follow=name == "follow-up"))
        return self.outcome(name, Way({**PLANS, **UNIFORM}[name]))

    def random(self, keep: int) -> list[Outcome]:
        """A choice of `keep` tokens at random, for each seed."""
        plan = f"random:keep={keep}"
        return [self.outcome(f"{plan} seed {s}", Way(plan, seed=s)) for s in SEEDS]


def ask(model: LLaVA, processor: Processor, questions: Questions, way: Way) -> Outcome:
    """Ask all questions in one way."""
    right: list[bool] = []
    entering: list[float] = []
    rng = np.random.default_rng([*questions.seeds, 7])
    for at in range(0, len(questions.items), BATCH):
        part = questions.items[at : at + BATCH]
        prompts, pictures = [], [[scene.image] for scene, _ in part]
        for scene, example in part:
            turns = []
            if way.follow:
                first = scenes.questions(scene.things, rng, ["where", "colour", "what"])[0]
                turns = [(first.question, first.answer)]
            images = int(way.shown != "nothing")
            prompts.append(conversation("llava-hf", example.question, turns, images))
        if way.shown == "grey":
            pictures = [[Image.new("RGB", p[0].size, (50, 50, 50))] for p in pictures]
        batch = processor(prompts, images=None if way.shown == "nothing" else pictures)
        plan = parse_plan(way.plan) if way.plan else None
        result = generate(model, batch, plan, max_new_tokens=LENGTH, seed=1_000_000 * way.seed + at)
        counts = torch.tensor(result.report.image_tokens_entering, dtype=torch.float)
        entering += [float(counts.mean())] * len(part)
        for (_, example), tokens in zip(part, result.tokens, strict=True):
            right.append(processor.decode(tokens).strip() == example.answer)
    return Outcome(way.plan, tuple(right), float(np.mean(entering)))


def budget(outcome: Outcome) -> int:
    """Tokens of the random choice to compare with: at least as many as the plan has in the mean."""
    return next(keep for keep in RANDOM if keep >= outcome.tokens - 1e-6)


# The conditions.


@dataclass(frozen=True)
class Condition:
    """A statement with what was measured. surely: the whole interval is on the right side."""

    text: str
    measured: Estimate
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self._allows(self.measured.value)

    @property
    def surely(self) -> bool:
        bounds = self.measured.bounds
        return bounds is not None and all(map(self._allows, bounds))

    def _allows(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def row(self) -> list[str]:
        verdict = (
            "does not hold" if not self.holds else "holds" if self.surely else "holds, not surely"
        )
        sign = "at most" if self.at_most else "at least"
        return [
            self.text,
            f"{self.measured.value:.1f}",
            str(self.measured),
            f"{sign} {self.bound:.1f}",
            verdict,
        ]

    def json(self) -> dict[str, Any]:
        return {
            "condition": self.text,
            **_json(self.measured),
            "bound": self.bound,
            "at_most": self.at_most,
            "holds": self.holds,
            "surely": self.surely,
        }


def conditions(m: Measurement) -> list[Condition]:
    """All conditions, for which everything is asked that has not been asked yet."""
    q, base = m.questions, m.named("none")
    first = q.short(base)
    found = [
        Condition("accuracy without pruning, all but captions", estimate(first), 99.0),
        Condition("captions without pruning", estimate(q.credits(base, "caption")), 95.0),
    ]
    for name, text in (("grey", "an empty grey picture"), ("nothing", "the question alone")):
        blind = estimate(q.short(m.named(name)))
        found.append(Condition(f"accuracy with {text}", blind, first.score / 4, at_most=True))
    for text, details in (("questions", ("none", "big", "small")), ("captions", ("caption",))):
        before, after = (q.credits(m.named(name), *details) for name in ("none", "follow-up"))
        change = compare(before, after).estimate
        found.append(Condition(f"follow-up {text} minus first ones", change, -1.0))
    for name, points in LOSS.items():
        change = compare(first, q.short(m.named(name))).estimate
        found.append(Condition(f"`{PLANS[name]}` minus no pruning", change, -points))
    for name, plan in PLANS.items():
        outcome = m.named(name)
        keep = budget(outcome)
        drawn = average([q.short(other) for other in m.random(keep)])
        gain = compare(drawn, q.short(outcome)).estimate
        found.append(Condition(f"`{plan}` ({name}) minus `random:keep={keep}`", gain, 0.0))
    for keep in SMALL:
        for plan, several in (
            (f"random:keep={keep}", m.random(keep)),
            (f"uniform:keep={keep}", [m.named(f"uniform-{keep}")]),
        ):
            fall = compare(first, average([q.short(other) for other in several])).estimate
            found.append(Condition(f"`{plan}` minus no pruning", fall, -FALL, at_most=True))
    return found


def table(m: Measurement) -> list[dict[str, Any]]:
    """The accuracy of each way of asking, by the detail that answers need."""
    rows = []
    several = {name: [m.named(name)] for name in (*OTHERS, *PLANS, *UNIFORM)}
    several |= {f"random:keep={keep}": m.random(keep) for keep in reversed(RANDOM)}
    for name, outcomes in several.items():
        parts = {
            what: estimate(average([m.questions.credits(o, *details) for o in outcomes]))
            for what, details in (
                ("all", ("none", "big", "small")),
                ("no detail", ("none",)),
                ("big things", ("big",)),
                ("a small thing", ("small",)),
                ("captions", ("caption",)),
            )
        }
        shown = f"`{outcomes[0].plan}`" if outcomes[0].plan else name
        rows.append({"asked with": shown, "tokens a layer": outcomes[0].tokens, **parts})
    return rows


def report(m: Measurement, title: str) -> str:
    """The text of both tables; conditions.json and conditions.md are written beside the answers."""
    details = m.questions.details
    n = len(details) - details.count("caption")
    shares = ", ".join(
        f"{text} {100 * details.count(what) / n:.1f} %"
        for what, text in (("none", "no detail"), ("small", "a small thing"), ("big", "the rest"))
    )
    found, rows = conditions(m), table(m)
    notes = (
        f"Of {n} questions without captions: {shares}. `random` over {len(SEEDS)} seeds. "
        "Intervals: 95 %. Not surely: the interval reaches beyond the bound."
    )
    head = ["condition", "measured", "95 %", "bound", ""]
    first, *_ = rows
    body = [[_cell(value) for value in row.values()] for row in rows]
    text = "\n\n".join(
        [
            f"# {title}",
            notes,
            "## Conditions",
            format_rows(head, [condition.row() for condition in found]),
            "## Accuracy, by the detail that answers need",
            format_rows(list(first), body),
        ]
    )
    kept = {
        "title": title,
        "conditions": [condition.json() for condition in found],
        "accuracy": [
            {k: _json(v) if isinstance(v, Estimate) else v for k, v in row.items()} for row in rows
        ],
    }
    store.write_atomically(m.folder.parent / "conditions.json", json.dumps(kept, indent=1) + "\n")
    store.write_atomically(m.folder.parent / "conditions.md", text + "\n")
    return text


def _json(value: Estimate) -> dict[str, float | None]:
    return {"value": value.value, "low": value.low, "high": value.high}


def _cell(value: object) -> str:
    if isinstance(value, Estimate):
        return f"{value.value:.1f} ({value})"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.conditions",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO, metavar="DIR", help="default: weights/demo")
    add("--questions", type=parse_positive_int, default=600, metavar="N", help="of each seed: 600")
    seeds = (20261201, 20270101, 20270102)
    shown = " ".join(map(str, seeds))
    scenes_help = f"draw the scenes with these seeds; default {shown}"
    add(
        "--scenes",
        nargs="+",
        type=parse_non_negative_int,
        default=seeds,
        metavar="SEED",
        help=scenes_help,
    )
    add("--out", type=parse_path, required=True, metavar="DIR", help="folder of answers and tables")
    names = (*OTHERS, *PLANS, *UNIFORM)
    add(
        "--only",
        nargs="+",
        choices=names,
        default=[],
        metavar="NAME",
        help="ask only in these ways and keep the answers; prints and writes no table. NAME: "
        + ", ".join(names),
    )
    add(
        "--random",
        nargs="+",
        type=parse_positive_int,
        default=[],
        metavar="K",
        help="the same with K tokens chosen at random",
    )
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    folder = args.out / "answers"
    for own in (folder / str(seed) for seed in args.scenes):
        with store.name_file_in_errors(own):
            own.mkdir(parents=True, exist_ok=True)
    model, processor = load(args.model)
    weights = " ".join(digest_file(file) for file in sorted(args.model.glob("*.safetensors")))
    questions = Questions(tuple(args.scenes), args.questions)
    m = Measurement(model, processor, questions, folder, weights)
    for name in args.only:
        m.named(name)
    for keep in args.random:
        m.random(keep)
    if not args.only and not args.random:
        n, seeds = args.questions * len(args.scenes), ", ".join(map(str, args.scenes))
        title = f"The demo: {n} held-out questions, scenes of seeds {seeds}"
        print(report(m, title), flush=True)


if __name__ == "__main__":
    sys.exit(main())
