"""MMMU val: questions of college level, most of them multiple choice, with up to seven images."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..credits import Credits
from ..metrics import mmmu as metric
from .base import (
    LETTER,
    SHORT,
    Answer,
    Item,
    Score,
    Setup,
    Task,
    accuracy,
    golds_of,
    letter_options,
    names_of,
    split_scores,
)
from .files import Row, field, id_field, json_rows, read_json
from .tables import Table, find_table

SEED = 42  # seed of the official script's guesses
_NAMES = ("validation", "val")
_IMAGE = re.compile(r"<image (\d+)>")


class MMMU(Task):
    """Both official scripts guess if they find no letter in an answer.

    The value is the official figure, with the same guesses. `more` has the number of guesses and
    the figure without them.
    """

    name = "mmmu"
    title = "MMMU"
    split = "val"
    needs = (
        "a folder with the 30 subjects of the datasets repository MMMU/MMMU "
        "(SUBJECT/validation*.parquet), or lmms-lab-encoder/MMMU (validation*.parquet)",
        "to score: example outputs of github.com/MMMU-Benchmark/MMMU (a file, or the folder with "
        "SUBJECT/output.json), or its answer_dict_val.json for answers that are letters already",
    )
    setups = {"llava": Setup(128), "lmms": Setup(128)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        if source.is_file():
            return _file(source, protocol)[:limit]
        subjects = sorted(f for f in source.iterdir() if f.is_dir())
        single = find_table(source, *_NAMES)
        tables = [single] if single else [t for f in subjects if (t := find_table(f, *_NAMES))]
        found = [item for table in tables for item in _table(table, protocol)]
        if not tables:
            files = sorted(source.glob("*/output.json"))
            found = [item for file in files for item in _file(file, protocol)]
        if not found:
            raise self.missing(source)
        return found[:limit]

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        guess, unparsed, bare = metric.guesses(SEED), 0, 0
        right: list[bool] = []
        guessed: list[bool] = []  # answers without a letter
        for a in answers:
            golds, options = golds_of(a, "answer"), a.item.gold["options"]
            bare += options == []
            is_guess = False
            if a.text is None:
                correct = False
            elif options is None:
                correct = metric.open_correct(a.said, golds)
            elif not options:  # the answers are letters already
                unparsed += re.fullmatch("[A-Z]", a.said) is None
                correct = a.said in golds
            else:
                letter = metric.choice(a.said, options, official=protocol != "lmms")
                is_guess = letter is None
                correct = (guess(options) if is_guess else letter) in golds
            right.append(correct)
            guessed.append(is_guess)
        names, subjects = names_of(answers), [_subject(str(a.item.question_id)) for a in answers]
        read = [r and not g for r, g in zip(right, guessed, strict=True)]
        parts = {
            "without_fallback": Credits.of(names, read),
            "lowest": Credits.of(names, read),
            "highest": Credits.of(names, [r or g for r, g in zip(read, guessed, strict=True)]),
            **dict(sorted(split_scores(answers, right, subjects).items())),
        }
        more: dict[str, Any] = {name: part.score for name, part in parts.items()}
        more["guesses"] = sum(guessed)
        more["guesses that were right"] = sum(right) - sum(read)
        notes = [
            f"as in the official script, {sum(guessed)} unparsed answers are guessed at random "
            f"with seed {SEED}; without guesses {more['without_fallback']:.2f}"
        ]
        if bare:
            notes.append(
                f"{bare} multiple-choice questions have no options: only answers that are a letter "
                "already count, as in main_eval_only.py"
            )
        unparsed += sum(guessed)
        return accuracy(answers, right, unparsed, more=more, notes=tuple(notes), parts=parts)


def _table(table: Table, protocol: str) -> list[Item]:
    items = []
    for i, row in enumerate(table.rows):
        number = str(id_field(row, "id", table.path, f"row {i}"))
        item = _item(row, number, _options(row, f"{table.path}: {number}"), protocol)
        # llava: the first image; lmms: those that the question or an option mentions
        named = sorted(set(_IMAGE.findall(item.text))) if protocol == "lmms" else ["1"]
        columns = [f"image_{j}" for j in named]
        if absent := [c for c in columns if not table.count_images(i, c)]:
            raise ValueError(f"{table.path}: {number} has no {absent[0]}; download it again")
        items.append(replace(item, images=tuple(table.image(i, c) for c in columns)))
    return items


def _file(path: Path, protocol: str) -> list[Item]:
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
        number = str(id_field(row, "id", path, f"row {i}"))
        field(row, "question_type", path, number)
        items.append(_item(row, number, _options(row, f"{path}: {number}"), protocol))
    if not items:
        raise ValueError(f"{path} has no questions of MMMU; give a file as eval/README.md lists it")
    return items


def _item(row: Row, number: str, options: list[str], protocol: str) -> Item:
    """A question. Its options are None for an open question, and [] if the file has none."""
    multiple = row.get("question_type") == "multiple-choice"
    question, gold = row.get("question") or "", row.get("answer", row.get("ground_truth"))
    golds = gold if isinstance(gold, list) or gold is None else [str(gold)]
    if protocol == "lmms":
        how = f"{letter_options(options)}\n\n{LETTER.strip()}" if multiple else f"\n{SHORT.strip()}"
    else:
        how = f"{letter_options(options, '({}) {}')}\n{LETTER}" if multiple else SHORT.strip()
        golds = golds if multiple or isinstance(gold, list) else _listed(gold)
    given = {"answer": golds, "options": options if multiple else None}
    return Item(number, f"{question}\n{how}", (), given)


def _options(row: Row, where: str) -> list[str]:
    """The options: a list, the text of a Python list (in the data set), or an object letter -> text
    (in the official outputs)."""
    value = row.get("options")
    if value is None and isinstance(row.get("index2ans"), dict):
        value = [text for _, text in sorted(row["index2ans"].items())]
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if not isinstance(value, list | None):
        raise ValueError(
            f"{where}: the options {repr(value)[:60]} are not a list; give MMMU's file"
        )
    return [str(option) for option in value or ()]


def _listed(value: Any) -> list[str] | None:
    """Open answers, stored as the text of a Python list. (lmms-eval takes it for one answer.)"""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with suppress(ValueError, SyntaxError):
            return [str(answer) for answer in ast.literal_eval(value)]
    return None if value is None else [str(value)]


def _subject(number: str) -> str:
    """validation_Art_Theory_12 -> Art_Theory"""
    return number.removeprefix("validation_").rpartition("_")[0]
