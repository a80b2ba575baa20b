"""Score a file of predictions, ours or anybody's: `python -m eval.score`.

    python -m eval.score --task scienceqa --questions llava_test_CQM-A_image.json \\
        --predictions answers.jsonl
    python -m eval.score --task pope --questions FOLDER --predictions answers.jsonl --protocol lmms

--questions is a file with the answers that are right, as the benchmark distributes it, or the
folder that eval.run takes as --data. Predictions are matched by id, never by their order. An answer
in none of the forms that are looked for is counted as unparsed, a question without prediction as
missing; both are wrong, and neither is guessed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minillava.app.command import CommandParser as Parser
from minillava.app.command import parse_positive_int as positive
from minillava.app.command import run_command as command

from . import predictions, published, store
from .tasks import TASKS
from .tasks.base import Item, Score, Task


@dataclass(frozen=True)
class Scored:
    """A score with what it is of."""

    task: str
    title: str
    split: str
    protocol: str
    score: Score
    missing: int = 0
    unknown: tuple[str, ...] = ()  # predictions that belong to no question
    duplicates: int = 0

    def json(self) -> dict[str, Any]:
        """One flat object; value as it is, figure with two decimals."""
        rest = asdict(self)
        score = rest.pop("score")
        rest["unknown"] = len(self.unknown)
        del score["split"]
        if math.isnan(self.score.value):  # which JSON does not know
            score["value"] = None
        return {"figure": f"{self.score.value:.2f}", **score, **rest}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Scored:
        """What json() gave, but for where the unknown predictions stood."""
        entries = {k: v for k, v in found.items() if k not in ("figure", "unknown")}
        entries["value"] = math.nan if entries["value"] is None else entries["value"]
        names = {field.name for field in fields(Score)} - {"split"}
        score = Score(**{name: entries.pop(name) for name in names})
        return cls(score=score, **entries)

    def text(self) -> str:
        """The figure with what stands behind it, then further figures and notes, a line each."""
        s = self.score
        counts = f"{s.right:g} of {s.n}" if s.right is not None else f"{s.n} questions"
        lines = [
            f"{self.title}, {self.split}, {self.protocol} protocol: {s.metric} {s.value:.2f} "
            f"({counts}; {s.unparsed} unparsed, {self.missing} missing)"
        ]
        lines += [f"  {name}: {_figure(value)}" for name, value in s.more.items()]
        if self.duplicates:
            lines.append(f"  {self.duplicates} questions were answered again: the last one counts")
        if self.unknown:
            lines.append(
                f"  {len(self.unknown)} predictions belong to no question and do not count, the "
                f"first is {self.unknown[0]}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in s.notes)])


def score(
    task: Task, items: Sequence[Item], found: Sequence[predictions.Prediction], protocol: str
) -> Scored:
    """ValueError where predictions do not belong to the questions, or these have no answers."""
    matched = predictions.match(items, found)
    result = task.score(matched.answers, protocol)
    return Scored(
        task.name,
        task.title,
        result.split or task.split,
        protocol,
        result,
        matched.missing,
        matched.unknown,
        matched.duplicates,
    )


def find_task(name: str, protocol: str | None) -> tuple[Task, str]:
    """A task, and the protocol, without one its first. ValueError: there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"--task {name}: there is no such task; there are: {', '.join(TASKS)}")
    task = TASKS[name]
    protocol = protocol or next(iter(task.setups))
    if protocol not in task.setups:
        allowed = ", ".join(task.setups)
        raise ValueError(f"--protocol {protocol}: {name} is asked and scored as {allowed}")
    return task, protocol


def questions(
    task: Task, source: Path | None, protocol: str, limit: int | None = None
) -> list[Item]:
    """Task.items, for files that anybody may have written: a value of a wrong kind deep in one is
    an error of the file's, too (ValueError)."""
    try:
        items = task.items(source, protocol, limit)
        if strange := [item for item in items if not isinstance(item.text, str)]:
            raise TypeError(f"the question {strange[0].question_id} is no text")
        return items
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{source} is not as {task.name} is distributed ({type(error).__name__}: {error}); "
            f"give {'; or '.join(task.needs)}"
        ) from error


def beside_published(scored: Scored, model: str, plan: str, weights: str) -> str:
    """Published figures of the same task, split, metric, model, protocol and weights as text; empty
    where there are none."""
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
    tables = published.beside([measured], published.load())
    return "\n".join(published.text_of(table) for table in tables if table.sources)


def _submit(
    task: Task, items: Sequence[Item], found: Sequence[predictions.Prediction], path: Path
) -> None:
    rows = task.submission(predictions.match(items, found).answers)
    if rows is None:
        raise ValueError(f"--submission: {task.name} has no server that takes one")
    store.write_atomically(path, store.as_json(rows))


def _figure(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, or 2 after an error."""
    parser = Parser(
        prog="python -m eval.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", required=True, metavar="T", help=", ".join(TASKS))
    add("--questions", type=Path, metavar="FILE", help="not for demo, which draws its own")
    add("--predictions", type=Path, required=True, metavar="FILE")
    add("--protocol", metavar="P", help="llava (default) or lmms; a few tasks have others")
    add("--limit", type=positive, metavar="N", help="only the first N questions were asked")
    add("--model", choices=published.LAYERS, help="show its published figures beside")
    add("--prune", default="none", metavar="PLAN", help="with --model: what was measured")
    add("--weights", default=published.UNQUANTISED, metavar="W", help="with --model: or nf4, …")
    add("--submission", type=Path, metavar="FILE", help="write what the server takes (VQAv2)")
    add("--json", action="store_true", help="one object with every number")

    def act() -> None:
        args = parser.parse_args(argv)
        task, protocol = find_task(args.task, args.protocol)
        items = questions(task, args.questions, protocol, args.limit)
        found = predictions.read(args.predictions)
        scored = score(task, items, found, protocol)
        if args.submission:
            _submit(task, items, found, args.submission)
        print(json.dumps(scored.json()) if args.json else scored.text(), flush=True)
        if args.model and not args.json:
            beside = beside_published(scored, args.model, args.prune, args.weights)
            print(beside or "nothing is published here that may stand beside it", flush=True)

    return command(act)


if __name__ == "__main__":
    sys.exit(main())
