"""A-OKVQA, multiple choice, asked and scored as by FastV's script: the letter in one token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..metrics import aokvqa as metric
from .base import Answer, ImageSource, Item, Score, Setup, Task, accuracy, gold_of, letter_options
from .files import field, find_table, first_existing, image_folder, json_rows


class AOKVQA(Task):
    """An answer is right if it contains the letter anywhere, so no answer is unparsed."""

    name = "aokvqa"
    title = "A-OKVQA, multiple choice"
    split = "val"
    needs = (
        "a folder saved by datasets' save_to_disk of HuggingFaceM4/A-OKVQA, or its parquet files "
        "(validation*.parquet)",
        "a folder with aokvqa_v1p0_val.json (allenai.org/project/a-okvqa) and COCO's val2017/",
    )
    setups = {"own": Setup(1, "llava_v1", use_cache=False)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_dir() and (table := find_table(source, "validation", "val")) is not None:
            rows = table.rows
            images: list[tuple[ImageSource, ...]] = [(table.image(i),) for i in range(len(rows))]
            path = table.path
        else:
            file = source if source.is_file() else first_existing(source, "aokvqa_v1p0_val.json")
            if file is None:
                raise self.missing(source)
            path, rows = file, json_rows(file)
            folder = image_folder(file.parent, "val2017", "images")
            images = [
                (ImageSource.from_file(folder / f"{int(row['image_id']):012d}.jpg"),)
                if "image_id" in row
                else ()
                for row in rows
            ]
        items = []
        for i, (row, image) in enumerate(zip(rows, images, strict=True)):
            options = letter_options(field(row, "choices", path, f"row {i}"), "({}) {}", " ")
            text = (  # with a second line break after the image, as in the script
                "\nAnalyse the image and choose the best answer for the following question:\n"
                f"{field(row, 'question', path, f'row {i}')}\nOptions: {options}\n"
                "Just output the letter of the correct answer."
            )
            correct = row.get("correct_choice_idx")
            gold = {"answer": None if correct is None else "ABCD"[int(correct)]}
            items.append(Item(row.get("question_id", i), text, image, gold))
        return items[:limit]

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        return accuracy([metric.correct(a.said, gold_of(a)) for a in answers])
