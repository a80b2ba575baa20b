"""Compare the plans of a folder of eval.run, from the answers that are there.

    python -m eval.analyse results/demo
    python -m eval.analyse results/demo --prune none fastv:k=3,r=0.5 --confidence 0.99
    python -m eval.analyse results/demo --figure tokens.png
    python -m eval.analyse results/demo --hard
    python -m eval.analyse results/demo --hard --judge pool:keep=16 --save hard=hard.json

It prints every plan's score with its interval, and the plans compared on the same questions.
--figure draws the score over the image tokens. --hard splits the scores by whether a question is
wrong under plain downsampling to as many image tokens (downsample:keep=T, or else pool), and by
whether it is wrong without the picture (text-only); both must have been asked. --save writes the
ids of a part, which eval.run and the experiments take as --ids. Nothing is asked.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillava.app.command import (
    CommandParser,
    parse_float,
    parse_path,
    parse_positive_int,
    run_command,
)
from minillava.app.output_file import check_output

from . import comparison, ids, plots, results, subsets
from .answers import AnswerRow, Answers, read_answers, read_rows
from .downsample import budget_of
from .plans import NONE, file_name
from .results import PlanResult
from .score import find_task, read_questions
from .statistics import CONFIDENCE, MOST_CONFIDENCE, describe_too_few
from .tasks.base import Item, Task, question_line

# options of methods that say how many tokens stay, so that they are not in a line's name
BUDGETS = ("keep", "r", "ratios", "average", "dominant", "contextual", "final", "basis", "h", "w")


@dataclass(frozen=True)
class Folder:
    """The answers in a folder of eval.run. left_out: plan or file -> why it is not among them."""

    task: Task
    items: list[Item]
    plans: list[Answers]
    left_out: dict[str, str]

    @property
    def metric(self) -> str:
        return self.plans[0].result.scored.score.metric

    def find(self, plan: str) -> Answers | None:
        return next((answers for answers in self.plans if answers.plan == plan), None)

    def require(self, plan: str) -> Answers:
        """The answers under a plan. Raises ValueError if they are not there."""
        found = self.find(plan)
        if found is None:
            there = ", ".join(answers.plan for answers in self.plans)
            why = self.left_out.get(plan, f"there are: {there}; ask it with eval.run first")
            raise ValueError(f"there are no answers under {plan} to compare: {why}")
        return found


def read_folder(folder: Path, data: Path | None, limit: int | None) -> Folder:
    """The answers of all plans in a folder that can be compared, the unpruned ones first."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the --out of eval.run")
    first = _first_result(folder)
    found, left_out = results.add_earlier(folder, [first])
    found = sorted(found, key=lambda r: (r.run.plan != NONE, r.costs.image_tokens))
    task, protocol = find_task(first.run.task, first.run.protocol)
    path = folder / f"{file_name(first.run.plan)}.jsonl"
    rows = read_rows(path)
    if limit is None and data is None:  # the demo, whose ids are numbers: no scene too many
        asked = [row.question_id for row in rows]
        limit = 1 + max((n for n in asked if isinstance(n, int)), default=0)
    items = _asked(read_questions(task, data, protocol, limit), rows, path)
    plans = [read_answers(folder, result, task, items) for result in found]
    return Folder(task, items, plans, left_out)


def _first_result(folder: Path) -> PlanResult:
    """The unpruned result, or another if there is none. Raises ValueError without any."""
    paths = [path.with_suffix(".jsonl") for path in sorted(folder.glob("*.json"))]
    paths = [path for path in paths if path.exists()]
    reasons = []
    for path in sorted(paths, key=lambda path: path.stem != NONE):
        try:
            return results.read_result(path)
        except ValueError as error:
            reasons.append(str(error))
    why = reasons[0] if reasons else "give the --out of eval.run"
    raise ValueError(f"{folder} has no finished results: {why}")


