"""A-OKVQA, multiple choice, asked and scored as by FastV's script: the letter in one token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..metrics import aokvqa as metric
from .base import (
    LETTERS,
    Answer,
    ImageSource,
    Item,
    Score,
    Setup,
    Task,
    accuracy,
    gold_of,
    letter_options,
)
from .files import (
    choice_field,
    first_existing,
    id_field,
    image_folder,
    int_field,
    json_rows,
    options_field,
    text_field,
)
from .tables import find_table


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
                (ImageSource.from_file(folder / f"{int_field(row, 'image_id', path, i):012d}.jpg"),)
                if "image_id" in row
                else ()
                for i, row in enumerate(rows)
            ]
        items = []
        for i, (row, image) in enumerate(zip(rows, images, strict=True)):
            choices = options_field(row, "choices", path, f"row {i}")
            options = letter_options(choices, "({}) {}", " ")
            text = (  # with a second line break after the image, as in the script
                "\nAnalyse the image and choose the best answer for the following question:\n"
                f"{text_field(row, 'question', path, f'row {i}')}\nOptions: {options}\n"
                "Just output the letter of the correct answer."
            )
            right = choice_field(row, "correct_choice_idx", len(choices), path, f"row {i}")
            gold = {"answer": None if right is None else LETTERS[right]}
            named = "question_id" in row
            number = id_field(row, "question_id", path, f"row {i}") if named else i
            items.append(Item(number, text, image, gold))
        return items[:limit]

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        return accuracy(answers, [metric.correct(a.said, gold_of(a)) for a in answers])
