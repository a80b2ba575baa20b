"""RefCOCO, RefCOCO+ and RefCOCOg: where in the image is what a phrase describes?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..credits import Credits
from ..metrics import refcoco as metric
from .base import (
    Answer,
    ImageSource,
    Item,
    Score,
    Setup,
    Task,
    accuracy,
    count_unparsed,
    names_of,
    question_key,
    split_scores,
)
from .files import Row, first_existing, id_field, int_field, json_rows, list_field, text_field
from .refer import REFS, read_mdetr, read_refs
from .tables import Table, find_table

ASKED = "Please provide the bounding box coordinate of the region this sentence describes: "
FORMAT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
    "bottom-right y). All values are floating point numbers bounded between 0 and 1. "
)
NOT_UNDONE = (
    "boxes are compared in the image as it is, though LLaVA-1.5 gives them in the padded square"
)


@dataclass(frozen=True)
class RefCOCO(Task):
    """One of the three benchmarks. All splits that are in --data are asked.

    llava asks as ConvLLaVA's evaluate_grounding.py, lmms as lmms-eval's refcoco_bbox_rec.
    """

    name: str  # type: ignore[misc]
    title: str  # type: ignore[misc]
    splits: tuple[str, ...]
    repository: str

    setups = {"llava": Setup(100), "lmms": Setup(1024)}  # noqa: RUF012

    @property
    def split(self) -> str:  # type: ignore[override]
        return ", ".join(self.splits)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        files = ", ".join(f"{self.name}_{split}.jsonl" for split in self.splits)
        return (
            f"a folder with some of {files} (lines of image, sent, bbox, width and height, as "
            "Qwen-VL's and InternVL's evaluation have them) and COCO's train2014/",
            "a folder of github.com/lichengunc/refer with refs(unc).p or refs(umd).p and "
            f"instances.json, or MDETR's finetune_{self.name}_val.json, …, with the same pictures",
            f"a folder of the datasets repository {self.repository} (val-*.parquet, …)",
        )

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        found = list(islice(self._all(source, protocol), limit))
        if not found:
            raise self.missing(source)
        return found

    def _all(self, source: Path, protocol: str) -> Iterator[Item]:
        if source.is_file():
            ending = source.stem.rpartition("_")[2]
            split = ending if ending in self.splits else source.stem
            yield from _read_lines(source, split, protocol)
            return
        places = [f"{folder}{refs}" for folder in ("", f"{self.name}/") for refs in REFS]
        if (pickled := first_existing(source, *places)) is not None:
            for split in self.splits:
                yield from _items(read_refs(pickled, split), pickled, split, protocol, sides=True)
            return
        if (saved := find_table(source)) is not None:
            split = source.name if source.name in self.splits else "all"
            yield from _read_table(saved, split, protocol)
            return
        for split in self.splits:  # not "test" alone: test*.parquet is also testA and testB
            table = find_table(source, *(f"{split}{end}" for end in ("-", ".", "/")))
            name, shikra = f"{self.name}_{split}.jsonl", f"REC_{self.name}_%s_{split}.jsonl"
            lines = (name, f"{self.name}/{name}", shikra % "unc", shikra % "umd")
            path = first_existing(source, *lines)
            name = f"finetune_{self.name}_{split}.json"
            mdetr = first_existing(source, name, f"mdetr_annotations/{name}")
            if table is not None:
                yield from _read_table(table, split, protocol)
            elif path is not None:
                yield from _read_lines(path, split, protocol)
            elif mdetr is not None:
                yield from _items(read_mdetr(mdetr), mdetr, split, protocol, sides=True)

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        parse, iou = (
            (metric.lmms_box, metric.lmms_iou)
            if protocol == "lmms"
            else (metric.llava_box, metric.llava_iou)
        )
        ious = np.array([iou(a.said, a.item.gold["box"], a.item.gold["size"]) for a in answers])
        right = (ious >= metric.ENOUGH).tolist()
        scored = accuracy(answers, right, count_unparsed(answers, parse))
        splits = [a.item.gold["split"] for a in answers]
        parts = split_scores(answers, right, splits)
        names = list(parts)
        parts = parts if len(names) > 1 else {}
        overlap = np.nan_to_num(ious, posinf=0.0, neginf=0.0)
        parts["mean IoU"] = Credits.of(names_of(answers), overlap.tolist())
        more = {name: part.score for name, part in parts.items()}
        is_padded = any(len(set(a.item.gold["size"])) > 1 for a in answers)
        notes = (NOT_UNDONE,) if protocol == "lmms" and is_padded else ()
        return replace(
            scored,
            metric="Acc@0.5",
            more=more,
            notes=notes,
            split=", ".join(names),
            parts=parts,
        )


def _read_lines(path: Path, split: str, protocol: str) -> Iterator[Item]:
    """The questions of JSON lines, whose boxes are left, top, right and bottom in pixels. The names
    img_path and expression are Shikra's."""
    every = json_rows(path)
    rows = ({"image": r.get("img_path"), "sent": r.get("expression")} | r for r in every)
    yield from _items(rows, path, split, protocol)


