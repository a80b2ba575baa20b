"""MME: two yes/no questions about each image, scored singly and as a pair.

Source: MME's calculation.py as lmms-eval carries it (tasks/mme/utils.py). The original does
not accept "y" and "n" alone, and does not remove periods and spaces first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


@dataclass(frozen=True)
class Row:
    """One question. said: the text of the model."""

    image: str
    category: str
    gold: str
    said: str


def parse(text: str) -> str:
    """ "yes", "no" or "other". Only the first four characters count: "know" is a no."""
    text = _plain(text)
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def is_right(row: Row) -> bool:
    return parse(row.said) == _plain(row.gold)


def scores(rows: Sequence[Row]) -> dict[str, float]:
    """Category -> 0..200: 100 * share of right answers + 100 * share of images with both right.

    Raises ValueError for an image without exactly two rows in its category, and for a gold answer
    that is neither yes nor no.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        gold = _plain(row.gold)
        if gold not in ("yes", "no"):
            raise ValueError(f"{row.image} has the answer {row.gold!r}; it must be Yes or No")
        right[row.category][row.image].append(is_right(row))
    for category, images in right.items():
        for image, pair in images.items():
            if len(pair) != 2:
                raise ValueError(
                    f"{image} of {category} has {len(pair)} rows; MME asks two questions "
                    "about each image"
                )
    return {
        category: sum(50.0 * sum(pair) + 100.0 * all(pair) for pair in images.values())
        / len(images)
        for category, images in right.items()
    }


def _plain(text: str) -> str:
    return text.lower().strip().replace(".", "")
