"""Answers on a terminal: one, or a conversation about the same pictures."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..generate import Result, Settings, encode_images, stream
from ..llava import Batch, Encoded, LLaVA
from ..processing.processor import Processor
from ..pruning import Plan
from ..pruning.average import entering, leaving
from .command import complain
from .overlay import overlay


@dataclass(frozen=True)
class Session:
    """What stays the same from question to question."""

    model: LLaVA
    processor: Processor
    images: list[Image.Image]
    plan: Plan
    settings: Settings
    name: str  # the model's, as given
    tokens: str
    focus: str | None
    aspect: str | None
    use_cache: bool
    as_json: bool
    drawing: Path | None
    load_seconds: float

    def ask(self, prompt: str) -> None:
        """Answer a whole prompt."""
        self._answer(self._batch(prompt), None)

    def chat(self, first: str | None) -> None:
        """Question after question. Each turn prefills the whole conversation anew with the pictures
        as they were encoded once, so that a plan that reads the question chooses for each."""
        turns: list[tuple[str, str]] = []
        encoded = None
        for question in _questions(first):
            try:
                prompt = self.processor.prompt(question, len(self.images), turns)
                batch = self._batch(prompt)
                encoded = encoded or encode_images(self.model, batch, self.plan)
                turns.append((question, self._answer(batch, encoded)))
            except ValueError as error:
                if not _terminal():
                    raise
                complain(error)  # somebody sits there and can ask something else

    def _batch(self, prompt: str) -> Batch:
        return self.processor([prompt], [self.images], self.aspect, self.tokens, self.focus)

    def _answer(self, batch: Batch, encoded: Encoded | None) -> str:
        """Print the answer as it comes, or all about it at the end; draw what was kept."""
        pieces = stream(
            self.model,
            self.processor,
            batch,
            self.plan,
            **dataclasses.asdict(self.settings),
            use_cache=self.use_cache,
            encoded=encoded,
        )
        text, result = _say(pieces, aloud=not self.as_json)
        if self.as_json:
            print(json.dumps(self._record(text, result)), flush=True)
        if self.drawing:
            aspect, config = self.aspect or self.processor.aspect, self.processor.image
            picture = overlay(result, self.images, text=text, aspect=aspect, config=config)
            _save(picture, self.drawing)
        return text

    def _record(self, text: str, result: Result) -> dict[str, Any]:
        counts = result.report.image_tokens_entering
        return {
            "text": text,
            "tokens": result.tokens[0],
            "plan": self.plan.text or None,
            "model": self.name,
            "load_seconds": self.load_seconds,
            "tokens_mode": self.tokens,
            "focus": self.focus,
            "average_image_tokens": {
                "entering": entering(counts)[0],
                "leaving": leaving(counts)[0],
            },
            "report": dataclasses.asdict(result.report),
        }


def _say(pieces: Generator[str, None, Result], aloud: bool) -> tuple[str, Result]:
    text = ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            if aloud:
                print(flush=True)
            return text, end.value
        except ValueError:
            if aloud and text:  # the error gets a line of its own
                print(flush=True)
            raise
        text += piece
        if aloud:
            print(piece, end="", flush=True)


def _questions(first: str | None) -> Iterator[str]:
    """The first, then stdin line by line, empty ones left out."""
    if first is not None:
        yield first
    while True:
        if _terminal():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin else ""
        if not line:
            return
        if line.strip():
            yield line.strip()


def _terminal() -> bool:
    return bool(sys.stdin and sys.stdin.isatty())


def _save(picture: Image.Image, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        picture.save(part, "PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
