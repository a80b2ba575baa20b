"""PyramidDrop: drop image tokens in stages, each ranked by the layer about to run.

Xing et al., CVPR 2025, arXiv 2410.17247. Released code (Cooperx521/PyramidDrop 6444f30):
modeling_llama_pdrop.py, pdrop_rank_drop. Before layer r the queries and keys of layer r itself are
computed from the rows that enter it; the newest row's attention, averaged over heads, ranks the
image tokens that are left; int(N * ratio) of the ORIGINAL count N stay. Positions are renumbered
after every stage, and a new token's position in a layer is that layer's own length.

Deviations: any number of images and samples, each ranked by itself. Lists for budgets below the
default were never published; `average=` searches ratios q, q^2, q^3, ..., of which the default is
q = 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from .average import between, check_ascending, check_stages
from .base import Budgeted, Context, Keep, Stage, top


def pyramiddrop_score(attention: Tensor) -> Tensor:
    """Attention (H, S) of the newest row in the coming layer -> one score per row (S,)."""
    return attention.mean(0)


@dataclass(frozen=True)
class PyramidDrop(Budgeted):
    layers: tuple[int, ...] = field(
        default=(8, 16, 24), metadata={"help": "layers whose input is pruned"}
    )
    ratios: tuple[float, ...] = field(
        default=(0.5, 0.25, 0.125), metadata={"help": "share of the original tokens left at each"}
    )

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop, CVPR 2025, arXiv 2410.17247"
    source: ClassVar[str] = "Cooperx521/PyramidDrop 6444f30, modeling_llama_pdrop.py"
    acts: ClassVar[str] = "input of several decoder layers"
    checked: ClassVar[str] = "outputs of the released code, four runs (tests/goldens/pyramiddrop)"
    identity: ClassVar[str | None] = "layers=1/2,ratios=1.0/1.0"
    newest_row: ClassVar[bool] = True
    numbering: ClassVar[str] = "compact"
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("ratios", "average")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average is not None:  # sets the ratios, as many as there are layers
            check_ascending(self.name, self.layers)
            return
        check_stages(self.name, self.layers, self.ratios, "ratios")
        if any(not 0 <= r <= 1 for r in self.ratios) or sorted(self.ratios)[::-1] != [*self.ratios]:
            raise ValueError(
                f"pyramiddrop: ratios={'/'.join(map(str, self.ratios))} are shares of the original "
                "tokens left: from 0.0 to 1.0, none larger than the one before"
            )

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return tuple(("decoder", layer) for layer in self.layers)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return tuple(int(n_tokens * ratio) for ratio in self.ratios)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[tuple[str, PyramidDrop]]:
        # int(n_tokens * q^i) changes where q is the i-th root of a share
        stages = range(1, len(self.layers) + 1)
        roots = ((k / n_tokens) ** (1 / i) for i in stages for k in range(1, n_tokens + 1))
        for q in (*between(roots), 1.0):
            ratios = tuple(q**i for i in stages)
            text = f"ratios={'/'.join(f'{r:.4f}' for r in ratios)}"
            yield text, replace(self, average=None, ratios=ratios)

    def choose(self, c: Context) -> Keep:
        assert c.decoder is not None
        score = pyramiddrop_score(c.decoder.attention(c.decoder.newest, layer=0))  # (S,)
        return Keep(top(score[c.decoder.rows], self.left(c.total)[c.part], c.what))
