"""MMBench dev: multiple choice, asked once for every rotation of the options, without a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..credits import Credits
from ..metrics import mmbench as metric
from .base import (
    LETTER,
    Answer,
    ImageSource,
    Item,
    Score,
    Setup,
    Task,
    accuracy,
    gold_of,
    letter_options,
    names_of,
    percent,
)
from .files import Row, first_existing, int_field, option_field, read_table, text_field
from .tables import find_table

FILE = "mmbench_dev_20230712.tsv"


class MMBench(Task):
    name = "mmbench"
    title = "MMBench"
    split = "dev"
    needs = (
        f"a folder with {FILE} (opencompass; it contains the images)",
        "a folder of the datasets repository lmms-lab-encoder/MMBench, config en (dev*.parquet)",
    )
    setups = {"llava": Setup(1024), "lmms": Setup(1024)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_dir() and (table := find_table(source, "dev")) is not None:
            return [
                _item(row, table.path, i, (table.image(i),), protocol)
                for i, row in enumerate(table.rows[:limit])
            ]
        path = source if source.is_file() else first_existing(source, FILE)
        if path is None:
            raise self.missing(source)
        items = []
        for i, row in enumerate(read_table(path)[:limit]):
            data = row.get("image")
            name = f"{path}, row {i}"
            image = ImageSource.from_base64(name, data) if data else ImageSource.missing(name)
            items.append(_item(row, path, i, (image,), protocol))
        return items

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        """The share of questions that are right in every rotation.

        lmms scores as lmms-eval's task mmbench_en_dev_static, whose offline judge reads the answers
        from which no letter can be inferred. llava scores without a judge.
        """
        inferred = [metric.infer(a.said, _choices(a)) for a in answers]
        read = inferred
        if protocol == "lmms":
            read = [
                letter or metric.extract(a.said, tuple(_choices(a)))
                for a, letter in zip(answers, inferred, strict=True)
            ]
        rows = [
            metric.Row(int(a.item.question_id), gold_of(a), letter)
            for a, letter in zip(answers, read, strict=True)
        ]
        right, questions = metric.circular(rows)
        alone = [row.inferred == row.gold for row in rows]
        given = [i for i, a in enumerate(answers) if a.text is not None]
        unparsed = sum(read[i] is None for i in given)
        more = {"without rotation": percent(alone), "rows": len(rows)}
        note = (
            "in the official evaluation a GPT judge reads unparsed answers, and LLaVA's figures "
            "come from its server; here unparsed answers are wrong"
        )
        if protocol == "lmms":
            judged = sum(inferred[i] is None and read[i] is not None for i in given)
            more["judged"] = judged
            note = f"{judged} answers were read by lmms-eval's offline judge, which is lenient"
        if not questions:
            return accuracy([], [])
        value = 100 * right / questions
        rotations = [metric.question_of(row) for row in rows]
        share = Credits.merged(names_of(answers), rotations, alone, lambda r: float(all(r)))
        each = replace(
            share,
            numerator=np.array([float(sum(alone[i] for i in own)) for own in share.members]),
            denominator=np.array([float(len(own)) for own in share.members]),
        )
        return Score(
            "accuracy",
            value,
            questions,
            right,
            unparsed,
            more,
            (note,),
            credits=share,
            parts={"without rotation": each},
        )


def _choices(answer: Answer) -> dict[str, str]:
    """The options that are looked for in answers. E is not, although some rows have it."""
    return {x: text for x, text in answer.item.gold["options"].items() if x in "ABCD"}


def _item(row: Row, path: Path, i: int, images: tuple[ImageSource, ...], protocol: str) -> Item:
    number = int_field(row, "index", path, f"row {i}")
    question = text_field(row, "question", path, f"question {number}")
    options: dict[str, str] = {}
    for letter in "ABCDE":
        if not _has_value(row.get(letter), protocol):
            if protocol == "llava":
                break  # the script stops at the first missing option
            continue
        options[letter] = option_field(row, letter, path, f"question {number}")
    hint = None
    if _has_value(row.get("hint"), protocol):
        hint = option_field(row, "hint", path, f"question {number}")
    listed = letter_options(list(options.values()))
    if protocol == "llava":
        text = f"{hint}\n{question}\n{listed}" if hint else f"{question}\n{listed}"
        text += LETTER
    else:
        lines = "\n".join(f"{letter}. {option}" for letter, option in options.items())
        head = f"{hint} {question}" if hint else question
        text = f"{head} There are several options:\n{lines}\n{LETTER}"
    gold = {"answer": row.get("answer") or None, "options": options}
    return Item(number, text, images, gold)


def _has_value(value: object, protocol: str) -> bool:
    """Whether a cell has a value. Empty cells say "" or nan; for LLaVA's script also none."""
    empty = ("", "nan") if protocol == "lmms" else ("", "nan", "none")
    return value is not None and value == value and str(value).lower() not in empty
