"""SEED-Bench: multiple choice about images and about video clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..metrics import seed_bench as metric
from .base import (
    LETTER,
    Answer,
    ImageSource,
    Item,
    Score,
    Setup,
    Task,
    accuracy,
    count_unparsed,
    gold_of,
    letter_options,
    split_scores,
)
from .files import (
    Row,
    first_existing,
    id_field,
    image_folder,
    option_field,
    read_json,
    section,
    text_field,
)
from .tables import find_table


class SEEDBench(Task):
    """A folder gives the questions about images only: frames of clips are not extracted."""

    name = "seed_bench"
    title = "SEED-Bench"
    split = "image"
    needs = (
        "a folder with SEED-Bench.json and SEED-Bench-image/ (the datasets repository "
        "AILab-CVC/SEED-Bench)",
        "a folder of lmms-lab-encoder/SEED-Bench (test*.parquet)",
    )
    setups = {"llava": Setup(128), "lmms": Setup(1024)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_dir() and (table := find_table(source, "test")) is not None:
            found = []
            for i, row in enumerate(table.rows):
                many = max(table.count_images(i), 1)
                images = tuple(table.image(i, number=j) for j in range(many))
                found.append(_item(row, table.path, i, images))
            return found[:limit]
        path = source if source.is_file() else first_existing(source, "SEED-Bench.json")
        if path is None:
            raise self.missing(source)
        folder = image_folder(path.parent, "SEED-Bench-image", "images")
        found = []
        for i, row in enumerate(section(read_json(path), "questions", path)):
            id_field(row, "question_id", path, f"row {i}")
            is_image = row.get("data_type", "image") == "image"
            images = (ImageSource.from_file(folder / str(row.get("data_id"))),) if is_image else ()
            if is_image or source.is_file():
                found.append(_item(row, path, i, images))
        return found[:limit]

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        correct = metric.lmms_correct if protocol == "lmms" else metric.llava_correct
        right = [correct(a.said, gold_of(a)) for a in answers]
        kinds = [a.item.gold["data_type"] for a in answers]
        parts, notes = split_scores(answers, right, kinds), []
        more = {kind: part.score for kind, part in parts.items()}
        if "video" in more:
            notes.append(
                "figures called SEED are of images and clips together in some papers and tables, "
                "also under the name Image-acc (60.5), and of images alone in others"
            )
        there = ", ".join(more)
        split = there if there in ("image", "video") else "image and video"

        def parse(text: str) -> object:
            return next((x for x in "ABCD" if correct(text, x)), None)

        unparsed = count_unparsed(answers, parse)
        return accuracy(
            answers, right, unparsed, more=more, notes=tuple(notes), split=split, parts=parts
        )


def _item(row: Row, path: Path, i: int, images: tuple[ImageSource, ...]) -> Item:
    number = id_field(row, "question_id", path, f"row {i}")
    choices = [option_field(row, f"choice_{x}", path, f"question {number}") for x in "abcd"]
    question = text_field(row, "question", path, f"question {number}")
    text = f"{question}\n{letter_options(choices)}{LETTER}"
    gold = {"answer": row.get("answer"), "data_type": str(row.get("data_type", "image"))}
    return Item(str(number), text, images, gold)
