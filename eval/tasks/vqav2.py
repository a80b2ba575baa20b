"""VQAv2: open questions about COCO images, with ten answers each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics.vqa import evalai_normalise
from .base import SHORT, Answer, ImageSource, Item, Score, Setup, Task, accuracy, vqa_credit
from .files import (
    Row,
    field,
    first_existing,
    id_field,
    image_folder,
    int_field,
    list_field,
    read_json,
    section,
    text_field,
)
from .tables import find_table

QUESTIONS = (
    "v2_OpenEnded_mscoco_val2014_questions.json",
    "v2_OpenEnded_mscoco_test-dev2015_questions.json",
)


class VQAv2(Task):
    """val is scored here. test-dev, which papers report, is scored only by the server."""

    name = "vqav2"
    title = "VQAv2"
    split = "val"
    needs = (
        f"a folder with {QUESTIONS[0]} and v2_mscoco_val2014_annotations.json (visualqa.org) and "
        "COCO's val2014/",
        f"a folder with {QUESTIONS[1]} and test2015/, for a submission",
        "a folder of the datasets repository lmms-lab-encoder/VQAv2 (validation*.parquet)",
    )
    setups = {"llava": Setup(128), "lmms": Setup(16)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_dir() and (table := find_table(source, "validation", "val")) is not None:
            return [
                _item(row, table.path, i, (table.image(i),), _texts(row, table.path, f"row {i}"))
                for i, row in enumerate(table.rows[:limit])
            ]
        path = source if source.is_file() else first_existing(source, *QUESTIONS)
        if path is None:
            raise self.missing(source)
        values = read_json(path)
        if (
            isinstance(values, dict) and "annotations" in values
        ):  # enough for scoring, not for asking
            rows = section(values, "annotations", path)
            return [
                _item({**row, "question": ""}, path, i, (), _golds(row, path, i))
                for i, row in enumerate(rows[:limit])
            ]
        rows = section(values, "questions", path)[:limit]
        year = next(
            (y for y in ("val2014", "test2015", "train2014") if y[:4] in path.name), "val2014"
        )
        answers = _annotations(path)
        folder = image_folder(path.parent, year, "images")
        items = []
        for i, row in enumerate(rows):
            number = id_field(row, "question_id", path, f"row {i}")
            image = int_field(row, "image_id", path, f"question {number}")
            if answers and number not in answers:
                raise ValueError(
                    f"{path} has question {number}, but the annotations beside it have no answers "
                    "to it; give files that belong together"
                )
            images = (ImageSource.from_file(folder / f"COCO_{year}_{image:012d}.jpg"),)
            items.append(_item(row, path, i, images, answers.get(number)))
        return items

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        if answers and all(a.item.gold["answers"] is None for a in answers):
            note = "these questions have no answers; eval.score --submission writes the file "
            note += "that the server at eval.ai scores"
            nothing = float("nan")
            return Score("accuracy", nothing, len(answers), notes=(note,), split="test-dev")
        rule = "vqav2" if protocol == "lmms" else "vqav2-original"
        return accuracy(answers, [vqa_credit(a, rule) for a in answers])

    def submission(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The rows of all questions; "" for those without an answer."""
        return [
            {"question_id": a.item.question_id, "answer": evalai_normalise(a.said)} for a in answers
        ]


def _item(
    row: Row, path: Path, i: int, images: tuple[ImageSource, ...], answers: list[str] | None
) -> Item:
    number = id_field(row, "question_id", path, f"row {i}")
    question = text_field(row, "question", path, f"question {number}")
    return Item(number, question + SHORT, images, {"answers": answers})


def _texts(row: Row, path: Path, where: str) -> list[str] | None:
    """The answers of a row, which has a list of objects; None if it has none."""
    if row.get("answers") is None:
        return None
    answers = list_field(row, "answers", path, where)
    return [text_field(answer, "answer", path, where) for answer in answers]


def _golds(row: Row, path: Path, i: int) -> list[str]:
    field(row, "answers", path, f"row {i}")
    return _texts(row, path, f"row {i}") or []


def _annotations(questions: Path) -> dict[str | int, list[str]]:
    """Question -> answers, of the annotations beside a question file; {} for the test split."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    path = questions.parent / name
    if not path.is_file():
        return {}
    rows = section(read_json(path), "annotations", path)
    return {
        id_field(row, "question_id", path, f"row {i}"): _golds(row, path, i)
        for i, row in enumerate(rows)
    }
