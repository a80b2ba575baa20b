"""Budgets as papers state them: image tokens ENTERING a layer, averaged over the layers.

`average=192` is no setting of a method that acts inside the decoder, it is a result: with 32 layers
and 576 tokens FastV at layer 2 reaches it by keeping 166. Such methods are `Budgeted`: `average` is
solved against the model (`resolve`) before anything runs, to the nearest of the method's
`variants`; what lies outside all of them is refused. What came of it can be counted from a
report's `image_tokens_entering`, here in two ways: as above, and as SparseVLM's released counter
does, which counts a layer whose output is pruned as if its input had been.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .base import Method

M = TypeVar("M", bound="Budgeted")
SLACK = 0.5  # tokens by which a budget may lie outside, since people type what they read rounded


def entering(layers: Sequence[Sequence[int]]) -> list[float]:
    """Average over layers of the image tokens entering them: counts [layer][b] -> [b]."""
    return [sum(counts) / len(counts) for counts in zip(*layers, strict=True)]


def leaving(layers: Sequence[Sequence[int]]) -> list[float]:
    """The same for the tokens that leave a layer for the next: SparseVLM's own counter."""
    return entering([*layers[1:], layers[-1]])


@dataclass(frozen=True, kw_only=True)
class Budgeted(Method):
    """A method of the decoder that `average=` can set."""

    average: float | None = field(
        default=None, metadata={"help": "image tokens entering a layer, averaged over the layers"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average is not None and self.scope == "all":
            raise ValueError(f"{self.name}: average={self.average} counts one image; give keep=")

    def left(self, n_tokens: int) -> tuple[int, ...]:
        """Image rows there are after each of its stages, out of n_tokens."""
        raise NotImplementedError

    def variants(self: M, n_layers: int, n_tokens: int) -> Iterator[tuple[str, M]]:
        """What `average` chooses among: options as text, and the method with them."""
        raise NotImplementedError

    def reaches(self, n_layers: int, n_tokens: int) -> float:
        """Average over the layers of image tokens entering."""
        total, count, since = 0, n_tokens, 0
        for (_, layer), left in zip(self.stages(), self.left(n_tokens), strict=True):
            total += count * (layer - since)
            count, since = left, layer
        return (total + count * (n_layers - since)) / n_layers

    def resolve(self: M, n_layers: int, n_tokens: int) -> M:
        wanted = self.average
        if wanted is None:
            return self
        found = [
            (variant.reaches(n_layers, n_tokens), text, variant)
            for text, variant in self.variants(n_layers, n_tokens)
        ]
        if not found:
            raise ValueError(f"{self.name}: average={wanted} cannot be solved for these options")
        reached, text, nearest = min(found, key=lambda f: abs(f[0] - wanted))  # the first if tied
        inside = min(f[0] for f in found) <= wanted <= max(f[0] for f in found)
        if not inside and abs(reached - wanted) > SLACK:
            raise ValueError(
                f"{self.name}: average={wanted} is out of reach with {n_layers} layers and "
                f"{n_tokens} image tokens; the nearest is average={reached:.1f} ({text})"
            )
        return nearest

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        assert self.average is None, "Plan.resolve comes before check"
        super().check(n_layers, n_tokens, starts)


def between(jumps: Iterable[float]) -> Iterator[float]:
    """A number between any two neighbours: every value of what only changes at these jumps."""
    return ((a + b) / 2 for a, b in itertools.pairwise(sorted(set(jumps))))


def check_ascending(name: str, layers: Sequence[int]) -> None:
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{name}: layers={'/'.join(map(str, layers))} must ascend")


def check_stages(name: str, layers: Sequence[int], values: Sequence[float], option: str) -> None:
    """Refuse lists that are not one value for each of some ascending layers."""
    said = "/".join(map(str, layers))
    if len(layers) != len(values):
        raise ValueError(
            f"{name}: layers={said} are {len(layers)}, but {option}="
            f"{'/'.join(map(str, values))} are {len(values)}; give one for each layer"
        )
    check_ascending(name, layers)


def check_after_first(name: str, layer: int) -> None:
    """Refuse layer 0 to a method that reads the layer before."""
    if layer == 0:
        raise ValueError(f"{name}: layer 0 has no layer before it to rank by; give one from 1 on")
