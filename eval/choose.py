"""Find the cheapest plan whose loss against the unpruned model is surely below a bound.

    python -m eval.choose --loss 1.0 --confidence 0.95 --out results/choose
    python -m eval.choose --prune fastv:k=2,r=0.5 divprune:keep=16 --out results/choose
    python -m eval.choose --task gqa --data DIR --model M --prune fastv:k=2,r=0.5 divprune:keep=9 \\
        --budgets 288 144 64 --loss 0.5 --out results/choose

Without --prune, six methods are tried at three budgets. With --budgets, each plan of --prune is
tried with so many image tokens left at the end. Every plan is asked a first sample of the
questions, in a random order. Of the plans that may still be the answer, the better half is asked
twice as many, and so on, until the cheapest plan is known whose loss is below --loss points, or
until a third of the answers of the full grid has been asked. The seconds are those of the answers
to the first sample, for which the plans take turns; --cost flops orders the plans by FLOPs instead.

With the probability --confidence no plan is called safe whose loss is --loss or more (on questions
like these; choosing.py has the rule). The loss is the mean of the differences in credit, question
by question: of accuracies, their difference in points.

Answers are kept in --out/answers: an interrupted command continues, and another --loss,
--confidence or --cost reads the answers that are there. The table is also written to
--out/choose.md and, with all numbers, choose.json, the picture to --out/pareto.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from minillava.app.command import CommandParser, parse_float
from minillava.app.ranks import Ranks

from . import budgets, choosing, comparison, cost, plots, store
from .answers import read_rows
from .bench import Bench, add_options
from .choosing import LOSSY, SAFE, Choice, Rule, Standing, Step
from .credits import Array, Credits
from .plans import NONE, TypedPlan, read_plan, read_plans
from .predict import WARM_UP, predict
from .results import begin_result
from .run import run_locked
from .statistics import Estimate
from .summary import summarise
from .tasks.base import Answer

METHODS = (
    "fastv:k=2,keep=0.5",
    "divprune:keep=0.5",
    "fastervlm:keep=0.5",
    "vispruner:keep=0.5",
    "pool:keep=0.5",
    "uniform:keep=0.5",
)
BUDGETS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class PlanCost:
    """What a plan costs on the first sample."""

    seconds: cost.Spread  # of a question, from its batch
    flops: float  # exact, of a prefill
    image_tokens: float  # entering a layer, mean


@dataclass(frozen=True)
class Found:
    """The outcome of the command. plans: texts of the candidates; costs: theirs and NONE's."""

    plans: tuple[str, ...]
    costs: dict[str, PlanCost]
    by: str  # the cost that counts, "seconds" or "flops"
    rule: Rule
    choice: Choice

    def cost_of(self, plan: str) -> float:
        found = self.costs[plan]
        return found.flops if self.by == "flops" else found.seconds.median

    @property
    def chosen(self) -> str | None:
        return None if self.choice.chosen is None else self.plans[self.choice.chosen]

    def standing(self, plan: str) -> Standing:
        return self.choice.standings[self.plans.index(plan)]

    def front(self) -> list[str]:
        """The plans on the Pareto front, cheapest first: no cheaper plan loses as little so far.

        The unpruned model ends it, so dearer plans are not on it.
        """
        found, least = list[str](), np.inf
        for plan in sorted(self.plans, key=lambda p: (self.cost_of(p), self.standing(p).loss)):
            loss = self.standing(plan).loss
            if loss < least and self.cost_of(plan) < self.cost_of(NONE):
                found.append(plan)
                least = loss
        return found


