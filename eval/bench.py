"""A model together with the questions of a benchmark, for eval.run and the experiments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minillava import load
from minillava.app.command import parse_int, parse_path, parse_positive_int
from minillava.app.ranks import ALONE, Ranks
from minillava.llava import LLaVA
from minillava.loading.checkpoint import DTYPES, QUANTIZE
from minillava.processing.processor import Processor
from minillava.pruning.average import most_entering
from minillava.report import describe_arithmetic

from . import cost, predict, store
from .first_token import Distribution
from .ids import choose_items, read_ids
from .plans import NONE, TypedPlan, file_name, read_plan
from .predict import Run
from .predictions import read
from .results import (
    PlanResult,
    begin_result,
    check_resume,
    describe_machine,
    digest_questions,
    find_other_setting,
    json_path,
)
from .score import find_task, read_questions, score
from .summary import summarise
from .tasks import TASKS
from .tasks.base import Item, Task

DEMO = Path(__file__).parent.parent / "weights" / "demo"


def add_options(parser: argparse.ArgumentParser, batch: int = 1) -> None:
    """Add the options of every command that asks a model the questions of a benchmark."""
    add = parser.add_argument
    add("--task", default="demo", metavar="T", help=f"default demo; {', '.join(TASKS)}")
    add("--data", type=parse_path, metavar="DIR", help="the benchmark's files; demo needs none")
    add("--protocol", metavar="P", help="llava (default) or lmms; a few tasks have others")
    add("--model", default=str(DEMO), metavar="DIR|HUB_ID", help="default: the demo")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--out", type=parse_path, required=True, metavar="DIR")
    add("--limit", type=parse_positive_int, metavar="N", help="only the first N questions")
    add("--ids", type=parse_path, metavar="FILE", help="only these questions; see eval.analyse")
    add(
        "--batch",
        type=parse_positive_int,
        default=batch,
        metavar="B",
        help=f"questions at a time, default {batch}",
    )
    add(
        "--seed",
        type=parse_int,
        default=0,
        help="question i draws its random numbers with seed + i",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES)
    add("--quantize", choices=QUANTIZE)


@dataclass(frozen=True)
class Bench:
    """An opened benchmark. args: the parsed options of add_options."""

    args: argparse.Namespace
    task: Task
    items: Sequence[Item]
    model: LLaVA
    processor: Processor
    ranks: Ranks = ALONE
    unpruned: Path | None = None  # folder of the unpruned answers, if it is not --out

    @classmethod
    def open(cls, args: argparse.Namespace, ranks: Ranks = ALONE) -> Bench:
        """Read the questions and load the model. Raises ValueError if either fails."""
        task, protocol = find_task(args.task, args.protocol)
        args = argparse.Namespace(**{**vars(args), "protocol": protocol})
        found: list[Bench] = []

        def prepare() -> None:
            items = read_questions(task, args.data, args.protocol, args.limit)
            if args.ids:
                items = choose_items(items, read_ids(args.ids), args.ids)
            device = ranks.device(args.device)
            both = load(
                args.model, device, args.dtype, args.quantize, args.revision, progress=True,
                pack=True,
            )  # fmt: skip
            found.append(cls(args, task, items, *both, ranks))

        ranks.gather(prepare)
        return found[0]

    def run(self, plan: TypedPlan) -> Run:
        """The settings of a run: the protocol's, or the checkpoint's where it has none."""
        args, setup, parsed = self.args, self.task.setups[self.args.protocol], plan.plan
        return Run(
            task=self.task.name,
            protocol=args.protocol,
            model=model_name(args.model),
            plan=plan.text,
            dtype=args.dtype,
            quantize=args.quantize or stored_form(self.model),
            device=torch.device(args.device).type,
            seed=args.seed,
            template=setup.template or self.processor.template,
            aspect=setup.aspect or self.processor.aspect,
            tokens=parsed.tokens or ("llava" if setup.template else "hf"),
            focus=parsed.focus,
            max_new_tokens=setup.max_new_tokens,
            use_cache=setup.use_cache,
            image_in_prompt=self.task.image_in_prompt,
            method_files=plan.method_files,
        )

    def path(self, plan: TypedPlan) -> Path:
        """The path of PLAN.jsonl, which holds the answers under a plan."""
        return Path(self.args.out) / f"{file_name(plan.text)}.jsonl"

    def answered(self, plan: TypedPlan) -> int:
        """How many questions, from the first on, have an answer in --out."""
        layers = self.model.config.text.num_hidden_layers
        rows = store.AnswerFile(self.path(plan), plan.text, layers).merge()
        return next((n for n in range(len(rows)) if n not in rows), len(rows))

    def check(self, plans: Sequence[TypedPlan]) -> None:
        """Refuse plans that cannot run, before any plan is run (ValueError)."""
        names = [self.path(plan).name for plan in plans]
        for plan, name in zip(plans, names, strict=True):
            if names.count(name) > 1:
                raise ValueError(
                    f"two plans have the same file name, {name}; give each its own --out"
                )
            run = self.run(plan)
            check_resume(self.path(plan), run)
            predict.check(self.model, self.processor, self.items[0], run, plan.plan)

    def ask(self, plan: TypedPlan) -> PlanResult:
        """Answer the questions that this plan has not answered in --out yet, score all of them, and
        write PLAN.json beside the answers."""
        run, path = self.run(plan), self.path(plan)
        self.ranks.run_in_first(lambda: begin_result(path, run))
        with cost.peak_memory() as peak:
            rows = predict.predict(
                self.model,
                self.processor,
                self.items,
                run,
                plan.plan,
                path,
                self.args.batch,
                self.ranks,
                self._first_tokens(plan),
            )
            config = self.model.config
            layers, patches = config.text.num_hidden_layers, config.vision.num_patches
            most = most_entering(plan.plan.resolve(layers, patches), layers, patches)
            costs = summarise(rows, config.text, peak(), most)
        scored = score(self.task, self.items, read(path), run.protocol)
        asked = digest_questions(self.items)
        draws = any(row["metadata"].get("drew", False) for row in rows)
        result = PlanResult(run, scored, costs, asked, describe_machine(), self.ranks.size, draws)
        text = store.as_json(result.json())
        self.ranks.run_in_first(lambda: store.write_atomically(json_path(path), text))
        return result

    def ask_with_seeds(self, plan: TypedPlan, more: Sequence[int]) -> PlanResult:
        """Ask a plan, and with every further seed, in --out/seed-SEED, if it draws random numbers;
        returns the result of the first seed."""
        result = self.ask(plan)
        for other in map(self.with_seed, more if result.draws else ()):
            Path(other.args.out).mkdir(exist_ok=True)
            other.ask(plan)
        return result

    def with_seed(self, seed: int) -> Bench:
        """The same benchmark with another seed, and its answers in --out/seed-SEED."""
        out = Path(self.args.out) / f"seed-{seed}"
        args = argparse.Namespace(**{**vars(self.args), "seed": seed, "out": out})
        return replace(self, args=args, unpruned=Path(self.args.out))

    def _first_tokens(self, plan: TypedPlan) -> dict[int, Distribution]:
        """By index of the question, the unpruned model's distribution of the first new token.

        Empty under the unpruned plan, and where --out has no unpruned answers of these settings.
        """
        if plan.text == NONE:
            return {}
        path = (self.unpruned or Path(self.args.out)) / f"{NONE}.jsonl"
        layers = self.model.config.text.num_hidden_layers

        def read_unpruned() -> dict[int, Distribution]:
            if not path.exists() or find_other_setting(path, self.run(read_plan(NONE))):
                return {}
            rows = store.AnswerFile(path, NONE, layers).merge()
            return {
                n: row["metadata"]["first"]
                for n, row in rows.items()
                if "first" in row["metadata"]
                and n < len(self.items)
                and str(row["question_id"]) == str(self.items[n].question_id)
            }

        return self.ranks.run_in_first(read_unpruned)


def stored_form(model: LLaVA) -> str | None:
    """The form of a checkpoint that is stored in 8 or 4 bits, from the words for its arithmetic."""
    words, _ = describe_arithmetic(model)
    return next((form for form in ("nf4", "fp4", "int4", "int8") if form in words), None)


def model_name(text: str) -> str:
    """A hub id unchanged, a folder by its last part: results contain no paths of a machine."""
    return Path(text).resolve().name if Path(text).is_dir() else text
