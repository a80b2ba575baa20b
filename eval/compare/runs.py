"""What a comparison holds: the runs of one question under several plans, and over budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from minillava.app.fate import patches_of
from minillava.processing.image import ImageConfig
from minillava.report import Result

NONE = "none"  # the plan of the unpruned model


@dataclass(frozen=True)
class Run:
    """What one plan made of the question."""

    plan: str  # as it was given; "none" is the unpruned model
    result: Result | None = None  # without logits; None: it could not run
    error: str = ""  # why, in one sentence
    tower: float | None = None  # seconds of the vision tower that all share; None: it ran its own
    kl: float | None = None  # of the first token, in nats, from the unpruned model

    @property
    def answer(self) -> str:
        return (self.result.texts or [""])[0].strip() if self.result else ""

    @property
    def cut(self) -> bool:
        """Whether the answer would go on, if more new tokens were allowed."""
        return self.result is not None and self.result.report.stopped[0] == "length"

    @property
    def first_token(self) -> float | None:
        """Seconds from the start to the first token, the shared vision tower included."""
        return None if self.result is None else self.result.report.first_token + (self.tower or 0)

    def kept(self, image: int) -> set[int]:
        """The patches of an image that are left (drop) or visible (mask) after the last step."""
        assert self.result is not None
        N, start = self.result.config.vision.num_patches, self.result.starts[0][image]
        steps = self.result.report.kept
        return patches_of(steps[-1], 0, range(start, start + N)) if steps else set(range(N))


@dataclass(frozen=True)
class Cell:
    """The answer of a plan at one budget, no longer than the unpruned answer."""

    budget: int  # image tokens of an image that are to be left at the end
    left: float  # how many are: as near to the budget as the plan's options allow
    plan: str  # with these options
    text: str
    cut: bool  # the answer would go on
    same: bool  # it has the tokens of the unpruned answer
    kl: float | None  # as of a Run
    error: str


@dataclass(frozen=True)
class Drift:
    """The answers of one plan over budgets."""

    plan: str
    cells: tuple[Cell, ...]
    reason: str  # why there are none


@dataclass(frozen=True)
class Comparison:
    """One question under several plans; the unpruned model is the first run."""

    images: tuple[Image.Image, ...]
    question: str
    runs: tuple[Run, ...]
    drifts: tuple[Drift, ...]
    budgets: tuple[int, ...]
    aspect: str  # how the images were made square
    image_config: ImageConfig
    about: Mapping[str, str] = field(default_factory=dict)  # for files: command, model, seed

    @property
    def answered(self) -> list[tuple[Run, Result]]:
        """The runs that could run, with their results."""
        return [(run, run.result) for run in self.runs if run.result is not None]