class Asker:
    """Asks plans the first questions of a random order, and takes what has been asked before.

    A question is what counts as one in the score: in MME an image with its two questions.
    """

    def __init__(self, bench: Bench, plans: Sequence[TypedPlan]) -> None:
        blank = bench.task.score([Answer(i, "") for i in bench.items], bench.args.protocol).credits
        if blank is None:
            raise ValueError(f"{bench.task.name} has no right answers here, so no plan has a loss")
        order = np.random.default_rng(abs(bench.args.seed)).permutation(len(blank))
        members = [blank.members[i] for i in order]
        self.ends = np.cumsum(
            [len(own) for own in members]
        ).tolist()  # items of the first questions
        items = [bench.items[i] for own in members for i in own]
        self.bench, self.plans = replace(bench, items=items), plans
        self.unpruned = read_plan(NONE)

    def begin(self) -> None:
        """Check all plans, and write the settings of their answers (ValueError for other ones)."""
        every = [self.unpruned, *self.plans]
        self.bench.check(every)
        for plan in every:
            begin_result(self.bench.path(plan), self.bench.run(plan))

    def answer(self, plan: TypedPlan, n: int) -> None:
        """Ask those of the first n questions that have no answer yet."""
        b, last = self.bench, self.ends[n - 1]
        if b.answered(plan) < last:
            predict(
                b.model,
                b.processor,
                b.items[:last],
                b.run(plan),
                plan.plan,
                b.path(plan),
                b.args.batch,
            )

    def credits(self, plan: TypedPlan, n: int) -> Credits:
        """The credits of the first n questions."""
        self.answer(plan, n)
        b, last = self.bench, self.ends[n - 1]
        answers = [Answer(i, text) for i, text in zip(b.items, self._texts(plan), strict=False)]
        credits = b.task.score(answers[:last], b.args.protocol).credits
        assert credits is not None  # with right answers, as `blank`
        if not ((credits.credit >= 0) & (credits.credit <= 1)).all():
            raise ValueError(
                f"the credits of {b.task.name} are not from 0 to 1, so its loss has no points; "
                "choose on another task"
            )
        return credits

    def _texts(self, plan: TypedPlan) -> list[str]:
        """The answers there are, whose questions are checked."""
        path, rows = self.bench.path(plan), read_rows(self.bench.path(plan))
        asked = [(n, str(item.question_id)) for n, item in enumerate(self.bench.items)]
        if [(row.number, str(row.question_id)) for row in rows] != asked[: len(rows)]:
            raise ValueError(f"{path} answers other questions; give another --out")
        return [row.text for row in rows]

    def ask(self, step: Step) -> list[Array]:
        """The differences of each plan of a step."""
        first = self.credits(self.unpruned, step.n)
        found = []
        for p in step.plans:
            credits = self.credits(self.plans[p], step.n)
            if credits.names != first.names:
                raise ValueError(f"{self.plans[p].text} and {NONE} answer other questions")
            found.append(first.credit - credits.credit)
        return found

    def ask_in_turns(self, n: int) -> list[Array]:
        """The differences of all plans on the first n questions.

        The plans take turns batch by batch, so that whatever slows the machine down slows all.
        """
        sizes = [*range(self.bench.args.batch, n, self.bench.args.batch), n]
        for size in sizes:
            for plan in (self.unpruned, *self.plans):
                self.answer(plan, size)
        return self.ask(Step(tuple(range(len(self.plans))), n))

    def measure(self, plan: TypedPlan, n: int) -> PlanCost:
        """The costs of a plan on the first n questions."""
        config = self.bench.model.config.text
        file = store.AnswerFile(self.bench.path(plan), plan.text, config.num_hidden_layers)
        rows = [row for number, row in file.merge().items() if number < self.ends[n - 1]]
        costs, seconds = summarise(rows, config), seconds_each(rows)
        return PlanCost(cost.Spread.of(seconds), costs.flops, costs.image_tokens)


def seconds_each(rows: Sequence[store.Row]) -> list[float]:
    """The seconds of a question, from each batch of answers; without the first batches, and
    without those that are not full: fewer questions take more time each."""
    batches: dict[tuple[float, float], list[store.Metadata]] = {}
    for row in rows:
        told = row["metadata"]
        batches.setdefault((told["first_token"], told["prefill"]), []).append(told)
    largest = max(own[0]["batch"] for own in batches.values())
    every = [own for own in batches.values() if own[0]["batch"] == largest]
    return [
        (
            own[0]["first_token"]
            + max(t["per_token"] or 0.0 for t in own) * (max(t["new_tokens"] for t in own) - 1)
        )
        / own[0]["batch"]
        for own in every[WARM_UP:] or every
    ]


