"""FitPrune: drop a fitted number of image tokens behind every layer's attention.

Ye et al., "Fit and Prune", AAAI 2025, arXiv 2409.10197. Released code (ywh187/FitPrune d28e418):
LLaVA_1.5/.../modeling_llama.py. In layer l, with a(i, j) the largest weight over heads: an image
token's score is the sum of a over image rows times the sum over the text rows behind the image; the
lowest `delete[l]` are dropped between the layer's attention and its MLP. Nobody reads a dropped
row's MLP, so it is the same to drop at the input of layer l + 1, which is what happens here.
Positions stay; the layer's cache still holds what it dropped.

The tables say how many to drop where, for 10 to 90 % fewer FLOPs. They were fitted on 65 samples
(0.01 % of the 665K instruction mix) for LLaVA-1.5-7B with 576 tokens and are refused elsewhere;
`python -m eval.fit fitprune` fits a `delete` list for another model by the released recipe.

Deviations: any number of images and text anywhere; ties by index, where the released sort leaves
them open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from .base import Budgeted, Context, Keep, Stage, top

N_TOKENS = 576

# Percent of FLOPs saved -> tokens dropped behind the attention of layers 0 to 31 (LLaVA-1.5-7B).
TABLES: Mapping[int, tuple[int, ...]] = {
    10: (
        *(0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0),
        *(1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1, 0, 0),
    ),
    20: (
        *(0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0),
        *(6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0),
    ),
    30: (
        *(0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0),
        *(16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4, 0, 0, 0),
    ),
    40: (
        *(0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1),
        *(26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    ),
    50: (
        *(3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2),
        *(30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    ),
    55: (
        *(6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2),
        *(29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    ),
    60: (
        *(14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4),
        *(26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    ),
    70: (
        *(48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8),
        *(18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    ),
    80: (
        *(128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8),
        *(7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    ),
    90: (
        *(262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1),
        *(1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
    ),
}


def fitprune_score(by_image: Tensor, by_text: Tensor) -> Tensor:
    """Attention (S,) that rows receive from image and from text, largest head -> score (S,)."""
    return by_image * by_text


@dataclass(frozen=True)
class FitPrune(Budgeted):
    budget: int = field(default=60, metadata={"help": "percent of FLOPs saved, by the 7B tables"})
    delete: tuple[int, ...] | None = field(
        default=None, metadata={"help": "tokens dropped behind each layer, instead of a table"}
    )

    name: ClassVar[str] = "fitprune"
    paper: ClassVar[str] = "FitPrune, AAAI 2025, arXiv 2409.10197"
    source: ClassVar[str] = "ywh187/FitPrune d28e418, LLaVA_1.5 modeling_llama.py"
    acts: ClassVar[str] = "behind the attention of most decoder layers"
    checked: ClassVar[str] = (
        "the released function, transcribed, on 210 random draws; a reference in the tests"
    )
    identity: ClassVar[str | None] = "budget=0"
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("budget", "delete", "average")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in (0, *TABLES):
            known = ", ".join(map(str, (0, *TABLES)))
            raise ValueError(f"fitprune: budget={self.budget}, but there are tables for {known}")
        if self.delete is not None and min(self.delete) < 0:
            raise ValueError(f"fitprune: delete has {min(self.delete)}; counts are 0 or more")

    @property
    def table(self) -> tuple[int, ...]:
        return self.delete if self.delete is not None else TABLES.get(self.budget, ())

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        behind = [layer for layer, n in enumerate(self.table) if n]
        # a budget of 0 still acts once, and drops nothing
        return tuple(("decoder", layer + 1) for layer in behind or [0])

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        tokens = n_tokens // len(starts) if self.scope == "all" else n_tokens
        if self.delete is None and self.budget and (n_layers, tokens) != (32, N_TOKENS):
            raise ValueError(
                f"fitprune: budget={self.budget} was fitted for 32 layers and {N_TOKENS} image "
                f"tokens, this model has {n_layers} and {tokens}; fit delete= for it "
                "(python -m eval.fit fitprune)"
            )
        if self.delete is not None and (len(self.delete) != n_layers or self.delete[-1]):
            raise ValueError(
                f"fitprune: delete has {len(self.delete)} counts, but must have one for each of "
                f"the {n_layers} layers, the last 0 (nothing reads what it drops)"
            )
        if sum(self.table) > tokens:
            raise ValueError(
                f"fitprune: delete drops {sum(self.table)} of {tokens} image tokens; drop fewer"
            )
        super().check(n_layers, n_tokens, starts)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        counts = [n for n in self.table if n] or [0]
        return tuple(n_tokens - sum(counts[: i + 1]) for i in range(len(counts)))

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[tuple[str, FitPrune]]:
        for budget in (0, *TABLES) if (n_layers, n_tokens) == (32, N_TOKENS) else (0,):
            yield f"budget={budget}", replace(self, average=None, budget=budget)

    def choose(self, c: Context) -> Keep:
        d = c.decoder
        assert d is not None
        n_dropped = ([n for n in self.table if n] or [0])[c.part] * (c.total // c.grid**2)
        score = fitprune_score(d.strongest(d.rows), d.strongest(d.text_rows))  # (S,)
        return Keep(top(score[d.rows], max(0, len(d.rows) - n_dropped), c.what))
