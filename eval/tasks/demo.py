"""Digit scenes: the benchmark of the demo checkpoint. Its handwriting is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weights import scenes

from ..credits import Credits
from .base import Answer, ImageSource, Item, Score, Setup, Task, names_of

N = 900


@dataclass(frozen=True)
class Demo(Task):
    """seed and kinds are those of scenes.held_out. A right answer equals the expected text."""

    seed: int = 2026
    kinds: tuple[str, ...] = ()

    name = "demo"
    title = "held-out digit scenes (weights/scenes.py)"
    split = "held-out"
    needs = ("nothing: the scenes are drawn",)
    setups = {  # noqa: RUF012
        "llava": Setup(48, template=None, aspect=None),
        "lmms": Setup(48, template=None, aspect=None),
    }

    def items(self, source: Path | None, protocol: str, limit: int | None = None) -> list[Item]:
        if source is not None:
            raise ValueError(f"the task {self.name} draws its scenes; leave --data {source} out")
        found = scenes.held_out(self.seed, N if limit is None else limit, self.kinds or None)
        return [
            Item(
                i,
                example.question,
                (ImageSource.in_memory(f"scene {i}", scene.image),),
                {"answer": example.answer, "kind": example.kind},
            )
            for i, (scene, example) in enumerate(found)
        ]

    def score(self, answers: Sequence[Answer], protocol: str) -> Score:
        """The accuracy of all kinds but captions, whose accuracy is in `more`; that of captions if
        nothing else is asked."""
        right = [a.said.strip() == a.item.gold["answer"] for a in answers]
        every = Credits.of(names_of(answers), right)
        kinds = np.array([a.item.gold["kind"] for a in answers])
        parts = {kind: every.select(kinds == kind) for kind in scenes.KINDS if kind in kinds}
        counted = every.select(kinds != "caption") if len(parts) > 1 else every
        return Score(
            "accuracy",
            counted.score,
            len(counted),
            int(counted.credit.sum()),
            more={kind: part.score for kind, part in parts.items()},
            notes=("captions are not in the figure; a caption is right if the whole sentence is",),
            credits=counted,
            parts=parts,
        )
