"""Answer questions about images on a terminal: one, or a conversation about the same images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..generate import Result, encode_images, stream
from ..llava import Encoded, LLaVA
from ..processing.processor import Processor
from ..pruning import Plan
from ..pruning.average import entering, leaving
from ..request import Settings
from ..sample import Batch
from .canvas import Drawing
from .command import print_error
from .output_file import replace_whole
from .overlay import draw_overlay
from .ranks import ALONE, Ranks

LONGEST_PIECE = 100  # characters; the longest tokens of Llama's vocabulary are 16 spaces
MAX_LINE = 10_000_000  # characters of a question that are read


@dataclass(frozen=True)
class Chat:
    """Everything that stays the same from question to question."""

    args: argparse.Namespace  # the command line, see cli.py
    model: LLaVA
    processor: Processor
    images: list[Image.Image]
    plan: Plan
    settings: Settings
    name: str  # the checkpoint, as given
    load_seconds: float
    ranks: Ranks = ALONE  # the processes that share the model

    @property
    def tokens(self) -> str:
        return self.plan.tokens or "hf"

    @property
    def focus(self) -> str | None:
        return self.plan.focus if self.args.focus is None else self.args.focus

    def answer_prompt(self, prompt: str, question: str) -> None:
        """Answer one complete prompt. The question in it is for the overlay."""
        self._answer(self._make_batch(prompt), question, None)

    def answer_questions(self, first: str | None) -> None:
        """Answer `first` and then the lines of stdin, as one conversation.

        The images are encoded once. Each turn prefills the whole conversation again, so that a plan
        that reads the question chooses again for each one.
        """
        turns: list[tuple[str, str]] = []
        encoded, questions = None, _read_questions(first)
        while (question := self.ranks.run_in_first(lambda: next(questions, None))) is not None:
            try:
                check_length(self.model, question)
                prompt = self.processor.prompt(question, len(self.images), turns)
                batch = self._make_batch(prompt)
                encoded = encoded or encode_images(self.model, batch, self.plan)
                turns.append((question, self._answer(batch, question, encoded)))
            except ValueError as error:
                if not _is_terminal():
                    raise
                print_error(error)  # a person at the terminal can ask something else

    def _make_batch(self, prompt: str) -> Batch:
        aspect = self.args.image_aspect
        return self.processor([prompt], [self.images], aspect, self.tokens, self.focus)

    def _answer(self, batch: Batch, question: str, encoded: Encoded | None) -> str:
        """Print the answer while it is generated, or a JSON record at the end; draw the overlay."""
        pieces = stream(
            self.model,
            self.processor,
            batch,
            self.plan,
            **dataclasses.asdict(self.settings),
            encoded=encoded,
        )
        text, result = _collect(pieces, printing=not self.args.json), pieces.result
        if self.args.json:
            print(json.dumps(self._make_record(text, result)), flush=True)
        if self.args.overlay and self.ranks.rank == 0:
            path = self.args.overlay
            with replace_whole(path) as part:
                self._draw(result, text, question).save(part, path.suffix.lower().lstrip("."))
        return text

    def _draw(self, result: Result, text: str, question: str) -> Drawing:
        seed = self.settings.seed
        about = {
            "Command": self.args.command,
            "Model": self.name,
            "Seed": "0, the default of plans" if seed is None else str(seed),
        }
        return draw_overlay(
            result,
            self.images,
            text=text,
            aspect=self.args.image_aspect or self.processor.aspect,
            config=self.processor.image,
            question=question,
            about=about,
        )

    def _make_record(self, text: str, result: Result) -> dict[str, Any]:
        counts = result.report.image_tokens_entering
        return {
            "text": text,
            "tokens": result.tokens[0],
            "plan": self.plan.text or None,
            "model": self.name,
            "load_seconds": self.load_seconds,
            "processes": self.ranks.size,
            "tokens_mode": self.tokens,
            "focus": self.focus,
            "average_image_tokens": {
                "entering": entering(counts)[0],
                "leaving": leaving(counts)[0],
            },
            "report": dataclasses.asdict(result.report),
        }


def check_length(model: LLaVA, question: str) -> None:
    """Refuse a question that is certainly too long before it is tokenised, which takes seconds for
    a million characters (ValueError)."""
    positions = model.config.text.max_position_embeddings
    most = positions * LONGEST_PIECE
    if len(question) > most:
        raise ValueError(
            f"the question has more than {most} characters, which do not fit into the model's "
            f"{positions} positions; ask a shorter one"
        )


def _collect(pieces: Iterable[str], printing: bool) -> str:
    """Join the pieces of an answer, printing each as it comes."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            if printing:
                print(piece, end="", flush=True)
    finally:
        if printing and text:  # an error, too, goes on a new line
            print(flush=True)
    return text


def _read_questions(first: str | None) -> Iterator[str]:
    """The first question, then the lines of stdin that are not blank."""
    if first is not None:
        yield first
    while True:
        if _is_terminal():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline(MAX_LINE) if sys.stdin else ""
        if not line:
            return
        end = line
        while len(end) == MAX_LINE and not end.endswith("\n"):
            end = sys.stdin.readline(MAX_LINE)  # the rest of the line is not kept
        if line.strip():
            yield line.strip()


def _is_terminal() -> bool:
    return bool(sys.stdin and sys.stdin.isatty())
