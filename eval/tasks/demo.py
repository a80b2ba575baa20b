"""Digit scenes: the benchmark of the demo checkpoint. Its handwriting is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weights import scenes

from .base import Answer, ImageSource, Item, Score, Setup, Task, percent

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
            raise ValueError(f"the task demo draws its scenes; leave --data {source} out")
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
        """The accuracy of all kinds but captions, whose accuracy is in `more`."""
        right: dict[str, list[bool]] = {}
        for a in answers:
            kind = right.setdefault(a.item.gold["kind"], [])
            kind.append(a.said.strip() == a.item.gold["answer"])
        counted = [x for kind, xs in right.items() if kind != "caption" for x in xs]
        kinds = {kind: percent(right[kind]) for kind in scenes.KINDS if kind in right}
        notes = ("captions are not in the figure; a caption is right if the whole sentence is",)
        value = percent(counted) or 0.0
        return Score("accuracy", value, len(counted), sum(counted), more=kinds, notes=notes)
