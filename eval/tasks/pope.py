"""POPE: is an object in the image? Three splits differ in how absent objects were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ..credits import Credits
from ..metrics import pope as metric
from .base import SHORT, Answer, ImageSource, Item, Score, Setup, Task, gold_of, names_of
from .files import first_existing, id_field, image_folder, json_rows, text_field
from .tables import find_table

SPLITS = ("random", "popular", "adversarial")


class POPE(Task):
    """The value is the mean F1 of the splits, as LLaVA reports it."""

    name = "pope"
    title = "POPE"
    split = "random, popular and adversarial"
    needs = (
        "a folder with coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json "
        "(github.com/AoiDragon/POPE, output/coco; also in coco/), optionally LLaVA's "
        "llava_pope_test.jsonl, and COCO's val2014/",
        "a folder of the datasets repository lmms-lab-encoder/POPE (test*.parquet)",
    )
    setups = {"llava": Setup(128), "lmms": Setup(128)}  # noqa: RUF012

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is None or not source.exists():
            raise self.missing(source)
        return [item for item, _ in zip(self._all(source), range(limit or 10**9), strict=False)]

    def _all(self, source: Path) -> Iterator[Item]:
        if source.is_dir() and (table := find_table(source, "test")) is not None:
            for i, row in enumerate(table.rows):
                split = row.get("category")
                if split is not None:
                    split = text_field(row, "category", table.path, f"row {i}")
                gold = {"answer": row.get("answer"), "split": split}
                number = str(id_field(row, "question_id", table.path, f"row {i}"))
                text = text_field(row, "question", table.path, f"row {i}").strip() + SHORT
                name = f"{split}/{number}"
                yield Item(name, text, (table.image(i),), gold, (number,))
            return
        if source.is_file():
            yield from self._split(source, _split_of(source), {})
            return
        files = {
            split: first_existing(source, f"coco_pope_{split}.json", f"coco/coco_pope_{split}.json")
            for split in SPLITS
        }
        if not any(files.values()):
            raise self.missing(source)
        asked = first_existing(source, "llava_pope_test.jsonl")
        numbers: dict[str, list[object]] = {}
        if asked is not None:
            for i, row in enumerate(json_rows(asked)):
                own = numbers.setdefault(text_field(row, "category", asked, f"row {i}"), [])
                own.append(id_field(row, "question_id", asked, f"row {i}"))
        for split, path in files.items():
            if path is not None:
                yield from self._split(path, split, numbers)

    def _split(self, path: Path, split: str, numbers: dict[str, list[object]]) -> Iterator[Item]:
        """The questions of a split. LLaVA numbers those of all splits consecutively, in order."""
        rows = json_rows(path)
        own = numbers.get(split)
        if own is not None and len(own) != len(rows):
            raise ValueError(
                f"{path} has {len(rows)} questions, llava_pope_test.jsonl has {len(own)} of "
                f"{split}; take both from one version of POPE"
            )
        folder = image_folder(path.parent, "val2014", "../val2014", "images")
        for i, row in enumerate(rows):
            number = id_field(row, "question_id", path, f"row {i}")
            name = text_field(row, "image", path, f"row {i}")
            text = text_field(row, "text", path, f"row {i}").strip() + SHORT
            gold = {"answer": row.get("label"), "split": split}
            images = (ImageSource.from_file(folder / name),)
            if own is not None:
                yield Item(str(own[i]), text, images, gold, (f"{split}/{number}",))
            else:
                yield Item(f"{split}/{number}", text, images, gold, (str(number),))

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        scores = metric.lmms_scores if protocol == "lmms" else metric.llava_scores
        groups: dict[str, list[Answer]] = {}
        for a in answers:
            groups.setdefault(a.item.gold.get("split") or "all", []).append(a)
        if not groups:
            raise ValueError("there are no questions to score; give a file that has some")
        more: dict[str, object] = {}
        f1s = []
        for split, group in groups.items():
            found = scores([gold_of(a) for a in group], [_said(a) for a in group])
            f1s.append(found.f1)
            for name, value in asdict(found).items():
                is_count = isinstance(value, int) or value is None
                more[f"{split} {name}"] = value if is_count else 100 * value
        defined = [f1 for f1 in f1s if f1 is not None]
        notes = []
        if len(defined) < len(f1s):
            notes.append("F1 is undefined in a split without any yes; the mean leaves it out")
        if protocol == "lmms":
            notes.append("yes_ratio is that of the labels, as in lmms-eval")
        else:
            notes.append("every answer that is not a No counts as a yes, so nothing is unparsed")
        strange = sum(
            a.text is not None and metric.lmms_parse(a.text) not in ("yes", "no") for a in answers
        )
        value = 100 * sum(defined) / len(defined) if defined else 0.0
        credits, parts = _credits(answers, protocol)
        right = credits.credit.sum()
        unparsed = strange if protocol == "lmms" else 0
        split = self.split if set(groups) == set(SPLITS) else ", ".join(groups)
        return Score(
            "F1", value, len(answers), right, unparsed, more, tuple(notes), split, credits, parts
        )


def _credits(answers: Sequence[Answer], protocol: str) -> tuple[Credits, dict[str, Credits]]:
    """The credits of the mean F1 over splits, F1 = 2 tp / (2 tp + fp + fn), and of each split's
    figures by name."""
    parse = metric.lmms_parse if protocol == "lmms" else metric.parse
    said = [parse(_said(a)) for a in answers]
    gold = [gold_of(a).strip().lower() for a in answers]
    splits = [a.item.gold.get("split") or "all" for a in answers]
    numbers = {split: i for i, split in enumerate(dict.fromkeys(splits))}
    is_yes, is_gold = np.array(said) == "yes", np.array(gold) == "yes"
    counted = is_gold & np.isin(said, ("yes", "no"))  # lmms: no other answer is in tp, fp or fn
    right = Credits.of(names_of(answers), [float(s == g) for s, g in zip(said, gold, strict=True)])
    undefined = 1e-12 if protocol == "lmms" else 0.0  # lmms: an F1 without tp, fp and fn is 0
    hits, yes, among = 1.0 * (is_yes & is_gold), 1.0 * is_yes, 1.0 * counted
    groups = np.array([numbers[split] for split in splits])
    f1 = replace(
        right, numerator=2 * hits, denominator=yes + among + undefined, group=groups, mean=True
    )
    figures = {
        "accuracy": right,
        "precision": replace(right, numerator=hits, denominator=yes),
        "recall": replace(right, numerator=hits, denominator=among),
        "f1": f1,
    }
    if protocol != "lmms":
        figures["yes_ratio"] = Credits.of(right.names, yes.tolist())
    parts = {
        f"{split} {name}": made.select(groups == number)
        for split, number in numbers.items()
        for name, made in figures.items()
    }
    return f1, {name: made for name, made in parts.items() if made.denominator.any()}


def _said(answer: Answer) -> str:
    """The text; for a missing answer the wrong word, because LLaVA's rule reads "" as a yes."""
    if answer.text is not None:
        return answer.text
    return "no" if gold_of(answer).strip().lower() == "yes" else "yes"


def _split_of(path: Path) -> str:
    return next((split for split in SPLITS if split in path.stem), path.stem)
