"""HoloV: divide the budget among runs of tokens, and spend it on what the class token attends to.

Zou et al., NeurIPS 2025, arXiv 2510.02912. Released code: obananas/HoloV 1d2e65e,
llava/model/utils.py, function HoloV. After the projector, before layer 0, the tokens are cut into
16 runs of equal length (36 tokens, one and a half rows of the image: not squares). A token's score
is 1000 a + 0.09 v, where a is the class token's attention to it in the second-last block, mean over
heads, and v is the variance of its cosines to its run, scaled so that its mean over the run is that
of 1000 a. A run's score is the mean (very nearly 1.09 times the mean of 1000 a: the variance
cancels). Each run gets its share of `keep` by score, rounded down; what is left over goes one each
to the largest shares. Within a run the attention alone ranks. Rows are renumbered.

As released, the tokens of a run stand by descending attention (in reading order if the whole run
stays), and the part of a budget that exceeds the run's length is not given to other runs: rows of
zeros at the end make up the number. Deviation: the released code hard-codes T = 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Keep, top
from .margins import TINY, lead, least
from .shared import ByClassToken

RUNS = 16
ALPHA, SCALE, SMALL = 0.09, 1e3, 1e-6


def run_lengths(n: int) -> list[int]:
    """Lengths of the runs of n tokens: the first n % 16 are longer by one, and none is empty."""
    return [size for i in range(RUNS) if (size := n // RUNS + (i < n % RUNS))]


def run_score(features: Tensor, attention: Tensor) -> Tensor:
    """Score () of one run, from features (m, D) and attention (m,)."""
    m = len(features)
    if m == 1:
        return attention.mean()
    unit = features / (features.norm(dim=1, keepdim=True) + SMALL)
    cosine = (unit @ unit.T).fill_diagonal_(0.0)  # (m, m)
    mean = cosine.sum(1, keepdim=True) / (m - 1)
    variance = (cosine - mean).square().sum(1) / (m - 1)  # (m,), with the diagonal, as released
    scaled = attention * SCALE
    variance = variance * (scaled.abs().mean() / (variance.abs().mean() + SMALL))
    return (scaled + ALPHA * variance).mean()


def run_budgets(scores: Tensor, keep: int) -> tuple[list[int], Tensor]:
    """Number of tokens for each run, `keep` in all, by its share of the scores (r,); and how near
    this division is to another, see lead()."""
    shares = scores / (scores.sum() + SMALL)
    tokens = shares * keep  # (r,)
    budgets = tokens.floor().long()
    over = keep - int(budgets.sum())
    budgets[top(shares, over, "HoloV's runs")] += 1
    from_whole = ((tokens - tokens.round()).abs() / tokens.clamp(min=TINY)).amin()
    return budgets.tolist(), least(from_whole, lead(shares, over))


@dataclass(frozen=True)
class HoloV(ByClassToken):
    name, identity, drops_only = "holov", None, False
    stage, adds_rows = "embed", True

    def choose(self, c: Context) -> Keep:
        features, attention = c.features(), c.vision_attention(-2).mean(0)  # (n, D), (n,)
        (keep,), sizes = self.left(c.n_tokens), run_lengths(len(features))
        runs = list(zip(features.float().split(sizes), attention.split(sizes), strict=True))
        scores = torch.stack([run_score(*run) for run in runs])
        attention, scores = torch.cat((attention, scores)).cpu().split((len(attention), len(runs)))
        (budgets, closest), kept, leads, start = run_budgets(scores, keep), [], [], 0
        for score, m, budget in zip(attention.split(sizes), sizes, budgets, strict=True):
            leads.append(lead(score, min(budget, m)))
            kept.append(start + (top(score, budget, c.where) if budget < m else torch.arange(m)))
            start += m
        index = torch.cat(kept)
        zeros = features.new_zeros(keep - len(index), features.shape[1])
        return Keep(
            index,
            extra=zeros if len(zeros) else None,
            ordered=True,
            scores=attention,
            closest=least(closest, *leads),
        )
