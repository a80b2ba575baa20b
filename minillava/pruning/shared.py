"""What methods share that look at the vision tower, or keep a fixed number of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Context, Method, Stage, check_amount, count

RELEASED_TOO = "the released function, transcribed, on random draws; a reference in the tests"


@dataclass(frozen=True)
class Budget(Method):
    """A method before the decoder that leaves `keep` tokens of every image."""

    keep: float = field(metadata={"help": "number or share kept"})

    identity: ClassVar[str | None] = "keep=1.0"
    numbering: ClassVar[str] = "compact"
    stage: ClassVar[Stage] = "vision"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.name, self.keep)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return ((self.stage, 0),)

    def amount(self, total: int) -> int:
        return count(self.keep, total)

    def most(self, n_tokens: int) -> int:
        return self.amount(n_tokens)


def second_last(name: str, depth: int) -> int:
    """Number of the tower's second last block, whose output LLaVA-1.5 reads."""
    if depth < 2:
        raise ValueError(f"{name} reads the vision tower's second last block, but it has one only")
    return depth - 2


def block_number(name: str, block: int | None, depth: int, released: int) -> int:
    """The block of an option; None: the released one of 24, or the same share of another depth."""
    default = released * depth // 24
    if block is None:
        return default
    if not 0 <= block < depth:
        raise ValueError(
            f"{name}: block={block}, but the vision tower has blocks 0 to {depth - 1}; "
            f"leave it out for block={default}"
        )
    return block


def attention(c: Context, block: int, query: Literal["class", "mean"] = "class") -> Tensor:
    """Attention that the candidates receive in a block of the tower (below 0: from its end), from
    the class token or as mean over all tokens; mean over heads (n,)."""
    return c.vision().attention(block % depth(c), query).mean(0)[patches(c)]


def depth(c: Context) -> int:
    """Blocks of the vision tower."""
    return len(c.vision().tower.blocks)


def patches(c: Context) -> Tensor:
    """Numbers (n,) of the candidates' patches; rows without a patch cannot be ranked by them."""
    if (c.patches < 0).any():
        raise ValueError(
            f"{c.what}: an earlier method left rows that are no patch, which this one cannot rank; "
            "put the method that merges last"
        )
    return c.patches


def whole_grid(c: Context, name: str) -> None:
    """Refuse to run where patches are missing."""
    if len(c.patches) != c.total:
        raise ValueError(
            f"{name} needs every patch of the image, {len(c.patches)} of {c.total} are left; "
            f"put {name} first in the plan"
        )


def assigned(into: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Which of n rows go into which of k: (k, n) of 0 and 1.

    Its product with the rows is their sums, in one order of addition (CUDA's index_add has none).
    """
    return F.one_hot(into, k).T.to(dtype)


def cosines(a: Tensor, b: Tensor, what: str) -> Tensor:
    """Rows (n, C) against rows (m, C): (n, m), float32. NaN is refused."""
    result = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T
    if result.isnan().any():
        raise ValueError(f"NaN among the rows of {what}: the weights or the input are broken")
    return result
