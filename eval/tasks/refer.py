"""Read the annotations of RefCOCO as github.com/lichengunc/refer and MDETR distribute them.

refer: refs(unc).p or refs(umd).p, a pickle of a list of objects, and instances.json of COCO. Only
numbers, texts, lists and dictionaries are read from the pickle: one that names a class or function
is refused, so that none is ever called. MDETR: finetune_refcoco_val.json and its like, in COCO's
form with an image for each phrase. Boxes are left, top, width and height in pixels in both.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..typed import refuse_special_file
from .files import Row, id_field, list_field, read_json, section, text_field

REFS = ("refs(unc).p", "refs(umd).p", "refs(google).p")  # in the order in which they are taken


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, texts, lists and dictionaries, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, but must be plain data")


def read_refs(path: Path, split: str) -> Iterator[Row]:
    """The phrases of a split, with the boxes of instances.json beside the pickle."""
    instances = path.parent / "instances.json"
    if not instances.is_file():
        raise ValueError(f"{path} needs instances.json beside it; download refer's data again")
    boxes, images = _by_id(instances, "annotations"), _by_id(instances, "images")
    for i, ref in enumerate(_unpickle(path)):
        where = f"entry {i}"
        if text_field(ref, "split", path, where) != split:
            continue
        box = _find(boxes, ref, "ann_id", path, where, instances)
        image = _find(images, ref, "image_id", path, where, instances)
        for sentence in list_field(ref, "sentences", path, where):
            yield _row(image, text_field(sentence, "sent", path, where), box.get("bbox"))


def read_mdetr(path: Path) -> Iterator[Row]:
    """The phrases of one of MDETR's files: an image with its caption and one box for each."""
    boxes = {row.get("image_id"): row for row in section(read_json(path), "annotations", path)}
    for i, image in enumerate(section(read_json(path), "images", path)):
        box = _find(boxes, image, "id", path, f"image {i}", path)
        yield _row(image, text_field(image, "caption", path, f"image {i}"), box.get("bbox"))


def _row(image: Row, phrase: str, box: object) -> Row:
    size = {name: image.get(name) for name in ("width", "height")}
    return {"image": image.get("file_name"), "sent": phrase, "bbox": box, **size}


def _unpickle(path: Path) -> list[Row]:
    refuse_special_file(path)
    try:
        with path.open("rb") as file:  # texts of Python 2 are bytes
            found = _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    except Exception as error:  # damaged pickles raise errors of many types
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read ({why}); download refer's data again") from None
    if not isinstance(found, list) or not all(isinstance(ref, dict) for ref in found):
        raise ValueError(f"{path} is not a list of references; download refer's data again")
    return found


def _by_id(path: Path, name: str) -> dict[str | int, Row]:
    rows = section(read_json(path), name, path)
    return {id_field(row, "id", path, f"{name} {i}"): row for i, row in enumerate(rows)}


def _find(rows: dict[Any, Row], row: Row, name: str, path: Path, where: str, inside: Path) -> Row:
    """The row of another table that an id names (ValueError if there is none)."""
    number = id_field(row, name, path, where)
    if number not in rows:
        raise ValueError(
            f"{path}: {where}: {name} {number} is not in {inside}; download both again"
        )
    return rows[number]
