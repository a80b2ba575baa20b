"""What is measured of an implementation, and how a few layers of the decoder stand for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from minillava.config import Config

ALL_LAYERS = 32
TOKENS = 4  # generated tokens that are timed in a round


@dataclass(frozen=True)
class Times:
    """Seconds of one image and one prompt with all decoder layers."""

    vision: float | None  # tower and projector; None: this implementation has none
    prefill: float
    per_token: float
    layers_alone: float | None = None  # with a pruning plan: the layers of this prefill alone


class Measurable(Protocol):
    """A model with random weights and a few decoder layers."""

    name: str

    def measure(self) -> Times: ...


class Peer(Measurable, Protocol):
    """A model of another implementation, which may not be installed."""

    packages: ClassVar[tuple[str, ...]]  # to import
    forms: ClassVar[Mapping[str, float]]  # form of the weights -> bytes for each, in memory

    def __init__(self, form: str, config: Config, tokens: int) -> None: ...

    @staticmethod
    def shapes(config: Config) -> list[Config]:
        """The models that are made to measure config's number of decoder layers."""


def scale(seconds: float, head: float, layers: int) -> float:
    """Seconds with ALL_LAYERS, from those with `layers`; `head` of them are the output head's."""
    return (seconds - head) * (ALL_LAYERS / layers) + head
