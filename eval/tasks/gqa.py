"""GQA: questions about relations between objects in an image, answered by one word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..metrics import gqa as metric
from .base import SHORT, Answer, ImageSource, Item, Score, Setup, Task, accuracy, gold_of
from .files import Row, field, first_existing, id_field, image_folder, read_json, text_field
from .tables import find_table

FILE = "testdev_balanced_questions.json"


class GQA(Task):
    name = "gqa"
    title = "GQA"
    split = "testdev_balanced"
    needs = (
        f"a folder with {FILE} (questions1.2.zip of "
        "cs.stanford.edu/people/dorarad/gqa) and images/",
        "a folder with testdev_balanced_instructions/ and testdev_balanced_images/ of the "
        "datasets repository lmms-lab-encoder/GQA",
    )
    setups = {"llava": Setup(128), "lmms": Setup(16)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_dir():
            asked = find_table(source, "testdev_balanced_instructions")
            seen = find_table(source, "testdev_balanced_images")
            if asked is not None and seen is not None:
                place = {
                    str(id_field(row, "id", seen.path, f"row {i}")): seen.image(i)
                    for i, row in enumerate(seen.rows)
                }
                return [
                    _row(row, asked.path, i, place, seen.path)
                    for i, row in enumerate(asked.rows[:limit])
                ]
        path = (
            source
            if source.is_file()
            else first_existing(source, "testdev_balanced_questions.json")
        )
        if path is None:
            raise self.missing(source)
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not an object id -> question; give the official file")
        folder = image_folder(path.parent, "images", "data/images")
        return [
            Item(
                i,
                text_field(row, "question", path, i) + SHORT,
                (ImageSource.from_file(folder / f"{id_field(row, 'imageId', path, i)}.jpg"),),
                {"answer": row.get("answer")},
            )
            for i, row in list(values.items())[:limit]
        ]

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        correct = metric.lmms_correct if protocol == "lmms" else metric.llava_correct
        return accuracy(answers, [correct(a.said, gold_of(a)) for a in answers])


def _row(row: Row, path: Path, i: int, images: dict[str, ImageSource], where: Path) -> Item:
    """A question of a table. images: by id, from the table `where`."""
    image = str(id_field(row, "imageId", path, f"row {i}"))
    return Item(
        str(id_field(row, "id", path, f"row {i}")),
        text_field(row, "question", path, f"row {i}") + SHORT,
        (field(images, image, where, "the table of images"),),
        {"answer": row.get("answer")},
    )
