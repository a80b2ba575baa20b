"""PyramidDrop: drop image tokens in stages, each ranked by the attention of the coming layer.

Xing et al., CVPR 2025, arXiv 2410.17247. Released code (Cooperx521/PyramidDrop 6444f30):
modeling_llama_pdrop.py, pdrop_rank_drop. Before layer r the queries and keys of layer r itself are
computed from the rows that enter it. The attention of the newest row, mean over heads, ranks the
image tokens that are left, and int(N * ratio) of the ORIGINAL number N stay. Positions are
renumbered after every stage, and the position of a new token in a layer is the number of rows that
this layer's cache holds.

Deviations: any number of images and samples, each ranked by itself. Ratios for fewer tokens than
the default were never published; `average=` searches ratios q, q^2, q^3, ..., of which the default
is q = 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .base import Context, Keep, option, top
from .shared import AtLayers, midpoints


@dataclass(frozen=True)
class PyramidDrop(AtLayers):
    layers: tuple[int, ...] = option((8, 16, 24), help="layers whose input is pruned")
    ratios: tuple[float, ...] = option(
        (0.5, 0.25, 0.125), low=0.0, high=1.0, help="share of the original tokens left at each"
    )

    name, identity, newest_row = "pyramiddrop", "layers=1/2,ratios=1.0/1.0", True
    numbering, strength = "compact", "ratios"

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.ratios, reverse=True) != list(self.ratios):
            raise ValueError(
                f"pyramiddrop: ratios={'/'.join(map(str, self.ratios))} are shares of the original "
                "tokens left: from 0.0 to 1.0, none larger than the one before"
            )

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return tuple(int(n_tokens * ratio) for ratio in self.ratios)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[PyramidDrop]:
        # int(n_tokens * q^i) changes where q is the i-th root of a share
        powers = range(1, len(self.layers) + 1)
        roots = ((k / n_tokens) ** (1 / i) for i in powers for k in range(1, n_tokens + 1))
        for q in (*midpoints(roots), 1.0):
            yield replace(self, ratios=tuple(q**i for i in powers))

    def choose(self, c: Context) -> Keep:
        score = c.attention(c.newest, layer=0).mean(0)  # (H, n) -> (n,)
        return Keep(top(score, self.left(c.n_tokens)[c.stage_index], c.where), scores=score)
