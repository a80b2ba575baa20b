"""TextVQA: questions whose answer is written in the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import (
    SHORT,
    Answer,
    ImageSource,
    Item,
    Score,
    Setup,
    Task,
    accuracy,
    question_key,
    vqa_credit,
)
from .files import (
    field,
    first_existing,
    id_field,
    image_folder,
    json_rows,
    read_json,
    section,
    text_field,
)
from .tables import Table, find_table

FILE, ASKED = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"


class TextVQA(Task):
    """llava asks with the tokens that an OCR engine has read, from LLaVA's question file. lmms asks
    without them, and with str.capitalize applied to the question."""

    name = "textvqa"
    title = "TextVQA"
    split = "val"
    needs = (
        f"a folder with {FILE} (textvqa.org), train_images/, and for the protocol llava its "
        f"{ASKED} (LLaVA's eval.zip)",
        "for lmms also a folder of lmms-lab-encoder/textvqa (validation*.parquet)",
    )
    setups = {"llava": Setup(128), "lmms": Setup(1024)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_dir() and protocol == "lmms":
            table = find_table(source, "validation", "val")
            if table is not None:
                return [_row(table, i) for i in range(len(table.rows))[:limit]]
        path = source if source.is_file() else first_existing(source, FILE)
        if path is None:
            raise self.missing(source)
        asked = self._asked(source, protocol)
        folder = image_folder(path.parent, "train_images", "images")
        items = []
        for i, row in enumerate(section(read_json(path), "data", path)[:limit]):
            number = str(id_field(row, "question_id", path, f"row {i}"))
            image = str(id_field(row, "image_id", path, f"row {i}"))
            question = text_field(row, "question", path, f"row {i}")
            text = question.capitalize() + SHORT if protocol == "lmms" else question + SHORT
            if asked is not None:
                text = field(
                    asked, question_key(image, question), source / ASKED, f"question {number}"
                )
            images = (ImageSource.from_file(folder / f"{image}.jpg"),)
            gold = {"answers": row.get("answers")}
            items.append(Item(number, text, images, gold, (image, question_key(image, question))))
        return items

    def _asked(self, source: Path, protocol: str) -> dict[str, str] | None:
        """LLaVA's questions by image and first line; None if they are not needed."""
        if protocol == "lmms" or source.is_file():
            return None
        path = source / ASKED
        if not path.is_file():
            raise self.missing(path)
        found = {}
        for i, row in enumerate(json_rows(path)):
            number = id_field(row, "question_id", path, f"row {i}")
            text = text_field(row, "text", path, f"row {i}")
            found[question_key(number, text)] = text
        return found

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        credits = [vqa_credit(a, "textvqa") for a in answers]
        split = "val with OCR tokens" if protocol == "llava" else self.split
        return accuracy(answers, credits, split=split)


def _row(table: Table, i: int) -> Item:
    row, where = table.rows[i], f"row {i}"
    question = text_field(row, "question", table.path, where)
    keys = () if row.get("image_id") is None else (str(row["image_id"]),)
    return Item(
        str(id_field(row, "question_id", table.path, where)),
        question.capitalize() + SHORT,
        (table.image(i),),
        {"answers": row.get("answers")},
        keys,
    )
