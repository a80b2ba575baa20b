"""The interface of a benchmark: its questions with images, how they are asked, how it scores."""

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

from minillava.app.open_image import open_header

from ..credits import Credits
from ..metrics.vqa import soft_accuracy
from ..typed import refuse_special_file

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class ImageSource:
    """An image that is opened only when it is needed. path: its file, None inside a table."""

    name: str
    read: Callable[[], Image.Image]
    path: Path | None = None

    @classmethod
    def from_file(cls, path: Path) -> ImageSource:
        return cls(str(path), lambda: _open_file(path), path)

    @classmethod
    def in_memory(cls, name: str, image: Image.Image) -> ImageSource:
        """An image that is already in memory."""
        return cls(name, lambda: image)

    @classmethod
    def from_base64(cls, name: str, text: str) -> ImageSource:
        return cls(name, lambda: open_header(io.BytesIO(base64.b64decode(text))))

    @classmethod
    def missing(cls, name: str) -> ImageSource:
        """An image that a row should have, but has not. Opening it raises ValueError."""
        return cls(name, _refuse_missing)

    def open(self) -> Image.Image:
        """The image in RGB, not rotated by EXIF, as in both protocols' code.

        Raises ValueError if it cannot be read.
        """
        try:
            return self.read().convert("RGB")
        except Exception as error:  # decoders raise many types on damaged data
            raise self._unreadable(error) from None

    def size(self) -> tuple[int, int]:
        """Width and height, of which most formats need the header alone. Raises as `open` does."""
        try:
            return self.read().size
        except Exception as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ValueError:
        why = " ".join(str(error).split()) or type(error).__name__
        return ValueError(f"the image {self.name} cannot be read ({why})")


def _refuse_missing() -> Image.Image:
    raise ValueError("there is no image")


def _open_file(path: Path) -> Image.Image:
    refuse_special_file(path)
    return open_header(path)


@dataclass(frozen=True)
class Item:
    """One question. text: without template and <image>; gold: the right answers, for scoring."""

    question_id: str | int
    text: str
    images: tuple[ImageSource, ...] = ()
    gold: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()  # other names of the question in files of predictions


@dataclass(frozen=True)
class Answer:
    """A question with the text of its prediction; None if there is none."""

    item: Item
    text: str | None

    @property
    def said(self) -> str:
        """The text, "" if it is missing."""
        return self.text or ""


@dataclass(frozen=True)
class Score:
    """The score of a task.

    value: the figure, in percent unless `metric` says otherwise. right: the number of right answers
    or the sum of their credits, out of n. unparsed: the number of answers that have none of the
    expected forms; they are never guessed. more: further figures by name. credits: what the value
    is made of, for intervals and comparisons; None without gold answers. parts: those of figures
    in `more`, by name.
    """

    metric: str
    value: float
    n: int
    right: float | None = None
    unparsed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    split: str | None = None  # if it depends on the questions; otherwise the task's
    credits: Credits | None = field(default=None, repr=False, compare=False)
    parts: Mapping[str, Credits] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Setup:
    """How a protocol asks. template is a name of minillava/processing/templates.py.

    If template or aspect is None, the checkpoint's is used.
    """

    max_new_tokens: int
    template: str | None = "vicuna_v1"
    aspect: str | None = "pad"
    use_cache: bool = True


class Task(ABC):
    """A benchmark.

    needs: what to download, and its place in --data. setups: how each protocol asks; the first is
    the default. split and metrics are named as in published.json.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    split: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    setups: ClassVar[Mapping[str, Setup]]
    image_in_prompt: ClassVar[bool] = (
        False  # whether LLaVA's script writes <image> into the prompt of its predictions
    )

    @abstractmethod
    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        """The questions of a folder or of one question file, in their order, at most `limit`.

        Raises ValueError, one line with the missing path or the malformed line.
        """

    def counted(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """The answers that count: all, but for tasks that leave questions out."""
        return answers

    @abstractmethod
    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        """Score all questions; a missing answer is wrong. ValueError without gold answers."""

    def missing(self, path: Path | None) -> ValueError:
        where = f"there is nothing to read in {path}" if path else f"{self.name} needs data"
        return ValueError(f"{where}; give {'; or '.join(self.needs)}")

    def submission(self, answers: Sequence[Answer]) -> list[dict[str, Any]] | None:
        """The rows to submit to the benchmark's server; None if there is no need for one."""
        return None


