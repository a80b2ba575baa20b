"""Lists of questions' ids in files: written by eval.analyse, and filters of all that asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import store
from .tasks.base import Item, question_key
from .typed import find_type_error, parse_json, refuse_special_file


def write_ids(
    path: Path, items: Sequence[Item], numbers: Sequence[int], about: Mapping[str, Any]
) -> None:
    """Save the ids of some questions as JSON. about: what they are of.

    An id that several questions have is followed by a line break and the question.
    """
    times = Counter(str(item.question_id) for item in items)
    ids = [
        str(item.question_id)
        if times[str(item.question_id)] == 1
        else question_key(item.question_id, item.text)
        for item in (items[i] for i in numbers)
    ]
    store.write_atomically(path, store.as_json({**about, "ids": ids}))


def read_ids(path: Path) -> list[str]:
    """The ids of a file of write_ids, or of a text file with one id in each line.

    Raises ValueError for another file, and for one without ids.
    """
    refuse_special_file(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a list of ids, from eval.analyse or yours")
    text = path.read_text("utf-8-sig")
    if not text.lstrip().startswith("{"):
        ids = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        found = parse_json(text)
        ids = found.get("ids")
        if reason := find_type_error(ids, list[str], "ids"):
            raise ValueError(f"{path} is no list of ids: {reason}")
    if not ids:
        raise ValueError(f"{path} has no ids; give at least one")
    return list(dict.fromkeys(ids))


def choose_items(items: Sequence[Item], ids: Sequence[str], path: Path) -> list[Item]:
    """The questions with these ids, in the order of the benchmark.

    Raises ValueError for an id that no question has.
    """
    names = [{str(i.question_id), question_key(i.question_id, i.text)} for i in items]
    known, wanted = set().union(*names), set(ids)
    if strange := [i for i in ids if i not in known]:
        raise ValueError(
            f"{path} has {len(strange)} ids that none of the {len(items)} questions has, the first "
            f"is {strange[0]!r}; give a list of this benchmark, or raise --limit"
        )
    return [item for item, own in zip(items, names, strict=True) if own & wanted]