def _asked(every: Sequence[Item], rows: Sequence[AnswerRow], path: Path) -> list[Item]:
    """The questions that rows answer, in their order."""
    names: dict[tuple[str, str], Item] = {}
    for item in every:
        names.setdefault((str(item.question_id), question_line(item.text)), item)
    found = []
    for row in rows:
        name = (str(row.question_id), question_line(row.prompt))
        if name not in names:
            raise ValueError(
                f"{path} answers question {row.question_id}, which is not among the "
                f"{len(every)} questions that are read now; give the --data of eval.run, and a "
                "--limit at least as high"
            )
        found.append(names[name])
    return found


def line_name(plan: str) -> str:
    """The name of a plan's line in the figure: the plan without the options of its budget.

    "fastv:k=3,keep=16" -> "fastv:k=3"; "visionzip-64" -> "visionzip".
    """
    parts = []
    for part in plan.split("+"):
        method, colon, options = part.rpartition(":") if "=" in part else (part, "", "")
        kept = [o for o in options.split(",") if o.partition("=")[0].strip() not in BUDGETS]
        method = re.sub(r"-[0-9]+$", "", method)
        parts.append(f"{method}{colon}{','.join(kept)}".rstrip(":"))
    return "+".join(parts)


def draw(folder: Folder, plans: Sequence[Answers], path: Path, confidence: float) -> None:
    """Draw the scores over the image tokens that enter a layer, with a line for each method."""
    lines: dict[str, list[tuple[float, plots.Height]]] = {}
    unpruned = folder.find(NONE)
    for answers in sorted(plans, key=lambda answers: answers.result.costs.image_tokens):
        if answers.plan == NONE:
            continue
        tokens = float(budget_of(answers.plan) or answers.result.costs.image_tokens)
        point = (tokens, answers.estimate(confidence))
        lines.setdefault(line_name(answers.plan), []).append(point)
    every = sorted({x for points in lines.values() for x, _ in points})
    if not every:
        raise ValueError("--figure needs answers under a plan that prunes; ask one with eval.run")
    scored = folder.plans[0].result.scored
    plots.curves(
        path,
        lines,
        f"{scored.title}, {len(folder.plans[0].credits)} questions; lines: {confidence:.0%} "
        "intervals",
        ("image tokens entering a layer, mean", folder.metric),
        None if unpruned is None else ("unpruned", unpruned.estimate(confidence)),
        log_x=every[0] > 0 and every[-1] > 8 * every[0],
    )


# ---------------------------------------------------------------- text


def format_scores(folder: Folder, plans: Sequence[Answers], confidence: float) -> str:
    """Every plan's score with its interval, as a Markdown table."""
    rows = []
    for answers in plans:
        found, tokens = answers.estimate(confidence), answers.result.costs.image_tokens
        cells = [f"{found.value:.2f}", str(found), str(len(answers.credits)), f"{tokens:.1f}"]
        rows.append([f"`{answers.plan}`", *cells])
    head = ["plan", folder.metric, f"{100 * confidence:g} %", "questions", "image tokens a layer"]
    text = comparison.format_rows(head, rows)
    few = describe_too_few(len(plans[0].credits), confidence)
    return f"{text}\n\n{few}" if few else text


def split_scores(folder: Folder, args: argparse.Namespace, plans: Sequence[Answers]) -> str:
    """The scores on hard questions and on those that need the picture, as text."""
    blind = folder.find(subsets.WITHOUT_PICTURE)
    parts, notes = [], []
    if blind is None:
        notes.append(f"without the picture: ask {subsets.WITHOUT_PICTURE} with eval.run for it")
    for answers in plans:
        try:
            judge = _judge(answers, folder, args.judge)
        except ValueError as error:
            if args.judge:
                raise
            judge = None
            notes.append(str(error))
        parts += subsets.split(answers, judge, blind, folder.find(NONE), args.confidence)
    table = [subsets.format_parts(parts, folder.metric, args.confidence)] if parts else []
    return "\n\n".join([*table, *notes])


def _judge(answers: Answers, folder: Folder, judge: str | None) -> Answers | None:
    """The plan under which hard questions are wrong; none for those that do not compete with it."""
    if judge:
        return None if answers.plan == judge else folder.require(judge)
    own = answers.plan.partition(":")[0]
    if own in (NONE, *subsets.DOWNSAMPLED, subsets.WITHOUT_PICTURE):
        return None
    return subsets.find_judge(answers, folder.plans)


