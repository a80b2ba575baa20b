"""ScienceQA: multiple choice from schoolbooks. Papers report the questions with an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..credits import Credits
from ..metrics import scienceqa as metric
from .base import (
    LETTER,
    LETTERS,
    Answer,
    ImageSource,
    Item,
    Score,
    Setup,
    Task,
    accuracy,
    gold_of,
    letter_options,
    split_scores,
)
from .files import (
    Row,
    choice_field,
    field,
    first_existing,
    id_field,
    list_field,
    options_field,
    read_json,
    text_field,
)
from .tables import Table, find_table

_PARTS = re.compile(r"Context: (.*)\nQuestion: (.*)\nOptions: (.*)", re.DOTALL)
_OPTION = re.compile(r"(?:^| )\(([A-Z])\) ")
_ANSWER = re.compile(r"The answer is ([A-Z])\.")


class ScienceQA(Task):
    """llava and simignore follow the scripts of the two repositories, which parse differently."""

    name = "scienceqa"
    title = "ScienceQA"
    split = "test with image"
    needs = (
        "a folder with llava_test_CQM-A.json (LLaVA's eval.zip) or problems.json and "
        "pid_splits.json (github.com/lupantech/ScienceQA), and the images as "
        "images/test/ID/image.png",
        "a folder of the datasets repository lmms-lab-encoder/ScienceQA, config ScienceQA-IMG",
    )
    setups = {  # noqa: RUF012
        "llava": Setup(1024),
        "lmms": Setup(16),
        "simignore": Setup(1, use_cache=False),
    }
    image_in_prompt = True

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        """The questions with an image for a folder, all questions for a file."""
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_file():
            found = self._file(source, protocol)
        elif (table := find_table(source, "test")) is not None:
            seen = [i for i in range(len(table.rows)) if table.count_images(i)]
            found = [self._row(table, i, protocol) for i in seen or range(len(table.rows))]
        else:
            names = ("llava_test_CQM-A_image.json", "llava_test_CQM-A.json", "problems.json")
            path = first_existing(source, *names)
            if path is None:
                raise self.missing(source)
            found = [item for item in self._file(path, protocol) if item.images]
        return found[:limit]

    def _row(self, table: Table, i: int, protocol: str) -> Item:
        row, where = table.rows[i], f"row {i}"
        number = id_field({"id": i, **row}, "id", table.path, where)
        parts = _parts(row, table.path, where)
        gold = choice_field(row, "answer", len(parts[2]), table.path, where)
        return self._item(number, parts, gold, (table.image(i),), protocol)

    def _file(self, path: Path, protocol: str) -> list[Item]:
        values = read_json(path)
        folder = (
            first_existing(path.parent, "images/test", "test", "images") or path.parent / "images"
        )
        if isinstance(values, dict):
            return self._problems(path, values, folder, protocol)
        if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
            raise ValueError(
                f"{path} is neither a list of questions nor problems.json; see {self.name}"
            )
        return [self._conversation(path, row, folder, protocol) for row in values]

    def _problems(
        self, path: Path, problems: dict[str, Any], images: Path, protocol: str
    ) -> list[Item]:
        splits = path.parent / "pid_splits.json"
        if splits.is_file():
            ids = list_field(read_json(splits), "test", splits, "it")
        else:
            ids = [i for i, p in problems.items() if field(p, "split", path, i) == "test"]
        items = []
        for i in map(str, ids):
            p = field(problems, i, path, "problems.json")
            parts = _parts(p, path, i)
            sources: tuple[ImageSource, ...] = ()
            if p.get("image"):
                sources = (ImageSource.from_file(images / i / text_field(p, "image", path, i)),)
            field(p, "answer", path, i)
            gold = choice_field(p, "answer", len(parts[2]), path, i)
            items.append(self._item(i, parts, gold, sources, protocol))
        return items

    def _conversation(self, path: Path, row: Row, images: Path, protocol: str) -> Item:
        i = id_field(row, "id", path, "a question")
        turns = list_field(row, "conversations", path, f"question {i}")
        turns = [text_field(turn, "value", path, f"question {i}") for turn in turns]
        if not turns:
            raise ValueError(f"{path}: question {i} has no conversation; give the official file")
        text = turns[0].replace("<image>", "").strip()
        parts = _PARTS.fullmatch(text)
        answer = _ANSWER.search(turns[1]) if len(turns) > 1 else None
        if parts is None:
            raise ValueError(f"{path}: question {i} is not of the form Context, Question, Options")
        choices = _OPTION.split(parts[3])[2::2]
        right = {"answer": ord(answer[1]) - ord("A")} if answer else {}
        gold = choice_field(right, "answer", len(choices), path, f"question {i}")
        sources: tuple[ImageSource, ...] = ()
        if row.get("image"):
            sources = (ImageSource.from_file(images / text_field(row, "image", path, i)),)
        hint = "" if parts[1] == "N/A" else parts[1]
        return self._item(i, (hint, parts[2], choices), gold, sources, protocol, text + LETTER)

    def _item(
        self,
        number: object,
        parts: tuple[str, str, Sequence[str]],
        answer: int | None,
        sources: tuple[ImageSource, ...],
        protocol: str,
        text: str | None = None,
    ) -> Item:
        hint, question, choices = parts
        if protocol == "lmms":
            context = f"Context: {hint}\n" if hint else ""
            text = f"{context}{question}\n{letter_options(choices)}{LETTER}"
        elif text is None:
            options = letter_options(choices, "({}) {}", " ")
            text = f"Context: {hint or 'N/A'}\nQuestion: {question}\nOptions: {options}{LETTER}"
        gold = {"answer": None if answer is None else LETTERS[answer], "choices": len(choices)}
        return Item(str(number), text, sources, gold)

    def counted(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        asked = [a for a in answers if a.item.images]
        blind = [a for a in answers if not a.item.images]
        return asked if asked and all(a.text is None for a in blind) else answers

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        """The accuracy. If no question without an image has an answer, these are left out.

        Papers ask only the questions with an image.
        """
        every, answers = answers, self.counted(answers)
        notes: tuple[str, ...] = ()
        if left := len(every) - len(answers):
            notes = (f"none of the {left} questions without an image is answered: left out",)
        golds = [gold_of(a) for a in answers]
        letters = [_letter(a, protocol) for a in answers]
        right = [letter == gold for letter, gold in zip(letters, golds, strict=True)]
        given = [letter for a, letter in zip(answers, letters, strict=True) if a.text is not None]

        has_image = [bool(a.item.images) for a in answers]
        parts: dict[str, Credits] = {}
        if not all(has_image):
            labels = ["with image" if has else "without image" for has in has_image]
            parts = split_scores(answers, right, labels)
        more = {
            text: number
            for name, part in sorted(parts.items())
            for text, number in ((name, part.score), (f"{name}, questions", len(part)))
        }
        split, unparsed = self.split if all(has_image) else "test", given.count(None)
        return accuracy(answers, right, unparsed, more=more, notes=notes, split=split, parts=parts)


def _parts(row: Row, path: Path, where: str) -> tuple[str, str, list[str]]:
    """The hint, question and choices of a row."""
    question = text_field(row, "question", path, where)
    hint = "" if row.get("hint") is None else text_field(row, "hint", path, where)
    return hint, question, options_field(row, "choices", path, where)


def _letter(answer: Answer, protocol: str) -> str | None:
    """The letter of an answer, or None if it is not a letter of the question."""
    possible = LETTERS[: answer.item.gold["choices"]]
    if protocol == "lmms":
        return next((x for x in possible if metric.lmms_correct(answer.said, x)), None)
    letter = metric.parse(answer.said, protocol)
    return letter if letter is not None and letter in possible else None