def run(args: argparse.Namespace) -> Found:
    """Ask until the cheapest safe plan is known."""
    typed = read_plans(args.prune or METHODS)  # before anything is loaded
    Rule(args.loss / 100, args.confidence, len(typed), 1)
    if NONE in typed and len(typed) == 1:
        raise ValueError(f"--prune {NONE}: there is nothing to choose from; give plans that prune")
    folder = args.out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench.open(argparse.Namespace(**{**vars(args), "out": folder}))
    plans = _vary([plan for text, plan in typed.items() if text != NONE], bench, args)
    asker = Asker(bench, plans)
    rule = Rule(args.loss / 100, args.confidence, len(plans), len(asker.ends))
    if few := rule.describe_too_few():
        raise ValueError(f"{few}; raise --limit or --loss, or give fewer plans")
    asker.begin()
    first = asker.ask_in_turns(rule.first)
    costs = {p.text: asker.measure(p, rule.first) for p in (asker.unpruned, *plans)}
    found = Found(tuple(p.text for p in plans), costs, args.cost, rule, _nothing())

    def ask(step: Step) -> list[Array]:
        names = ", ".join(plans[p].text for p in step.plans)
        print(f"{step.n} questions: {names}", file=sys.stderr, flush=True)
        return asker.ask(step)

    each = [found.cost_of(plan) for plan in found.plans]
    return replace(found, choice=choosing.race(rule, each, found.cost_of(NONE), first, ask))


def _nothing() -> Choice:
    return Choice(None, (), (), 0, False)


def _vary(plans: Sequence[TypedPlan], bench: Bench, args: argparse.Namespace) -> list[TypedPlan]:
    """The candidates: the plans of --prune, at each of --budgets if there are any."""
    wanted = args.budgets or ([] if args.prune else BUDGETS)
    if not wanted:
        return list(plans)
    tokens = budgets.count_tokens(wanted, bench.model.config.vision.num_patches)
    return list(budgets.at_budgets(plans, bench.model, tokens).values())


# ---------------------------------------------------------------- output


def format_found(found: Found, title: str) -> str:
    """The answer in words, and the table of all plans."""
    rule, choice = found.rule, found.choice
    percent = f"{100 * rule.confidence:g} %"
    bound = f"{100 * rule.bound:g} point{'s' * (rule.bound != 0.01)}"
    parts = [f"{title}: {describe_choice(found)}", format_table(found)]
    parts.append(
        f"{choice.asked} answers were asked, {100 * choice.asked / rule.grid:.0f} % of the "
        f"{rule.grid} of the full grid ({rule.plans} plans and the unpruned model, "
        f"{rule.questions} questions)"
        + (f"; at most {rule.most} are asked" if choice.spent else "")
    )
    parts.append(
        f"safe: the loss is below {bound}; with the probability {percent} no plan is called safe "
        "that is not. lowest to highest: both hold with this probability for all plans and all "
        "looks together, each by itself. seconds: of a question, median (quartiles) of the batches "
        "of the first sample; * on the Pareto front of cost and loss so far, which is an estimate"
    )
    return "\n\n".join(parts)


def describe_choice(found: Found) -> str:
    """The outcome in one sentence or two."""
    rule, choice = found.rule, found.choice
    bound = f"{100 * rule.bound:g} point{'s' * (rule.bound != 0.01)}"
    if found.chosen is None:
        text = (
            f"no plan that is cheaper than the unpruned model surely loses less than {bound} "
            f"({100 * rule.confidence:g} %)"
        )
    else:
        share = 100 * found.cost_of(found.chosen) / found.cost_of(NONE)
        text = (
            f"`{found.chosen}` is the cheapest plan that surely loses less than {bound} "
            f"({100 * rule.confidence:g} %), at {share:.0f} % of the unpruned model's {found.by}"
        )
    if choice.undecided:
        names = ", ".join(f"`{found.plans[p]}`" for p in choice.undecided)
        cheaper = "cheaper plans are" if len(choice.undecided) > 1 else "a cheaper plan is"
        return f"{text}. {cheaper[0].upper()}{cheaper[1:]} undecided: {names}"
    if choice.chosen is not None:
        return f"{text}. Every cheaper plan surely loses more"
    return text


def format_table(found: Found) -> str:
    """All plans with their costs and losses as a Markdown table, the cheapest first."""
    front, rows = set(found.front()), []
    for plan in sorted(found.costs, key=found.cost_of):
        c = found.costs[plan]
        cells = [f"`{plan}`", _time(c.seconds), f"{c.flops / 1e9:.3f}", f"{c.image_tokens:.1f}"]
        if plan == NONE:
            rows.append([*cells, "", "", "", "", "unpruned"])
            continue
        s = found.standing(plan)
        span = f"{100 * s.low:.2f} to {100 * s.high:.2f}"
        mark = "*" if plan in front else ""
        verdict = _verdict(found, plan)
        rows.append([*cells, str(s.questions), f"{100 * s.loss:.2f}", span, mark, verdict])
    head = ["plan", "seconds", "GFLOPs", "image tokens a layer", "questions", "loss"]
    return comparison.format_rows([*head, "lowest to highest", "front", ""], rows)


