"""FitPrune: drop a fitted number of image tokens after every layer's attention.

Ye et al., "Fit and Prune", AAAI 2025, arXiv 2409.10197. Released code (ywh187/FitPrune d28e418):
LLaVA_1.5/.../modeling_llama.py. Let a(i, j) be the attention weight from row i to image token j in
layer l, the largest over the heads. The score of j is the sum of a(i, j) over the image tokens i,
times the sum over the text tokens i after the image. The `delete[l]` tokens with the lowest scores
are dropped between the attention and the MLP of layer l. Nothing reads the MLP output of a dropped
token, so dropping at the input of layer l + 1, as here, gives the same result. Positions stay, and
the cache of layer l still holds the tokens that it dropped.

The tables (fitprune_tables.py) say how many tokens to drop at each layer for 10 to 90 % fewer
FLOPs. They hold for LLaVA-1.5-7B with 576 tokens and are refused elsewhere; for another model
`python -m eval.fit fitprune` fits a `delete` list by the released recipe.

Deviations: any number of images, and text anywhere. Of equal scores the lower index stays; the
released sort leaves this open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .base import Context, Keep, Method, Stages, option, top
from .fitprune_tables import N_TOKENS, TABLES


def strongest(c: Context, rows: Tensor) -> Tensor:
    """Attention of the strongest head that each candidate receives from `rows`, their sum: (n,)."""
    total = torch.zeros(len(c.candidates), device=c.model.device)
    for weights in c.attention_by_row(rows):  # (H, b, n)
        total += weights.amax(0).sum(0)
    return total


@dataclass(frozen=True)
class FitPrune(Method):
    budget: int = option(60, help="percent of FLOPs saved, by the 7B tables")
    delete: tuple[int, ...] | None = option(
        None, low=0, instead_of=("budget",), help="tokens dropped after each layer"
    )

    name, identity, strength = "fitprune", "budget=0", "budget"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in (0, *TABLES):
            known = ", ".join(map(str, (0, *TABLES)))
            raise ValueError(f"fitprune: budget={self.budget}, but there are tables for {known}")

    @property
    def drops(self) -> dict[int, int]:
        """Layer whose input is pruned -> tokens dropped there. {1: 0}: none are dropped at all."""
        table = TABLES.get(self.budget, ()) if self.delete is None else self.delete
        return {layer + 1: n for layer, n in enumerate(table) if n} or {1: 0}

    def stages(self) -> Stages:
        return tuple(("decoder", layer) for layer in self.drops)

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
        if (dropped := sum(self.drops.values())) > tokens:
            raise ValueError(
                f"fitprune: delete drops {dropped} of {tokens} image tokens; drop fewer"
            )
        super().check(n_layers, n_tokens, starts)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return tuple(n_tokens - dropped for dropped in accumulate(self.drops.values()))

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[FitPrune]:
        for budget in (0, *TABLES) if (n_layers, n_tokens) == (32, N_TOKENS) else (0,):
            yield replace(self, budget=budget)

    def choose(self, c: Context) -> Keep:
        by_image, by_text = strongest(c, c.candidates), strongest(c, c.text_rows)  # (n,) each
        images = c.n_tokens // c.grid**2
        n_dropped = list(self.drops.values())[c.stage_index] * images
        score = by_image * by_text  # (n,)
        return Keep(top(score, max(0, len(score) - n_dropped), c.where), scores=score)
