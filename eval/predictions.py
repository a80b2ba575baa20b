"""Files of predictions: those of eval.run, and the formats that others publish.

eval.run writes LLaVA's format: on each line one JSON object with question_id, prompt, text,
answer_id, model_id and metadata. Answers are matched to questions by id, or by id and question
where ids repeat, never by order.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tasks.base import Answer, Item, question_key
from .tasks.files import read_json, read_jsonl, read_table, read_text, tab_rows, whole_number

IDS = ("question_id", "questionId", "id", "image_id", "index")
TEXTS = ("text", "prediction", "answer", "caption", "response", "output", "pred")
QUESTIONS = ("prompt", "question")


@dataclass(frozen=True)
class Prediction:
    """One answer. keys: names of the question that it answers, the most exact one first."""

    keys: tuple[str, ...]
    text: str
    where: str  # file and line, for messages


@dataclass(frozen=True)
class Matched:
    """Every question with its answer, and counts of what did not match."""

    answers: list[Answer]
    missing: int  # questions without an answer
    unknown: tuple[str, ...]  # where predictions stand that match no question
    duplicates: int  # further predictions for the same question; the last one counts


def read(path: Path) -> list[Prediction]:
    """Read the predictions of a file or folder. The known formats are:

    - JSONL, and JSON lists, of objects with an id (IDS) and a text (TEXTS): LLaVA's answer files,
      submissions to the VQA server, results of captions, MMMU's output.json
    - a JSON object id -> text, by itself or under "outputs" (LLaVA's ScienceQA results)
    - a JSON object with such a list under "rows", "data", "annotations" or "results", or with a
      list under each of "correct" and "incorrect" (written by LLaVA's eval_science_qa.py)
    - CSV and TSV files with the columns index and prediction (MMBench)
    - MME's CATEGORY.txt (image, question, right answer, prediction), and a folder of them
    - a folder of JSON or JSONL files as above, also one level down (SUBJECT/output.json)

    Raises ValueError, one line with file and line, for an empty, malformed or unknown file.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give a file of predictions, for example from eval.run"
        )
    if path.suffix == ".txt":
        return _mme(path)
    if path.suffix in (".tsv", ".csv"):
        rows = read_table(path)
        return [_prediction(row, f"{path}, row {i}") for i, row in enumerate(rows, 1)]
    if path.suffix == ".xlsx":
        raise ValueError(f"{path} is a spreadsheet; save it as CSV or TSV")
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; download or create it again")
    if text.lstrip()[0] == "[" or (path.suffix != ".jsonl" and _is_one_value(text)):
        return _json(path, read_json(path))
    return read_lines(path)


def read_lines(path: Path) -> list[Prediction]:
    """The predictions of a JSONL file."""
    return [_prediction(row, f"{path}, answer {i}") for i, row in enumerate(read_jsonl(path), 1)]


def match(items: Sequence[Item], predictions: Sequence[Prediction]) -> Matched:
    """Match predictions to questions.

    Raises ValueError if two questions cannot be told apart, or if no prediction matches a question.
    """
    index = index_names(items)
    found: dict[int, str] = {}
    unknown, duplicates = [], 0
    for prediction in predictions:
        at = next((index[k] for k in prediction.keys if k in index), None)
        if at is None:
            unknown.append(prediction.where)
            continue
        duplicates += at in found
        found[at] = prediction.text
    if predictions and not found:
        raise ValueError(
            f"none of the {len(predictions)} predictions answers any of the {len(items)} "
            f"questions: {predictions[0].where} has id {predictions[0].keys[-1]!r}, the first "
            f"question {str(items[0].question_id)!r}; give files that belong together"
            if items
            else "there are no questions; give a file that has some"
        )
    answers = [Answer(item, found.get(i)) for i, item in enumerate(items)]
    return Matched(answers, len(items) - len(found), tuple(unknown), duplicates)


def index_names(items: Sequence[Item]) -> dict[str, int]:
    """Every unambiguous name of a question -> the index of the question.

    Raises ValueError if a question has no such name.
    """
    every = [{str(i.question_id), question_key(i.question_id, i.text), *i.keys} for i in items]
    count = Counter(name for own in every for name in own)
    index = {name: n for n, own in enumerate(every) for name in own if count[name] == 1}
    reached = set(index.values())
    if lost := [items[n] for n in range(len(items)) if n not in reached]:
        raise ValueError(
            f"{len(lost)} questions have the same id and question as another, the first is "
            f"{lost[0].question_id}; correct the question file"
        )
    return index


# ---------------------------------------------------------------- shapes


def _is_one_value(text: str) -> bool:
    """Whether the text is one JSON value, not JSON lines in a .json file as POPE's are."""
    first = text.lstrip()
    if first[0] != "{":
        return True
    try:
        json.loads(first.split("\n", 1)[0])
    except (ValueError, RecursionError):
        return True
    return "\n" not in first.strip()


def _json(path: Path, values: Any) -> list[Prediction]:
    if isinstance(values, dict):
        judged = [values.get(name) for name in ("correct", "incorrect")]
        if all(isinstance(rows, list) for rows in judged):
            return _json(path, [row for rows in judged for row in rows or ()])
        inner = next(
            (
                values[k]
                for k in ("outputs", "rows", "data", "annotations", "results")
                if k in values and isinstance(values[k], list | dict)
            ),
            values,
        )
        if isinstance(inner, dict):
            if inner is values and any(name in values for name in IDS):
                return [_prediction(values, f"{path}, answer 1")]
            return [_pair(k, v, path) for k, v in inner.items()]
        values = inner
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path} has neither a list nor an object of answers; see eval/README.md")
    found = []
    for i, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: answer {i} is {type(row).__name__}, not an object")
        found.append(_prediction(row, f"{path}, answer {i}"))
    return found