def _items(
    rows: Iterable[Row], path: Path, split: str, protocol: str, sides: bool = False
) -> Iterator[Item]:
    """The questions of rows with image, sent, bbox, width and height. sides: as for _box."""
    for i, row in enumerate(rows):
        where = f"row {i}"
        size = tuple(int_field(row, name, path, where) for name in ("width", "height"))
        if min(size) < 1:
            raise _wrong(path, where, f"width and height are {size}", "at least 1")
        box = _box(row, path, where, sides)
        image = _find_image(path.parent, text_field(row, "image", path, where))
        phrase = text_field(row, "sent", path, where)
        gold = {"box": box, "size": size, "split": split}
        yield Item(f"{split}/{i}", _ask(phrase, protocol), (image,), gold)


def _read_table(table: Table, split: str, protocol: str) -> Iterator[Item]:
    """The questions of a table, one for each phrase of a row. Its boxes are left, top, width and
    height in pixels."""
    for i, row in enumerate(table.rows):
        where = f"row {i}"
        number = id_field(row, "question_id", table.path, where)
        phrases = list_field(row, "answer", table.path, where)
        box = _box(row, table.path, where, sides=True)
        image = table.image(i)
        gold = {"box": box, "size": image.size(), "split": split}
        for k in range(len(phrases)):
            phrase = text_field({"answer": phrases[k]}, "answer", table.path, where)
            text = _ask(phrase, protocol)
            yield Item(f"{split}/{i}/{k}", text, (image,), gold, (question_key(number, text),))


def _ask(phrase: str, protocol: str) -> str:
    return f"{FORMAT}{ASKED}{phrase}" if protocol == "lmms" else f"{ASKED}{phrase}."


def _box(row: Row, path: Path, where: str, sides: bool = False) -> metric.Box:
    """The right box: left, top, right and bottom in pixels. sides: stored with width and height."""
    values = list_field(row, "bbox", path, where)
    if len(values) != 4 or not all(map(_is_number, values)):
        raise _wrong(path, where, f"bbox is {repr(values)[:60]}", "four numbers")
    left, top, right, bottom = map(float, values)
    if sides:
        right, bottom = left + right, top + bottom
    if not (left < right and top < bottom):
        stored = "left, top, width, height" if sides else "left, top, right, bottom"
        raise _wrong(path, where, f"bbox is {values}", f"{stored} of a box that is not empty")
    return left, top, right, bottom


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e9 and not math.isnan(value)


def _wrong(path: Path, where: str, what: str, wanted: str) -> ValueError:
    return ValueError(f"{path}: {where}: {what}, but must be {wanted}; give the official file")


def _find_image(folder: Path, name: str) -> ImageSource:
    """The image in one of the places where it may be: the path as the file has it, which is
    relative to the evaluation's own folder, or its name in COCO's folder or beside the file."""
    base = Path(name).name
    coco = ("train2014", "../train2014", "coco/train2014", "images/mscoco/images/train2014")
    refer = "../images/mscoco/images/train2014"  # from data/refcoco
    places = (name, *(f"{folder}/{base}" for folder in (*coco, refer)), base)
    return ImageSource.from_file(first_existing(folder, *places) or folder / places[1])


REFCOCO, REFCOCO_PLUS, REFCOCOG = (
    RefCOCO("refcoco", "RefCOCO", ("val", "testA", "testB", "test"), "lmms-lab-encoder/RefCOCO"),
    RefCOCO("refcoco+", "RefCOCO+", ("val", "testA", "testB"), "lmms-lab-encoder/RefCOCOplus"),
    RefCOCO("refcocog", "RefCOCOg", ("val", "test"), "lmms-lab-encoder/RefCOCOg"),
)
