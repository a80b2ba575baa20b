"""What several methods share: acting before the decoder, blocks of the vision tower, merging."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Context, Method, Stage, Stages, amount, count


@dataclass(frozen=True)
class BeforeDecoder(Method):
    """A method that keeps `keep` tokens of every image, once, before the decoder."""

    keep: float = amount()

    identity: ClassVar[str | None] = "keep=1.0"
    numbering = "compact"
    stage: ClassVar[Stage] = "vision"

    def stages(self) -> Stages:
        return ((self.stage, 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count(self.keep, n_tokens),)


# ---------------------------------------------------------------- the vision tower


def second_last_block(name: str, n_blocks: int) -> int:
    """Number of the tower's second-last block, whose output LLaVA-1.5 reads: 22 of 0..23."""
    if n_blocks < 2:
        raise ValueError(f"{name} reads the vision tower's second last block, but it has one only")
    return n_blocks - 2


def block_number(name: str, block: int | None, n_blocks: int, released: int) -> int:
    """The block that an option names; None: the released one of 24, or the same share of others."""
    default = released * n_blocks // 24
    if block is None:
        return default
    if not 0 <= block < n_blocks:
        raise ValueError(
            f"{name}: block={block}, but the vision tower has blocks 0 to {n_blocks - 1}; "
            f"leave it out for block={default}"
        )
    return block


def check_whole_grid(c: Context, name: str) -> None:
    """Raise ValueError if patches of the image are missing."""
    if len(c.candidates) != c.n_tokens:
        raise ValueError(
            f"{name} needs every patch of the image, {len(c.candidates)} of {c.n_tokens} are left; "
            f"put {name} first in the plan"
        )


# ---------------------------------------------------------------- merging


def assignment(into: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Which of n rows go into which of k: (k, n) of 0 and 1, from into (n,).

    Its product with the rows is their sums, always added in the same order (CUDA's index_add is
    not deterministic).
    """
    return F.one_hot(into, k).T.to(dtype)


def cosines(a: Tensor, b: Tensor, where: str) -> Tensor:
    """Cosine similarity of rows (n, C) and rows (m, C): (n, m), float32. Refuses NaN."""
    result = unchecked_cosines(a, b)
    refuse_nan(result, where)
    return result


def unchecked_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The same, for a method that compares rows in many blocks and refuses NaN once, at the end."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def refuse_nan(x: Tensor, where: str) -> None:
    if x.isnan().any():
        raise ValueError(f"NaN among the rows of {where}: the weights or the input are broken")


# ---------------------------------------------------------------- several decoder layers


def check_ascending(name: str, layers: Sequence[int]) -> None:
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{name}: layers={'/'.join(map(str, layers))} must ascend")


def check_lists(name: str, layers: Sequence[int], values: Sequence[float], option: str) -> None:
    """Raise ValueError for lists that are not one value for each of some ascending layers."""
    said = "/".join(map(str, layers))
    if len(layers) != len(values):
        raise ValueError(
            f"{name}: layers={said} are {len(layers)}, but {option}="
            f"{'/'.join(map(str, values))} are {len(values)}; give one for each layer"
        )
    check_ascending(name, layers)


def midpoints(jumps: Iterable[float]) -> Iterator[float]:
    """A number between any two neighbours: every value of what changes only at these jumps."""
    return ((a + b) / 2 for a, b in pairwise(sorted(set(jumps))))
