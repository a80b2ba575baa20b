"""Averages as papers state them: image tokens per decoder layer, from a report's counts.

`average=192` means image tokens ENTERING a layer, averaged over the layers: for FastV at layer 2 of
32 with 576 tokens it is reached by keep=166. minillava/request.py solves it. SparseVLM's released
counter differs: it counts a layer whose output is pruned as if its input had been.
"""

from __future__ import annotations

from collections.abc import Sequence


def entering(layers: Sequence[Sequence[int]]) -> list[float]:
    """Average over layers of the image tokens that enter them: counts [layer][b] -> [b]."""
    return [sum(counts) / len(counts) for counts in zip(*layers, strict=True)]


def leaving(layers: Sequence[Sequence[int]]) -> list[float]:
    """The same for the tokens that leave a layer for the next: SparseVLM's own counter."""
    return entering([*layers[1:], layers[-1]])
