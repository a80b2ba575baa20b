"""DART: drop the image tokens that repeat a few pivots.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More", EMNLP 2025, arXiv 2502.11494. Released code (read in the fork xqy1111111/DART 0247657):
modeling_llama_self.py, get_retained_image_token. Pivots are the 4 image tokens and the 4 text rows
behind the image with the largest L1 norm of the previous layer's rotated keys, all heads together.
Each pivot in turn takes in the keep // 8 image tokens that resemble it LEAST, by the cosine of the
rows that enter layer K after the model's final norm; what is taken is out of the pool. So
4 + 8 * (keep // 8) tokens stay: 196, 132, 68 for keep=192, 128, 64, and those are the released
settings under these names. No attention is read.

The turn of the pivots matters, and in the released code it is the order in which CPython walks a
set of their row numbers: its hash table of 32 places, so by number modulo 32 unless two collide.
We walk the same set.

Deviations: keep=0 keeps nothing; where the pool runs out (keep=1.0) everything stays, which the
released code cannot do. With fewer than 4 rows of either kind there are fewer pivots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .average import check_after_first
from .base import Budgeted, Context, Keep, Stage, check_amount, check_keep, count, top

PIVOTS = 4  # of either kind


def pivots(keys: Tensor, rows: Tensor, what: str) -> list[int]:
    """Those of `rows` whose keys, out of (S, Hkv, Dh), have the largest L1 norm, largest first."""
    norms = keys[rows].flatten(1).float().abs().sum(1)
    return rows[top(norms, PIVOTS, what)].tolist()


def dart_rows(x: Tensor, image: Tensor, heads: list[int], text: list[int], each: int) -> Tensor:
    """Rows that stay out of `image` (n,), x (S, D) being all rows: the pivots `heads` of the image
    and what they and the pivots in the text take in, `each` a turn."""
    free = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    free[image] = True
    free[heads] = False
    for pivot in set(heads + text):
        pool = free.nonzero()[:, 0]  # (p,) ascending
        alike = F.cosine_similarity(x[pivot], x[pool], dim=-1)
        free[pool[top(-alike, each, "DART's pool")]] = False
    return image[~free[image]]


@dataclass(frozen=True)
class DART(Budgeted):
    keep: float = field(
        default=128, metadata={"help": "number or share kept, before the rounding to 4 + 8 m"}
    )
    layer: int = field(default=2, metadata={"help": "the layer whose input is pruned"})

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "DART, EMNLP 2025, arXiv 2502.11494"
    source: ClassVar[str] = "xqy1111111/DART 0247657, modeling_llama_self.py"
    acts: ClassVar[str] = "input of decoder layer K"
    checked: ClassVar[str] = (
        "the released function, transcribed, on 210 random draws; a reference in the tests"
    )
    identity: ClassVar[str | None] = "keep=1.0"
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("keep", "average")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.name, self.keep)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("decoder", self.layer),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        check_after_first(self.name, self.layer)
        check_keep(self.name, self.keep, n_tokens)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        k = count(self.keep, n_tokens)
        return (min(n_tokens, PIVOTS + 2 * PIVOTS * (k // (2 * PIVOTS))) if k else 0,)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[tuple[str, DART]]:
        for k in (1, *range(2 * PIVOTS, n_tokens + 1, 2 * PIVOTS)):  # 1: the pivots alone
            yield f"keep={k}", replace(self, average=None, keep=k)

    def choose(self, c: Context) -> Keep:
        d, k = c.decoder, count(self.keep, c.total)
        assert d is not None
        if not k:
            return Keep(c.patches.new_empty(0))
        if self.left(c.total)[0] >= len(d.rows):
            return Keep(torch.arange(len(d.rows), device=d.rows.device))
        keys, x = d.keys(), d.final_norm(d.hidden()).float()
        heads, text = pivots(keys, d.rows, c.what), pivots(keys, d.text_rows, c.what)
        stay = dart_rows(x, d.rows, heads, text, k // (2 * PIVOTS))
        return Keep(torch.searchsorted(d.rows, stay))
