"""A model with the questions of a benchmark: what eval.run and the experiments work with."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minillava import load
from minillava.app.command import parse_positive_int as positive
from minillava.llava import LLaVA
from minillava.loading.checkpoint import DTYPES, QUANTIZE
from minillava.processor import Processor

from . import cost, predict, store
from .predict import Run
from .predictions import read
from .ranks import ALONE, Ranks
from .score import Scored, questions, score, task_named
from .summary import Costs, summary
from .tasks import TASKS
from .tasks.base import Item, Task

DEMO = Path(__file__).parent.parent / "weights" / "demo"


def add_options(parser: argparse.ArgumentParser, batch: int = 1) -> None:
    """Those of every command that asks a benchmark's questions."""
    add = parser.add_argument
    add("--task", default="demo", metavar="T", help=f"default demo; {', '.join(TASKS)}")
    add("--data", type=Path, metavar="DIR", help="the benchmark's files; demo needs none")
    add("--protocol", metavar="P", help="llava (default) or lmms; a few tasks have others")
    add("--model", default=str(DEMO), metavar="DIR|HUB_ID", help="default: the demo")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--limit", type=positive, metavar="N", help="only the first N questions")
    add("--batch", type=positive, default=batch, metavar="B", help=f"at one time, default {batch}")
    add("--seed", type=int, default=0, help="of methods that draw; question i draws with seed + i")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES)
    add("--quantize", choices=QUANTIZE)


@dataclass(frozen=True)
class Done:
    """One plan, asked and scored."""

    run: Run
    scored: Scored
    costs: Costs

    def json(self) -> dict[str, Any]:
        return {**settings(self.run), "score": self.scored.json(), "costs": asdict(self.costs)}


@dataclass(frozen=True)
class Bench:
    """args: of add_options."""

    args: argparse.Namespace
    task: Task
    items: Sequence[Item]
    model: LLaVA
    processor: Processor
    among: Ranks = ALONE

    @classmethod
    def open(cls, args: argparse.Namespace, among: Ranks = ALONE) -> Bench:
        """Read the questions and load the model. ValueError for what is missing or broken."""
        task, protocol = task_named(args.task, args.protocol)
        args = argparse.Namespace(**{**vars(args), "protocol": protocol})
        found: list[Bench] = []

        def prepare() -> None:
            items = questions(task, args.data, args.protocol, args.limit)
            device = among.device(args.device)
            both = load(args.model, device, args.dtype, args.quantize, args.revision, progress=True)
            found.append(cls(args, task, items, *both, among))

        among.together(prepare)
        return found[0]

    def run(self, plan: str) -> Run:
        """The protocol's settings, with the checkpoint's where it leaves them open."""
        args, setup, parsed = self.args, self.task.setups[self.args.protocol], predict.plan_of(plan)
        return Run(
            task=self.task.name,
            protocol=args.protocol,
            model=model_name(args.model),
            plan=plan,
            dtype=args.dtype,
            quantize=args.quantize,
            device=torch.device(args.device).type,
            seed=args.seed,
            template=setup.template or self.processor.template,
            aspect=setup.aspect or self.processor.aspect,
            tokens=parsed.tokens or ("llava" if setup.template else "hf"),
            focus=parsed.focus,
            max_new_tokens=setup.max_new_tokens,
            use_cache=setup.use_cache,
            image_in_prompt=self.task.image_in_prompt,
        )

    def check(self, plans: Sequence[str]) -> None:
        """Refuse plans that cannot run before hours go into those before them (ValueError)."""
        names = [file_name(plan) for plan in plans]
        for plan, name in zip(plans, names, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"two plans have one file name, {name}; give them to two --out")
            predict.check(self.model, self.processor, self.items[0], self.run(plan))

    def ask(self, plan: str) -> Done:
        """Answer what is not yet answered in --out under this plan, score all, and write
        PLAN.json beside the answers."""
        run, out = self.run(plan), self.args.out
        path = out / f"{file_name(plan)}.jsonl"
        self.among.first(lambda: _begin(path, run))
        with cost.peak_memory() as peak:
            rows = predict.predict(
                self.model, self.processor, self.items, run, path, self.args.batch, self.among
            )
            costs = summary(rows, self.model.config.text, peak())
        scored = score(self.task, self.items, read(path), run.protocol)
        done = Done(run, scored, costs)
        self.among.first(lambda: store.write_whole(_side(path), store.as_json(done.json())))
        return done


def model_name(text: str) -> str:
    """A hub id as it is, a folder by its last part: results name no machine's paths."""
    return Path(text).resolve().name if Path(text).is_dir() else text


def file_name(plan: str) -> str:
    """A plan as the name of its files, without their suffix."""
    name = re.sub(r"[^A-Za-z0-9.,=+_-]+", "_", plan.replace("/", "-")).strip("._")
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(plan.encode()).hexdigest()[:12]}"
    return name


def settings(run: Run) -> dict[str, Any]:
    """What a result says of how it came about."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}"
    return {
        "run": asdict(run),
        "versions": {
            "minillava": code_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": machine,
        "attention": "scaled_dot_product_attention",
    }


def code_version() -> str:
    """The package's version, and the commit where this is a checkout that git knows."""
    try:
        found = version("minillava")
    except PackageNotFoundError:  # a checkout that nobody has installed
        found = "not installed"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return found
    return f"{found}, commit {done.stdout.strip()}"


def _side(path: Path) -> Path:
    return path.with_suffix(".json")


def _begin(path: Path, run: Run) -> None:
    """Refuse to go on with answers that were given under other settings."""
    side = _side(path)
    if not side.exists():
        if path.exists():
            raise ValueError(f"{path} was not begun by eval.run; give another --out")
        store.write_whole(side, store.as_json(settings(run)))
        return
    try:
        before = json.loads(side.read_text("utf-8"))["run"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{side} is no result of eval.run; give another --out") from None
    for name, value in asdict(run).items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} was begun with {name}={before.get(name)!r}, not {value!r}; give another "
                "--out, or the same settings"
            )
