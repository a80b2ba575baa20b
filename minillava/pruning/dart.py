"""DART: drop the image tokens that duplicate a few pivot tokens.

Wen et al., EMNLP 2025, arXiv 2502.11494; fork xqy1111111/DART 0247657, modeling_llama_self.py. The
pivots are 4 image tokens and 4 text tokens after the image: those whose rotated keys in layer K-1
have the largest L1 norm, over all heads together. They take turns, in the order of a Python set of
their row numbers, as released, which changes the result. Each retains the keep // 8 image tokens
that resemble it LEAST: by the cosine of the rows that enter layer K, after the final norm. So
4 + 8 * (keep // 8) tokens stay.

Deviations: keep=0 keeps nothing; a pool that is too small stays whole, where the released code
fails; with fewer than 4 rows of either kind there are fewer pivots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..rows import take_rows
from .base import Context, Keep, amount, count, option, top
from .margins import COSINE, lead, least
from .shared import AtLayer

PIVOTS = 4  # among the image tokens, and as many among the text tokens


@dataclass(frozen=True)
class DART(AtLayer):
    keep: float = amount(128, help="number or share kept, before it is rounded to 4 + 8 m")
    layer: int = option(2, low=1, help="layer whose input is pruned; it needs one before it")

    name, identity = "dart", "keep=1.0"

    def left(self, n_tokens: int) -> tuple[int, ...]:
        each = count(self.keep, n_tokens) // (2 * PIVOTS)
        return (min(n_tokens, PIVOTS + 2 * PIVOTS * each) if self.keep else 0,)

    def choose(self, c: Context) -> Keep:
        k, n = self.left(c.n_tokens)[0], len(c.candidates)
        if not 0 < k < n:
            return Keep(torch.arange(n)[:k])
        norms = c.keys().flatten(1).float().abs().sum(1).cpu()  # (S,)
        pools = c.candidates, c.text_rows
        image, text = (rows[top(norms[rows], PIVOTS, c.where)].tolist() for rows in pools)
        x = c.model.llama.norm(c.sequence()).float()  # (S, D)
        rows = take_rows(x, c.candidates)  # (n, D)
        unlike = [-F.cosine_similarity(x[pivot], rows, dim=-1) for pivot in {*image, *text}]
        kept = torch.cat([(c.candidates == pivot).nonzero()[:, 0] for pivot in image])
        each, leads = k // (2 * PIVOTS), [lead(norms[rows], PIVOTS) for rows in pools]
        for score in torch.stack(unlike).cpu():  # (n,); a GPU is waited for once, not at every turn
            score[kept] = -torch.inf
            kept = torch.cat((kept, top(score, each, c.where)))
            leads.append(lead(score, each, scale=COSINE))
        return Keep(kept, order=kept, closest=least(*leads))