def _pair(question_id: str, value: Any, path: Path) -> Prediction:
    where = f"{path}, {question_id}"
    if isinstance(value, dict):
        return _prediction({"question_id": question_id, **value}, where)
    return Prediction((question_id,), _text(value, where), where)


def _prediction(row: Mapping[str, Any], where: str) -> Prediction:
    ids = [form for name in IDS if row.get(name) is not None for form in _forms(row[name], where)]
    if not ids:
        raise ValueError(f"{where} has no id ({', '.join(IDS)}); give a file of predictions")
    # MMMU's rows have the right answer as "answer", beside "response"
    name = next((n for n in ("response", *TEXTS) if n in row), None)
    if name is None:
        raise ValueError(f"{where} has no text ({', '.join(TEXTS)}); give a file of predictions")
    question = next((row[n] for n in QUESTIONS if isinstance(row.get(n), str)), None)
    exact = [] if question is None else [question_key(i, question) for i in ids]
    return Prediction((*exact, *ids), _text(row[name], where), where)


def _forms(value: object, where: str) -> list[str]:
    """An id as text: 3.0 as "3". The text "3.0", which pandas writes in a column with gaps, is
    taken for itself and then for "3"."""
    if isinstance(value, str):
        whole = value.partition(".")[0]
        is_whole = re.fullmatch(r"[0-9]+\.0", value) is not None
        return [value, whole] if is_whole else [value]
    number = whole_number(value)
    if number is None:
        raise ValueError(f"{where} has the id {repr(value)[:60]}, which is no text or whole number")
    return [str(number)]


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    raise ValueError(f"{where}: the answer is {type(value).__name__}, not text")


def _mme(path: Path) -> list[Prediction]:
    return [
        Prediction((question_key(f"{path.stem}/{image}", question),), said, f"{path}, line {i}")
        for i, (image, question, _, said) in enumerate(tab_rows(path, (4,)), 1)
    ]


def _folder(path: Path) -> list[Prediction]:
    kinds = (".txt", ".json", ".jsonl")
    files = sorted(f for f in (*path.glob("*"), *path.glob("*/*")) if f.suffix in kinds)
    if texts := [f for f in files if f.suffix == ".txt"]:
        files = texts
    if not files:
        raise ValueError(f"{path} has no {', '.join(kinds)} in it; give a file of predictions")
    return [prediction for file in files for prediction in read(file)]
