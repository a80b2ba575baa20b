"""MMMU val: college questions, most of them multiple choice, with up to seven pictures."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics import mmmu as metric
from .base import (
    LETTER,
    SHORT,
    Answer,
    Item,
    Picture,
    Score,
    Setup,
    Task,
    accuracy,
    gold_of,
    lettered,
    percent,
)
from .files import Row, Table, field, find_table, json_rows, read_json

SEED = 42  # of the official script's guesses


class MMMU(Task):
    """Both official scripts guess where they find no letter. The value is the official one, with
    these guesses replayed; beside it stand the number of guesses and the figure without them."""

    name = "mmmu"
    title = "MMMU"
    split = "val"
    needs = (
        "a folder with the 30 subjects of the datasets repository MMMU/MMMU "
        "(SUBJECT/validation*.parquet), or lmms-lab-encoder/MMMU (validation*.parquet)",
        "to score: answer_dict_val.json (github.com/MMMU-Benchmark/MMMU) together with options, as "
        "the official example outputs have them",
    )
    setups = {"llava": Setup(128), "lmms": Setup(128)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_file():
            return self._file(source)[:limit]
        folders = [source, *sorted(f for f in source.iterdir() if f.is_dir())]
        tables = [t for f in folders if (t := find_table(f, "validation", "val")) is not None]
        if not tables:
            raise self.missing(source)
        found = [item for table in tables for item in self._table(table, protocol)]
        return found[:limit]

    def _table(self, table: Table, protocol: str) -> list[Item]:
        items = []
        for i, row in enumerate(table.rows):
            most = 1 if protocol == "llava" else 7
            columns = [f"image_{j}" for j in range(1, most + 1)]
            pictures = tuple(table.image(i, c) for c in columns if table.images_in(i, c))
            options = _options(row.get("options"))
            items.append(self._item(row, row["id"], options, row.get("answer"), pictures))
        return items

    def _file(self, path: Path) -> list[Item]:
        values = read_json(path)
        rows: list[Row]
        if isinstance(values, dict) and isinstance(values.get("rows"), list):
            rows = values["rows"]
        elif isinstance(values, dict):
            rows = [{"id": i, **row} for i, row in values.items() if isinstance(row, dict)]
        else:
            rows = json_rows(path)
        items = []
        for i, row in enumerate(rows):
            number = field(row, "id", path, f"row {i}")
            given = row.get("options", row.get("all_options"))
            options = _options(given)
            if field(row, "question_type", path, number) == "multiple-choice" and not options:
                raise ValueError(
                    f"{path}: {number} has no options, whose texts the parser looks for; give the "
                    "official example outputs, or the datasets folder"
                )
            gold = row.get("answer", row.get("ground_truth"))
            items.append(self._item(row, number, options, gold, ()))
        if not items:
            raise ValueError(f"{path} has no questions of MMMU; see --help")
        return items

    def _item(
        self, row: Row, number: str, options: list[str], gold: Any, pictures: tuple[Picture, ...]
    ) -> Item:
        multiple = row.get("question_type") == "multiple-choice"
        question = row.get("question") or ""
        if multiple:
            text = f"{question}\n{lettered(options)}\n\n{LETTER.strip()}"
        else:
            text = f"{question}\n\n{SHORT.strip()}"
            gold = _golds(gold)
        answer = {"answer": gold, "options": options if multiple else None}
        return Item(str(number), text, pictures, answer)

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        guess = metric.guesses(SEED)
        right, guessed, guesses_right = [], 0, 0
        subjects: dict[str, list[bool]] = {}
        for a in answers:
            gold, options = gold_of(a), a.item.gold["options"]
            if options is None:
                correct = a.text is not None and metric.open_correct(a.said, gold)
            elif a.text is None:
                correct = False
            else:
                letter = metric.choice(a.said, options, official=protocol != "lmms")
                if letter is None:
                    guessed += 1
                    letter = guess(options)
                    guesses_right += letter == gold
                correct = letter == gold
            right.append(correct)
            subjects.setdefault(_subject(str(a.item.question_id)), []).append(correct)
        n = max(len(right), 1)
        more: dict[str, Any] = {
            "without_fallback": 100 * (sum(right) - guesses_right) / n,
            "lowest": 100 * (sum(right) - guesses_right) / n,
            "highest": 100 * (sum(right) - guesses_right + guessed) / n,
            "guesses": guessed,
            "guesses that were right": guesses_right,
            **{subject: percent(rs) for subject, rs in sorted(subjects.items())},
        }
        note = (
            f"as the official script: {guessed} unparsed answers guessed at random with seed "
            f"{SEED}; without guesses {more['without_fallback']:.2f}"
        )
        return accuracy(right, guessed, more=more, notes=(note,))


def _options(value: Any) -> list[str]:
    """A list, or the text of a Python list, as the data set has it."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"options {value[:60]!r} are no list; is it MMMU's file?") from None
    return [str(option) for option in value or ()]


def _golds(value: Any) -> Any:
    """An open answer, or the text of a Python list of such."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            return [str(answer) for answer in ast.literal_eval(value)]
        except (ValueError, SyntaxError):
            return value
    return value


def _subject(number: str) -> str:
    """validation_Art_Theory_12 -> Art_Theory"""
    return number.removeprefix("validation_").rpartition("_")[0]
