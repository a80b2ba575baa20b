"""Budgets as papers state them: image tokens ENTERING a layer, averaged over the layers.

`average=192` is no setting of a method that acts inside the decoder, it is a result: with 32 layers
and 576 tokens FastV at layer 2 reaches it by keeping 166. Such methods are `Budgeted` (base.py),
and solve it before anything runs. What came of it can be counted from a report's
`image_tokens_entering`, here in two ways: as above, and as SparseVLM's released counter does, which
counts a layer whose output is pruned as if its input had been.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence


def entering(layers: Sequence[Sequence[int]]) -> list[float]:
    """Average over layers of the image tokens entering them: counts [layer][b] -> [b]."""
    return [sum(counts) / len(counts) for counts in zip(*layers, strict=True)]


def leaving(layers: Sequence[Sequence[int]]) -> list[float]:
    """The same for the tokens that leave a layer for the next: SparseVLM's own counter."""
    return entering([*layers[1:], layers[-1]])


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
