"""MME: two yes/no questions about each image, in fourteen categories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..credits import Credits
from ..metrics import mme as metric
from .base import (
    SHORT,
    Answer,
    ImageSource,
    Item,
    Score,
    Setup,
    Task,
    count_unparsed,
    gold_of,
    names_of,
)
from .files import id_field, image_folder, tab_rows, text_field
from .tables import find_table

_INSTRUCTION = " Please answer yes or no."
CATEGORIES = (*metric.PERCEPTION, *metric.COGNITION)


class MME(Task):
    """The value is perception (at most 2,000); cognition (at most 800) is in `more`."""

    name = "mme"
    title = "MME"
    split = "test"
    needs = (
        "the folder MME_Benchmark_release_version of the official release (asked for at "
        "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models), with a folder for each "
        "category",
        "a folder of the datasets repository lmms-lab-encoder/MME (test*.parquet)",
        "to score: a folder of CATEGORY.txt with image, question and right answer, separated by "
        "tabs",
    )
    setups = {"llava": Setup(128), "lmms": Setup(16)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        found = list(self._all(source))
        if not found:
            raise self.missing(source)
        return found[: limit and limit + limit % 2]  # two questions for each image

    def _all(self, source: Path) -> Iterator[Item]:
        if source.is_dir() and (table := find_table(source, "test")) is not None:
            for i, row in enumerate(table.rows):
                name = str(id_field(row, "question_id", table.path, f"row {i}"))
                category = row.get("category") or name.partition("/")[0]
                gold = {"answer": row.get("answer"), "category": category}
                question = text_field(row, "question", table.path, f"row {i}")
                yield _item(name, question, (table.image(i),), gold)
            return
        if source.is_file():
            yield from _lines(source)
            return
        for category in CATEGORIES:
            if (source / f"{category}.txt").is_file():
                yield from _lines(source / f"{category}.txt")
            elif (source / category).is_dir():
                yield from _category(source / category)

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        rows = [
            metric.Row(str(a.item.question_id), gold_of(a, "category"), gold_of(a), a.said)
            for a in answers
        ]
        if not rows:
            raise ValueError("there are no questions to score; give a file that has some")
        scores = metric.scores(rows)
        parts = {
            "perception": sum(scores.get(c, 0.0) for c in metric.PERCEPTION),
            "cognition": sum(v for c, v in scores.items() if c not in metric.PERCEPTION),
        }
        more = {
            "cognition": parts["cognition"],
            "perception + cognition": sum(parts.values()),
            **scores,
        }
        missing = [c for c in CATEGORIES if c not in scores]
        notes = (f"without {', '.join(missing)}: not a figure of the whole MME",) if missing else ()
        right = sum(map(metric.is_right, rows))
        unparsed = count_unparsed(answers, lambda t: {"other": None}.get(metric.parse(t), t))
        credits = _credits(answers, rows)
        return Score(
            "perception",
            parts["perception"],
            len(rows),
            right,
            unparsed,
            more,
            notes,
            credits=credits.pop("perception"),
            parts=credits,
        )


def _credits(answers: Sequence[Answer], rows: Sequence[metric.Row]) -> dict[str, Credits]:
    """The credits of images with their two questions, by figure: categories are summed."""
    categories = [row.category for row in rows]
    every = Credits.merged(
        names_of(answers),
        [(row.category, row.image) for row in rows],
        [metric.is_right(row) for row in rows],
        lambda pair: 50.0 * sum(pair) + 100.0 * all(pair),
        categories,
        scale=1.0,
        most=200.0,
    )
    seen = np.array([categories[own[0]] in metric.PERCEPTION for own in every.members])
    return {
        "perception": every.select(seen),
        "cognition": every.select(~seen),
        "perception + cognition": every,
        **{str(category): part for category, part in every.split(categories).items()},
    }


def _item(
    name: str, question: str, sources: tuple[ImageSource, ...], gold: Mapping[str, object]
) -> Item:
    return Item(name, question.strip().replace(_INSTRUCTION, "") + SHORT, sources, gold)


def _category(folder: Path) -> Iterator[Item]:
    """Images, each with a text file of two questions, in one folder or in two."""
    images = image_folder(folder, "images") if (folder / "images").is_dir() else folder
    texts = image_folder(folder, "questions_answers_YN")
    texts = texts if texts.is_dir() else folder
    found = {p.stem: p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".png", ".jpeg")}
    for path in sorted(texts.glob("[!.]*.txt")):  # not the ._NAME.txt of a Mac's archives
        if path.stem not in found:
            raise ValueError(f"{path} has no image in {images}; download the release again")
        image = found[path.stem]
        for question, answer in tab_rows(path, (2,)):
            gold = {"answer": answer, "category": folder.name}
            name = f"{folder.name}/{image.name}"
            yield _item(name, question, (ImageSource.from_file(image),), gold)


def _lines(path: Path) -> Iterator[Item]:
    """A file of answers in LLaVA's or the official format; the third field is the right answer."""
    for image, question, truth, *_ in tab_rows(path, (3, 4)):
        gold = {"answer": truth, "category": path.stem}
        yield _item(
            f"{path.stem}/{image}", question, (ImageSource.from_file(path.parent / image),), gold
        )
