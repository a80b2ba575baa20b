"""What a benchmark is here: questions with pictures, how they are asked, and how answers count."""

from __future__ import annotations

import base64
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ..metrics.vqa import soft_accuracy

PROTOCOLS = ("llava", "lmms")

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class ImageSource:
    """A picture that is opened when its turn comes. path: its file, None for one inside a table."""

    name: str
    read: Callable[[], Image.Image]
    path: Path | None = None

    @classmethod
    def from_file(cls, path: Path) -> ImageSource:
        return cls(str(path), lambda: Image.open(path), path)

    @classmethod
    def in_memory(cls, name: str, image: Image.Image) -> ImageSource:
        """One that is already there."""
        return cls(name, lambda: image)

    @classmethod
    def from_base64(cls, name: str, text: str) -> ImageSource:
        return cls(name, lambda: Image.open(io.BytesIO(base64.b64decode(text))))

    def open(self) -> Image.Image:
        """RGB and not turned by EXIF, as both protocols' code does. ValueError: cannot be read."""
        try:
            return self.read().convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"the picture {self.name} cannot be read ({why})") from None


@dataclass(frozen=True)
class Item:
    """One question. text: without any template or <image>; gold: what the task's score reads."""

    question_id: str | int
    text: str
    images: tuple[ImageSource, ...] = ()
    gold: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()  # further names under which a predictions file may answer it


@dataclass(frozen=True)
class Answer:
    """A question with the text that was given to it; None: no prediction."""

    item: Item
    text: str | None

    @property
    def said(self) -> str:
        """The text, empty for a missing one."""
        return self.text or ""


@dataclass(frozen=True)
class Score:
    """value: the task's figure, in percent unless `metric` says otherwise; right: questions, or
    their credits, out of n; unparsed: answers that are in none of the forms looked for, counted
    and never guessed; more: further figures by name."""

    metric: str
    value: float
    n: int
    right: float | None = None
    unparsed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    split: str | None = None  # where the questions decide it; else the task's


@dataclass(frozen=True)
class Setup:
    """How a protocol asks. template (of minillava/prompt.py) and aspect: None, the checkpoint's."""

    max_new_tokens: int
    template: str | None = "vicuna_v1"
    aspect: str | None = "pad"
    use_cache: bool = True


class Task(ABC):
    """A benchmark. needs: what to download, and where in --data it is looked for; setups: how each
    protocol asks, the first by default. split and metrics are in published.json's words."""

    name: ClassVar[str]
    title: ClassVar[str]
    split: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    setups: ClassVar[Mapping[str, Setup]]
    image_in_prompt: ClassVar[bool] = False  # LLaVA's script writes <image> into predictions

    @abstractmethod
    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        """The questions of a folder, or of one question file, in their order; at most `limit`.

        ValueError, one line, names the path that is missing, or the line that is wrong.
        """

    @abstractmethod
    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        """All questions with their answers; a missing one is wrong. ValueError: no gold."""

    def missing(self, path: Path | None) -> ValueError:
        where = f"there is nothing to read in {path}" if path else f"{self.name} needs data"
        return ValueError(f"{where}; give {'; or '.join(self.needs)}")

    def submission(self, answers: Sequence[Answer]) -> list[dict[str, Any]] | None:
        """What the benchmark's server takes; None: it has none, or scores nothing we cannot."""
        return None


def percent(right: Sequence[bool | float]) -> float | None:
    """Mean in percent; None of nothing."""
    return 100 * sum(right) / len(right) if right else None


def accuracy(right: Sequence[bool | float], unparsed: int = 0, **more: Any) -> Score:
    """The share of right answers (or of credits). more: further fields of the Score. ValueError for
    no question at all."""
    value = percent(right)
    if value is None:
        raise ValueError("there is no question to score; give a file that has some")
    return Score("accuracy", value, len(right), float(sum(right)), unparsed, **more)


def count_unparsed(answers: Sequence[Answer], parse: Callable[[str], object]) -> int:
    """Answers that are there and that `parse` makes nothing of."""
    return sum(a.text is not None and parse(a.text) is None for a in answers)


def gold_of(answer: Answer, name: str = "answer") -> str:
    """An item's gold by name. ValueError where the questions came without answers, or with
    something else in their place."""
    gold = _gold(answer, name)
    if not isinstance(gold, str):
        raise _no_gold(answer, f"the {name} {repr(gold)[:60]}, which is no text")
    return gold


def golds_of(answer: Answer, name: str) -> list[str]:
    """One of several; ValueError as above, and where there is none."""
    golds = _gold(answer, name)
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) for g in golds):
        raise _no_gold(answer, f"the {name} {repr(golds)[:60]}, which is no list of texts")
    return golds


def _gold(answer: Answer, name: str) -> object:
    gold = answer.item.gold.get(name)
    if gold is None:
        raise _no_gold(answer, f"no gold {name}")
    return gold


def _no_gold(answer: Answer, what: str) -> ValueError:
    number = answer.item.question_id
    return ValueError(f"question {number} has {what}; give the official file that has the answers")


def vqa_credit(answer: Answer, rule: str) -> float:
    """VQA's soft accuracy. A missing answer has none, though a gold answer may normalise to ""."""
    golds = golds_of(answer, "answers")
    return 0.0 if answer.text is None else soft_accuracy(answer.text, golds, rule)


def letter_options(options: Sequence[str], form: str = "{}. {}", between: str = "\n") -> str:
    """Options with A, B, C in front."""
    return between.join(form.format("ABCDEFGHIJ"[i], text) for i, text in enumerate(options))


_YES_NO = re.compile(r"\s*please answer yes or no\.?", re.IGNORECASE)


def asked(text: str) -> str:
    """What a question is recognised by: its first line, without <image> and instructions, in lower
    case. LLaVA's files repeat ids where one picture has several questions (TextVQA, MME)."""
    lines = [line.strip() for line in text.replace("<image>", "").split("\n")]
    first = next((line for line in lines if line), "")
    return " ".join(_YES_NO.sub("", first).lower().split())


def question_key(question_id: object, text: str) -> str:
    """An id together with the question, for files whose ids repeat."""
    return f"{question_id}\n{asked(text)}"
