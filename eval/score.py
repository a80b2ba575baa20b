"""Score a file of predictions, from eval.run or another program: `python -m eval.score`.

    python -m eval.score --task scienceqa --questions llava_test_CQM-A_image.json \\
        --predictions answers.jsonl
    python -m eval.score --task pope --questions FOLDER --predictions answers.jsonl --protocol lmms

--questions is a question file with the right answers, as the benchmark distributes it, or the
folder that eval.run takes as --data. Predictions are matched to questions by id, never by order.
An answer that has none of the expected forms counts as unparsed, and a question without a
prediction as missing. Both are wrong, and neither is guessed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from minillava import parse_plan
from minillava.app.command import CommandParser, parse_path, parse_positive_int, run_command
from minillava.app.output_file import check_output

from . import ids, predictions, published, statistics, store
from .plans import NONE, files_of
from .tasks import TASKS
from .tasks.base import Item, Score, Task

NOT_IN_JSON = {"split", "credits", "parts"}  # entries of Score


class ScoredContent(TypedDict):
    """The entries of Scored.json()."""

    figure: str
    metric: str
    value: float | None
    n: int
    right: float | None
    unparsed: int
    more: dict[str, Any]
    notes: list[str]
    intervals: Mapping[str, list[float] | None]
    task: str
    title: str
    split: str
    protocol: str
    missing: int
    unknown: int
    duplicates: int


@dataclass(frozen=True)
class Scored:
    """A score with the task, split and protocol that it belongs to.

    intervals: 95 % intervals (low, high) of the score, under the name of its metric, and of the
    figures in `more` that have one; None if there are too few questions.
    """

    task: str
    title: str
    split: str
    protocol: str
    score: Score
    missing: int = 0
    unknown: tuple[str, ...] = ()  # where predictions stand that belong to no question
    duplicates: int = 0
    intervals: Mapping[str, Sequence[float] | None] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """A flat object: `value` as a number, `figure` as text with two decimals."""
        rest = asdict(replace(self, score=replace(self.score, credits=None, parts={})))
        score = rest.pop("score")
        rest["unknown"] = len(self.unknown)
        for name in NOT_IN_JSON:
            del score[name]
        if math.isnan(self.score.value):  # JSON has no NaN
            score["value"] = None
        return {"figure": f"{self.score.value:.2f}", **score, **rest}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Scored:
        """The inverse of json(), except for `unknown`, of which JSON has only the number."""
        entries = {k: v for k, v in found.items() if k not in ("figure", "unknown")}
        entries["value"] = math.nan if entries["value"] is None else entries["value"]
        names = {field.name for field in fields(Score)} - NOT_IN_JSON
        score = Score(**{name: entries.pop(name) for name in names})
        return cls(score=score, **entries)

    def text(self) -> str:
        """The figure with its counts, then further figures and notes, one on each line."""
        s = self.score
        counts = f"{s.right:g} of {s.n}" if s.right is not None else f"{s.n} questions"
        lines = [
            f"{self.title}, {self.split}, {self.protocol} protocol: {s.metric} {s.value:.2f}"
            f"{self._bounds(s.metric)} ({counts}; {s.unparsed:g} unparsed, {self.missing} missing)"
        ]
        lines += [
            f"  {name}: {_figure(value)}{self._bounds(name)}" for name, value in s.more.items()
        ]
        if self.duplicates:
            lines.append(
                f"  {self.duplicates} questions have several predictions: the last one counts"
            )
        if self.unknown:
            lines.append(
                f"  {len(self.unknown)} predictions belong to no question and do not count; the "
                f"first is {self.unknown[0]}"
            )
        if too_few := statistics.describe_too_few(s.n, statistics.CONFIDENCE):
            lines.append(f"  {too_few}")
        return "\n".join([*lines, *(f"  note: {note}" for note in s.notes)])

    def estimate(self, name: str | None = None) -> statistics.Estimate:
        """The score, or the figure `name` of `more`, with its interval."""
        value = self.score.value if name is None else self.score.more[name]
        low, high = self.intervals.get(name or self.score.metric) or (None, None)
        return statistics.Estimate(value, low, high)

    def _bounds(self, name: str) -> str:
        found = self.intervals.get(name)
        if found is None and name in self.score.more and name in self.intervals:
            return " (too few questions for an interval)"
        return f" [{found[0]:.1f}, {found[1]:.1f}]" if found else ""


def score(
    task: Task, items: Sequence[Item], found: Sequence[predictions.Prediction], protocol: str
) -> Scored:
    """Score predictions. Raises ValueError if none belongs to a question, or if the questions come
    without right answers.
    """
    matched = predictions.match(items, found)
    result = task.score(matched.answers, protocol)
    return Scored(
        task.name,
        task.title,
        result.split or task.split,
        protocol,
        result,
        sum(a.text is None for a in task.counted(matched.answers)),
        matched.unknown,
        matched.duplicates,
        find_intervals(result),
    )


def find_intervals(found: Score) -> dict[str, tuple[float, float] | None]:
    """The 95 % intervals of a score and of its parts, by name; None with too few questions."""
    main = {} if found.credits is None else {found.metric: found.credits}
    made = {**found.parts, **main}
    return {name: statistics.estimate(credits).bounds for name, credits in made.items()}


def find_task(name: str, protocol: str | None) -> tuple[Task, str]:
    """A task by its name, with the protocol or, without one, its first.

    Raises ValueError if there is no such task or protocol.
    """
    if name not in TASKS:
        raise ValueError(f"--task {name}: there is no such task; there are: {', '.join(TASKS)}")
    task = TASKS[name]
    protocol = protocol or next(iter(task.setups))
    if protocol not in task.setups:
        allowed = ", ".join(task.setups)
        raise ValueError(f"--protocol {protocol}: {name} is asked and scored as {allowed}")
    return task, protocol


def read_questions(
    task: Task, source: Path | None, protocol: str, limit: int | None = None
) -> list[Item]:
    """Task.items, but a value of the wrong type anywhere in a file is a ValueError, too."""
    try:
        items = task.items(source, protocol, limit)
        if strange := [item for item in items if not isinstance(item.text, str)]:
            raise TypeError(f"the question {strange[0].question_id} is not text")
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{source} does not have the format of {task.name} ({type(error).__name__}: {error}); "
            f"give {'; or '.join(task.needs)}"
        ) from error
    if not items:
        raise ValueError(
            f"{source} has no questions of {task.name}; give {'; or '.join(task.needs)}"
        )
    return items


def format_published(scored: Scored, model: str, plan: str, weights: str) -> str:
    """Published figures of the same task, split, metric, model, protocol and weights as text.

    The text is empty if there are none.
    """
    measured = published.Measured(
        scored.task,
        scored.split,
        scored.score.metric,
        model,
        plan,
        scored.protocol,
        weights,
        scored.score.value,
    )
    return "\n".join(published.format_comparison([measured]))


def _submit(
    task: Task, items: Sequence[Item], found: Sequence[predictions.Prediction], path: Path
) -> None:
    rows = task.submission(predictions.match(items, found).answers)
    store.write_atomically(path, store.as_json(rows))


def _check_compared(args: argparse.Namespace, plan: str, weights: str) -> None:
    """Refuse mistakes in --model, --prune and --weights before anything is read."""
    if not args.model:
        if given := [n for n in ("prune", "weights") if getattr(args, n) is not None]:
            raise ValueError(f"--{given[0]} says what --model measured; give --model, too")
        return
    if not files_of(plan):
        parse_plan("" if plan == NONE else plan)
    known = {figure.group.weights for figure in published.read_figures()}
    if weights not in known:
        raise ValueError(f"--weights {weights}: published are {', '.join(sorted(known))}")


def _figure(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, or 2 after an error."""
    parser = CommandParser(
        prog="python -m eval.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", required=True, metavar="T", help=", ".join(TASKS))
    add("--questions", type=parse_path, metavar="FILE", help="required but for demo")
    add("--predictions", type=parse_path, required=True, metavar="FILE")
    add("--protocol", metavar="P", help="llava (default) or lmms; a few tasks have others")
    add("--limit", type=parse_positive_int, metavar="N", help="score only the first N questions")
    add("--ids", type=parse_path, metavar="FILE", help="only these questions; see eval.analyse")
    add("--model", choices=published.LAYERS, help="also print its published figures")
    add("--prune", metavar="PLAN", help=f"with --model: the plan that was measured, or {NONE}")
    add("--weights", metavar="W", help="with --model: unquantised (default), nf4, …")
    add("--submission", type=parse_path, metavar="FILE", help="write a file for the server (VQAv2)")
    add("--json", action="store_true", help="print one JSON object with every number")

    def act() -> None:
        args = parser.parse_args(argv)
        task, protocol = find_task(args.task, args.protocol)
        plan, weights = args.prune or NONE, args.weights or published.UNQUANTISED
        _check_compared(args, plan, weights)
        if args.submission:
            if task.submission([]) is None:
                raise ValueError(f"--submission: there is no server for {task.name}; leave it out")
            check_output("--submission", args.submission, ())
        items = read_questions(task, args.questions, protocol, args.limit)
        if args.ids:
            items = ids.choose_items(items, ids.read_ids(args.ids), args.ids)
        found = predictions.read(args.predictions)
        scored = score(task, items, found, protocol)
        if args.submission:
            _submit(task, items, found, args.submission)
        print(json.dumps(scored.json()) if args.json else scored.text(), flush=True)
        if args.model and not args.json:
            text = format_published(scored, args.model, plan, weights)
            print(text or "there is no published figure to compare it with", flush=True)

    return run_command(act)


if __name__ == "__main__":
    sys.exit(main())