def save(folder: Folder, args: argparse.Namespace) -> list[str]:
    """Write the ids of --save; returns a sentence for each file."""
    judge = folder.require(args.judge) if args.judge else None
    blind = folder.find(subsets.WITHOUT_PICTURE)
    found, said = subsets.subsets(judge, blind), []
    for text in args.save:
        name, _, file = text.partition("=")
        if name not in found or not file:
            allowed = ", ".join(found) or "none"
            raise ValueError(
                f"--save {text} must be PART=FILE; the parts that the answers give: {allowed}; "
                f"hard and easy need --judge, the others answers under {subsets.WITHOUT_PICTURE}"
            )
        numbers = subsets.members_of(folder.plans[0], found[name])
        about = {
            "task": folder.task.name,
            "questions": name,
            "judge": args.judge if "hard" in name or "easy" in name else subsets.WITHOUT_PICTURE,
        }
        ids.write_ids(parse_path(file), folder.items, numbers, about)
        said.append(f"{file}: {len(numbers)} ids of {len(folder.items)} ({name})")
    return said


def run(args: argparse.Namespace) -> str:
    """Read the folder, and return all that is asked for as text."""
    if not 0.5 <= args.confidence <= MOST_CONFIDENCE:
        raise ValueError(
            f"--confidence {args.confidence} must be from 0.5 to {MOST_CONFIDENCE}, such as 0.95"
        )
    if args.figure:
        plots.require_matplotlib()
        check_output("--figure", args.figure, (".png", ".svg"))
    for text in args.save:
        if file := text.partition("=")[2]:
            check_output("--save", Path(file), ())
    folder = read_folder(args.folder, args.data, args.limit)
    named = map(folder.require, dict.fromkeys(args.prune or ()))
    plans = list(named) or folder.plans
    against = [folder.require(args.against)] if args.against else []
    ordered = [*against, *(p for p in plans if p.plan != args.against)]
    parts = [format_scores(folder, plans, args.confidence)]
    parts.append(comparison.format_seeds(plans, folder.metric))
    if len(ordered) > 1:
        every = False if args.against else None
        pairs = comparison.compare_all(ordered, args.confidence, every)
        parts.append(comparison.format_pairs(pairs, folder.metric, args.confidence))
    if (unpruned := folder.find(NONE)) is not None:
        both = [unpruned, *(p for p in plans if p is not unpruned)]
        parts.append(comparison.format_agreement(both, args.confidence))
    if args.hard:
        parts.append(split_scores(folder, args, plans))
    if args.figure:
        draw(folder, plans, args.figure, args.confidence)
        parts.append(f"{args.figure}: {folder.metric} over image tokens")
    parts += save(folder, args)
    parts += [f"`{plan}` is not compared: {reason}" for plan, reason in folder.left_out.items()]
    return "\n\n".join(filter(None, parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, or 2 after an error."""
    parser = CommandParser(
        prog="python -m eval.analyse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=parse_path, metavar="DIR", help="the --out of eval.run")
    add("--data", type=parse_path, metavar="DIR", help="as for eval.run; demo needs none")
    add("--limit", type=parse_positive_int, metavar="N", help="as for eval.run")
    add("--prune", nargs="+", metavar="PLAN", help="plans to compare; default: all in the folder")
    add("--against", metavar="PLAN", help="compare each plan with this one only")
    add("--confidence", type=parse_float, default=CONFIDENCE, metavar="C", help="default 0.95")
    add("--figure", type=parse_path, metavar="FILE.png", help="draw scores over image tokens")
    add("--hard", action="store_true", help="split by hard questions and those without a picture")
    add(
        "--judge",
        metavar="PLAN",
        help="hard: wrong under this plan, not downsampling at each budget",
    )
    add(
        "--save",
        nargs="+",
        default=[],
        metavar="PART=FILE",
        help=f"write the ids of a part: {', '.join(subsets.SUBSETS)}",
    )
    return run_command(lambda: print(run(parser.parse_args(argv)), flush=True))


if __name__ == "__main__":
    sys.exit(main())
