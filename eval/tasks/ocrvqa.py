"""OCR-VQA, asked and scored as by FastV's script: questions about book covers, ROUGE-L."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..credits import Credits
from ..metrics.rouge import clean, rouge_l
from .base import Answer, ImageSource, Item, Score, Setup, Task, gold_of, names_of, percent
from .files import field, first_existing, id_field, image_folder, list_field, read_json, text_field
from .tables import find_table

IMAGES = 500  # of the test split, as in the script


class OCRVQA(Task):
    name = "ocrvqa"
    title = "OCR-VQA, the first 500 covers"
    split = "test"
    needs = (
        "a folder saved by datasets' save_to_disk of howard-hou/OCR-VQA, or its parquet files "
        "(test*.parquet)",
        "a folder with dataset.json (ocr-vqa.github.io) and images/",
    )
    setups = {"own": Setup(50, "llava_v1")}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        covers: list[tuple[str, dict[str, object], tuple[ImageSource, ...]]] = []
        if source.is_dir() and (table := find_table(source, "test")) is not None:
            path = table.path
            for number, row in enumerate(table.rows[:IMAGES]):
                found = {"image_id": number, **row}
                name = str(id_field(found, "image_id", path, f"row {number}"))
                covers.append((name, row, (table.image(number),)))
        else:
            file = source if source.is_file() else first_existing(source, "dataset.json")
            if file is None:
                raise self.missing(source)
            path, values = file, read_json(file)
            if not isinstance(values, dict):
                raise ValueError(
                    f"{path} is not an object id -> cover; give OCR-VQA's dataset.json"
                )
            folder = image_folder(path.parent, "images")
            for i, row in values.items():
                field(row, "questions", path, i)
            test = [(i, row) for i, row in values.items() if row.get("split", 3) == 3]  # 3: test
            for i, row in test[:IMAGES]:
                covers.append((i, row, (ImageSource.from_file(folder / f"{i}.jpg"),)))
        items = []
        for i, row, images in covers:
            questions = list_field(row, "questions", path, i)
            answers = list_field(row, "answers", path, i)
            if len(questions) != len(answers):
                raise ValueError(
                    f"{path}: {i} has {len(questions)} questions and {len(answers)} answers; give "
                    "OCR-VQA's dataset.json"
                )
            for j, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                text = text_field({"question": question}, "question", path, f"{i}, question {j}")
                items.append(Item(f"{i}_{j}", text, images, {"answer": answer}))
        return items[:limit]

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        """Mean ROUGE-L times 100. The script calls it CIDEr."""
        credits = [
            rouge_l(clean(a.said), [clean(gold_of(a))]) * (a.text is not None) for a in answers
        ]
        value = percent(credits)
        if value is None:
            raise ValueError("there are no questions to score; give a file that has some")
        made = Credits.of(names_of(answers), credits)
        return Score("ROUGE-L", value, len(answers), sum(credits), credits=made)