def _verdict(found: Found, plan: str) -> str:
    """The last cell of a plan: what is known, and why it was not asked more."""
    verdict = found.standing(plan).verdict
    if plan == found.chosen:
        return "**chosen**"
    limit = found.cost_of(found.chosen or NONE)
    if found.cost_of(plan) >= limit and verdict != LOSSY:
        than = "the unpruned model" if found.chosen is None else "the chosen plan"
        return f"{verdict}, dearer than {than}" if verdict == SAFE else f"dearer than {than}"
    return verdict


def _time(spread: cost.Spread) -> str:
    return f"{spread.median:.3g} ({spread.low:.3g}-{spread.high:.3g})"


def draw(found: Found, path: Path, title: str) -> None:
    """Draw the losses of all plans over their costs, with the Pareto front."""
    groups = dict[str, list[tuple[float, Estimate]]]()
    for plan in found.plans:
        kind = f"chosen: {plan}" if plan == found.chosen else found.standing(plan).verdict
        groups.setdefault(kind, []).append((_place(found, plan), _loss(found, plan)))
    percent, bound = 100 * found.rule.confidence, 100 * found.rule.bound
    unit = "GFLOPs of a prefill" if found.by == "flops" else "milliseconds a question"
    plots.points(
        path,
        groups,
        f"{title}; lines: lowest to highest loss of each plan ({percent:g} %)",
        (unit, "loss against the unpruned model, points"),
        {plan: (_place(found, plan), _loss(found, plan).value) for plan in found.front()},
        (f"loss of {bound:g}", bound),
        ("unpruned", _place(found, NONE)),
    )


def _place(found: Found, plan: str) -> float:
    return found.cost_of(plan) * (1e-9 if found.by == "flops" else 1e3)


def _loss(found: Found, plan: str) -> Estimate:
    s = found.standing(plan)
    return Estimate(100 * s.loss, 100 * s.low, 100 * s.high)


def as_json(found: Found, title: str) -> str:
    """All numbers."""
    rows = [
        {"plan": plan, **asdict(found.costs[plan]), **asdict(found.standing(plan))}
        for plan in sorted(found.plans, key=found.cost_of)
    ]
    choice = found.choice
    told = {
        "title": title,
        "chosen": found.chosen,
        "settled": choice.settled,
        "undecided": [found.plans[p] for p in choice.undecided],
        "cost": found.by,
        "loss": 100 * found.rule.bound,
        "confidence": found.rule.confidence,
        "asked": choice.asked,
        "grid": found.rule.grid,
        "front": found.front(),
        "unpruned": asdict(found.costs[NONE]),
        "plans": rows,
    }
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _run_and_report(args: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.size > 1:
        raise ValueError("eval.choose runs in one process; use torchrun with eval.run only")
    plots.require_matplotlib()
    found = run(args)
    title = (
        f"task {args.task}, model {Path(args.model).name}, batches of {args.batch} on {args.device}"
    )
    text = format_found(found, title)
    draw(found, args.out / "pareto.png", title)
    store.write_atomically(args.out / "choose.json", as_json(found, title))
    store.write_atomically(args.out / "choose.md", f"{text}\n\n![pareto](pareto.png)\n")
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.choose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, batch=8)
    add = parser.add_argument
    add("--prune", nargs="+", metavar="PLAN", help="plans; default: six methods")
    add(
        "--budgets",
        type=budgets.parse_budget,
        nargs="+",
        metavar="N",
        help="image tokens left at the end, or shares: each plan is tried with each; default "
        "0.75 0.5 0.25 without --prune",
    )
    add("--loss", type=parse_float, default=1.0, metavar="P", help="points at most; default 1.0")
    add("--confidence", type=parse_float, default=0.95, metavar="C", help="default 0.95")
    add("--cost", choices=("seconds", "flops"), default="seconds", help="default seconds")
    return run_locked(parser, argv, _run_and_report)


if __name__ == "__main__":
    sys.exit(main())
