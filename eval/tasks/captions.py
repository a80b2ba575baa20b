"""Captions of one sentence, scored by CIDEr-D: NoCaps, COCO 2014 and 2017, Flickr30k."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..credits import Credits
from ..metrics import ptb
from ..metrics.cider import cider_d
from .base import Answer, ImageSource, Item, Score, Setup, Task, golds_of, names_of
from .files import (
    Row,
    field,
    first_existing,
    id_field,
    image_folder,
    read_json,
    read_table,
    read_text,
    section,
    text_field,
)
from .tables import Table, find_table

PROMPT = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class Captions(Task):
    """A benchmark of captions.

    files: names of the annotations, in COCO's format or Flickr30k's CSV or token file. images:
    folders that may contain the images. tables: names of the split in a datasets repository.
    """

    name: str  # type: ignore[misc]
    title: str  # type: ignore[misc]
    split: str  # type: ignore[misc]
    files: tuple[str, ...]
    images: tuple[str, ...]
    repository: str
    tables: tuple[str, ...]

    setups = {"lmms": Setup(64), "llava": Setup(64)}  # noqa: RUF012

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (
            f"a folder with {' or '.join(self.files)} and {self.images[0]}/",
            f"a folder of the datasets repository {self.repository} ({self.tables[0]}*.parquet)",
        )

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_dir() and (table := find_table(source, *self.tables)) is not None:
            return self._table(table)[:limit]
        path = source if source.is_file() else first_existing(source, *self.files)
        if path is None:
            raise self.missing(source)
        home = path.parent.parent if path.parent.name == "annotations" else path.parent
        folder = image_folder(home, *self.images)
        if path.suffix == ".json":
            return _coco(path, folder)[:limit]
        return _flickr(path, folder)[:limit]

    def _table(self, table: Table) -> list[Item]:
        items = []
        for i, row in enumerate(table.rows):
            name = row.get("question_id") or row.get("file_name") or row.get("filename") or ""
            number = row.get("image_id", row.get("img_id"))
            if number is None:
                digits = str(name).rpartition("_")[2].partition(".")[0]
                if not digits.isdecimal():
                    raise ValueError(
                        f"{table.path}: row {i} has no image_id, img_id or question_id with a "
                        "number; give the official file"
                    )
                number = int(digits)
            number = id_field({"image_id": number}, "image_id", table.path, f"row {i}")
            captions = next(
                (row[c] for c in ("annotations_captions", "answer", "caption") if row.get(c)), None
            )
            items.append(_item(number, table.image(i), captions, str(name)))
        return items

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        """CIDEr-D times 100, as papers print it."""
        golds = [golds_of(a, "captions") for a in answers]
        if not golds:
            raise ValueError("there are no images to score; give a file that has some")
        texts = [[a.said for a in answers], [text for captions in golds for text in captions]]
        (said, gold_tokens), which = ptb.tokenise_apart(texts)
        rest = iter(gold_tokens)
        names = [f"{i}" for i in range(len(answers))]
        references = {n: [next(rest) for _ in g] for n, g in zip(names, golds, strict=True)}
        value, each = cider_d(dict(zip(names, said, strict=True)), references)
        notes = [f"tokenised by {which}"]
        if len(answers) == 1:
            notes.append(
                "CIDEr of one image is 0: document frequencies are counted over these images"
            )
        notes.append(
            f"document frequencies are counted over these {len(answers)} images: part of a "
            "benchmark is not comparable with all of it"
        )
        credits = Credits.of(names_of(answers), [each[name] for name in names], most=10.0)
        return Score("CIDEr", 100 * value, len(answers), notes=tuple(notes), credits=credits)


def _item(number: object, image: ImageSource, captions: Any, name: str) -> Item:
    stem = name.rpartition(".")[0] or name
    keys = tuple(k for k in (name, stem) if k)
    return Item(str(number), PROMPT, (image,), {"captions": captions}, keys)


def _coco(path: Path, folder: Path) -> list[Item]:
    values = read_json(path)
    captions: dict[object, list[str]] = defaultdict(list)
    for i, row in enumerate(section(values, "annotations", path)):
        at = id_field(row, "image_id", path, f"annotation {i}")
        captions[at].append(text_field(row, "caption", path, f"annotation {i}"))
    items = []
    for i, row in enumerate(section(values, "images", path)):
        number, name = id_field(row, "id", path, f"image {i}"), str(row.get("file_name") or "")
        gold = captions.get(number)
        items.append(_item(number, ImageSource.from_file(folder / name), gold, name))
    return items


def _flickr(path: Path, folder: Path) -> list[Item]:
    """Read the CSV file (its column raw is a JSON list) or the token file (NAME#i, tab, text)."""
    captions: dict[str, list[str]] = {}
    if path.suffix == ".csv":
        for i, row in enumerate(read_table(path)):
            name = field(row, "filename", path, f"row {i}")
            captions[name] = _listed(row, path, i)
    else:
        for i, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            name, tab, caption = line.removesuffix("\r").partition("\t")
            if not tab:
                raise ValueError(f"{path}, line {i}: no tab between image and caption")
            captions.setdefault(name.partition("#")[0], []).append(caption)
    if not captions:
        raise ValueError(f"{path} is empty; download or create it again")
    return [
        _item(Path(name).stem, ImageSource.from_file(folder / name), texts, name)
        for name, texts in captions.items()
    ]


def _listed(row: Row, path: Path, i: int) -> list[str]:
    try:
        found = json.loads(field(row, "raw", path, f"row {i}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(
            f"{path}: the captions of row {i} are not a JSON list; give the official file"
        )
    return [str(text) for text in found]


NOCAPS = Captions(
    "nocaps",
    "NoCaps",
    "val",
    ("nocaps_val_4500_captions.json",),
    ("images", "val"),
    "lmms-lab-encoder/NoCaps",
    ("validation", "val"),
)
COCO2014 = Captions(
    "coco2014",
    "COCO captions 2014",
    "val",
    ("annotations/captions_val2014.json", "captions_val2014.json"),
    ("val2014", "images"),
    "lmms-lab-encoder/COCO-Caption",
    ("val", "validation"),
)
COCO2017 = Captions(
    "coco2017",
    "COCO captions 2017",
    "val",
    ("annotations/captions_val2017.json", "captions_val2017.json"),
    ("val2017", "images"),
    "lmms-lab-encoder/COCO-Caption2017",
    ("val", "validation"),
)
FLICKR30K = Captions(
    "flickr30k",
    "Flickr30k",
    "all",
    ("flickr_annotations_30k.csv", "results_20130124.token"),
    ("flickr30k-images", "images"),
    "lmms-lab-encoder/flickr30k",
    ("test",),
)