def percent(right: Sequence[bool | float]) -> float | None:
    """The mean in percent; None for an empty sequence."""
    return 100 * sum(right) / len(right) if right else None


def accuracy(
    answers: Sequence[Answer], right: Sequence[bool | float], unparsed: int = 0, **more: Any
) -> Score:
    """A Score of the share of right answers or the mean credit. more: further fields of the Score.

    Raises ValueError if there are no questions.
    """
    value = percent(right)
    if value is None:
        raise ValueError("there are no questions to score; give a file that has some")
    made, total = Credits.of(names_of(answers), right), float(sum(right))
    return Score("accuracy", value, len(right), total, unparsed, credits=made, **more)


def split_scores(
    answers: Sequence[Answer], right: Sequence[bool | float], labels: Sequence[str]
) -> dict[str, Credits]:
    """Label -> the credits of the answers that have it, for a Score's parts."""
    made = Credits.of(names_of(answers), right)
    return {str(label): part for label, part in made.split(labels).items()}


def names_of(answers: Sequence[Answer]) -> list[str]:
    """The names of the questions in Credits: ids with questions, because ids may repeat."""
    return [question_key(a.item.question_id, a.item.text) for a in answers]


def count_unparsed(answers: Sequence[Answer], parse: Callable[[str], object]) -> int:
    """The number of answers for which `parse` returns None; missing answers do not count."""
    return sum(a.text is not None and parse(a.text) is None for a in answers)


def gold_of(answer: Answer, name: str = "answer") -> str:
    """The text of a gold answer by its name.

    Raises ValueError if the question came without it, or if it is not text.
    """
    gold = _gold(answer, name)
    if not isinstance(gold, str):
        raise _no_gold(answer, f"the {name} {repr(gold)[:60]}, which is not text")
    return gold


def golds_of(answer: Answer, name: str) -> list[str]:
    """A list of gold answers by its name (ValueError as above, also if it is empty)."""
    golds = _gold(answer, name)
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) for g in golds):
        raise _no_gold(answer, f"the {name} {repr(golds)[:60]}, which is not a list of texts")
    return golds


def _gold(answer: Answer, name: str) -> object:
    gold = answer.item.gold.get(name)
    if gold is None:
        raise _no_gold(answer, f"no gold {name}")
    return gold


def _no_gold(answer: Answer, what: str) -> ValueError:
    number = answer.item.question_id
    return ValueError(f"question {number} has {what}; give the official file with the answers")


def vqa_credit(answer: Answer, rule: str) -> float:
    """VQA's soft accuracy, 0..1. A missing answer has 0, even if a gold one normalises to ""."""
    golds = golds_of(answer, "answers")
    return 0.0 if answer.text is None else soft_accuracy(answer.text, golds, rule)


LETTERS = "ABCDEFGHIJ"


def letter_options(options: Sequence[str], form: str = "{}. {}", between: str = "\n") -> str:
    """Options with letters in front, for example "A. cat\\nB. dog"."""
    return between.join(form.format(LETTERS[i], text) for i, text in enumerate(options))


_YES_NO = re.compile(r"\s*please answer yes or no\.?", re.IGNORECASE)
_SHORT_ANSWER = re.compile(r"OCR tokens: .*?Question: (.*?) Short answer:", re.DOTALL)
_TOKENS_FIRST = "Reference OCR token:"


def question_line(text: str) -> str:
    """The question of a prompt in one line and lower case, without <image> and instructions.

    It identifies the question where LLaVA's files repeat ids, because one image has several
    questions (TextVQA, MME). It is the first line, but for two of the four forms that LLaVA's
    eval_textvqa.py reads: "OCR tokens: A, B Question: who? Short answer:", and the second line
    below one that begins with "Reference OCR token:".
    """
    text = text.replace("<image>", "").strip()
    if match := _SHORT_ANSWER.match(text):
        return _plain_line(match[1])
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 2 and lines[0].startswith(_TOKENS_FIRST):
        lines = lines[1:]
    return _plain_line(lines[0] if lines else "")


def _plain_line(text: str) -> str:
    return " ".join(_YES_NO.sub("", text).lower().split())


def question_key(question_id: object, text: str) -> str:
    """An id together with the question in one line, for files whose ids repeat."""
    return f"{question_id}\n{question_line(text)}"
