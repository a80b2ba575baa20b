"""The answers under one plan, with one seed or several, ready to be compared with another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from . import statistics
from .credits import Credits, average
from .plans import file_name
from .results import PlanResult, digest_questions, read_result
from .score import Scored, find_intervals
from .statistics import Difference, Estimate
from .tasks.base import Answer, Item, Score, Task
from .typed import parse_json, refuse_special_file


@dataclass(frozen=True)
class SeedAnswers:
    """The answers under one plan with one seed."""

    result: PlanResult
    score: Score
    texts: tuple[str, ...]  # [question]
    kl: tuple[float | None, ...]  # [question] of the first token, from the unpruned model's

    @property
    def credits(self) -> Credits:
        assert self.score.credits is not None  # _read_seed refuses others
        return self.score.credits


@dataclass(frozen=True)
class Answers:
    """The answers under one plan. Its score is the mean over its seeds, question by question."""

    seeds: tuple[SeedAnswers, ...]  # the first is that of --out, the others of --out/seed-N

    @property
    def result(self) -> PlanResult:
        return self.seeds[0].result

    @property
    def plan(self) -> str:
        return self.result.run.plan

    @cached_property
    def credits(self) -> Credits:
        return average([seed.credits for seed in self.seeds])

    @cached_property
    def scored(self) -> Scored:
        """The score of all seeds with its intervals: of figures that have credits, that of the mean
        credits, and of other numbers the mean."""
        scored, scores = self.result.scored, [seed.score for seed in self.seeds]
        if len(scores) == 1:
            return scored
        parts = {
            name: average([score.parts[name] for score in scores])
            for name in scores[0].parts
            if all(name in score.parts for score in scores)
        }
        more = {
            name: parts[name].score if name in parts else _mean([s.more.get(name) for s in scores])
            for name in scores[0].more
        }
        score = replace(
            scored.score,
            value=self.credits.score,
            right=_mean([s.right for s in scores]),
            unparsed=_mean([s.unparsed for s in scores]),
            more=more,
            credits=self.credits,
            parts=parts,
        )
        return replace(scored, score=score, intervals=find_intervals(score))

    def estimate(self, confidence: float = statistics.CONFIDENCE) -> Estimate:
        return statistics.estimate(self.credits, confidence)

    def compare(self, other: Answers, confidence: float = statistics.CONFIDENCE) -> Difference:
        """This plan minus another. Of two plans that both draw at random, the seeds that both have
        are compared. Raises ValueError for answers of other questions, seeds or settings."""
        ours, theirs = self._with_seeds_of(other), other._with_seeds_of(self)
        if reason := ours.result.find_mismatch(theirs.result):
            raise ValueError(reason)
        return statistics.compare(theirs.credits, ours.credits, confidence)

    def _with_seeds_of(self, other: Answers) -> Answers:
        if not (self.result.draws and other.result.draws):
            return self
        common = {seed.result.run.seed for seed in other.seeds}
        found = tuple(seed for seed in self.seeds if seed.result.run.seed in common)
        if not found:
            raise ValueError(
                f"{self.plan} was asked with seed {self.result.run.seed}, and {other.plan} with "
                f"{', '.join(map(str, sorted(common)))}: answers of other seeds cannot be paired"
            )
        return Answers(found)

    def agreement(self, unpruned: Answers, confidence: float = statistics.CONFIDENCE) -> Estimate:
        """Percent of the answers that equal the unpruned model's, character by character."""
        said = unpruned.seeds[0].texts
        names = [str(i) for i in range(len(said))]
        same = [
            Credits.of(names, [a == b for a, b in zip(seed.texts, said, strict=True)])
            for seed in self.seeds
        ]
        return statistics.estimate(average(same), confidence)

    @property
    def mean_kl(self) -> float | None:
        """The mean KL of the first token in nats; None if a question has none."""
        every = [kl for seed in self.seeds for kl in seed.kl]
        known = [kl for kl in every if kl is not None]
        return sum(known) / len(known) if known and len(known) == len(every) else None


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, as an int if it is whole; None if one is missing."""
    if any(value is None for value in values):
        return None
    mean = sum(values) / len(values)
    return int(mean) if isinstance(values[0], int) and mean == int(mean) else mean


def read_answers(folder: Path, result: PlanResult, task: Task, items: Sequence[Item]) -> Answers:
    """The answers of a result that stands in --out, with all its seeds there.

    items: the questions that were asked. Raises ValueError if the answers belong to other ones, and
    for damaged files.
    """
    if digest_questions(items) != result.questions:
        raise ValueError(
            f"{folder / file_name(result.run.plan)}.jsonl answers other questions than the "
            f"{len(items)} of {task.name} that are read now; give the same --data, --limit and "
            "--ids as to eval.run, or its command again if a file of answers was changed"
        )
    name = f"{file_name(result.run.plan)}.jsonl"
    others = sorted(folder.glob(f"seed-*/{name}")) if result.draws else []
    found, seen = [_read_seed(folder / name, result, task, items)], {result.run.seed: folder / name}
    for path in others:
        other = read_result(path)
        if reason := replace(other, draws=False).find_mismatch(result):
            raise ValueError(f"{path}: {reason}; ask it again with the settings of {folder}")
        if (first := seen.setdefault(other.run.seed, path)) != path:
            raise ValueError(
                f"{path} and {first} both have seed {other.run.seed}; take one of them away"
            )
        found.append(_read_seed(path, other, task, items))
    return Answers(tuple(found))


def _read_seed(path: Path, result: PlanResult, task: Task, items: Sequence[Item]) -> SeedAnswers:
    rows = read_rows(path)
    asked = [(i, str(item.question_id)) for i, item in enumerate(items)]
    if [(row.number, str(row.question_id)) for row in rows] != asked:
        raise ValueError(
            f"{path} has {len(rows)} answers, but not one to each of the {len(items)} questions in "
            "their order; give the command of eval.run again"
        )
    for row, item in zip(rows, items, strict=True):
        if row.plan != result.run.plan:
            raise ValueError(
                f"{path} has an answer under the plan {row.plan}, not {result.run.plan}: question "
                f"{row.question_id}; delete the file, and give the command of eval.run again"
            )
        if not row.prompt.endswith(item.text):
            raise ValueError(
                f"{path} answers {row.prompt[-60:]!r} under the id {row.question_id}, whose "
                f"question is {item.text[-60:]!r}; give another --out to eval.run, and ask again"
            )
    score = result.scored.score
    if score.credits is None:  # it was read from its file
        answers = [Answer(item, row.text) for item, row in zip(items, rows, strict=True)]
        score = task.score(answers, result.run.protocol)
        noted = result.scored.score.value
        if not math.isclose(score.value, noted, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(
                f"{path} scores {score.value:.4f}, but {path.with_suffix('.json').name} says "
                f"{noted:.4f}: it was scored in another way (version, tokeniser), or one of them "
                f"was changed; give eval.run again with --prune {result.run.plan}"
            )
    if score.credits is None:
        raise ValueError(f"{task.name} has no right answers here, so plans cannot be compared")
    texts, kl = tuple(row.text for row in rows), tuple(row.kl for row in rows)
    return SeedAnswers(result, score, texts, kl)


@dataclass(frozen=True)
class AnswerRow:
    """What comparisons need of a line of an answer file."""

    number: int
    plan: str
    question_id: str | int
    prompt: str
    text: str
    kl: float | None


def read_rows(path: Path) -> list[AnswerRow]:
    """The lines of a file that eval.run has finished. Raises ValueError for a damaged one.

    Entries that only eval.run needs, when it continues, are not checked: 10,000 lines take less
    than a second.
    """
    refuse_special_file(path)
    return [
        _read_row(line, f"{path}, line {i}")
        for i, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1)
    ]


def _read_row(line: bytes, where: str) -> AnswerRow:
    try:
        row = parse_json(line)
        more = row["metadata"]
        found = AnswerRow(
            more["number"],
            more["plan"],
            row["question_id"],
            row["prompt"],
            row["text"],
            more.get("kl"),
        )
        texts = all(isinstance(text, str) for text in (found.plan, found.prompt, found.text))
        numbers = isinstance(found.number, int) and isinstance(found.kl, float | int | None)
        named = isinstance(found.question_id, str | int)
        reason = "" if texts and numbers and named else "an entry has another type"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)
    if reason:
        raise ValueError(f"{where} is not an answer of eval.run: {reason}; give its command again")
    return found
