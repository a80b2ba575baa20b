"""HoloV: a budget for each stretch of the picture, spent on what the class token attends to.

Zou et al., NeurIPS 2025, arXiv 2510.02912. Released code: obananas/HoloV 1d2e65e,
llava/model/utils.py, function HoloV. After the projector, before layer 0: the tokens are cut into
16 runs of equal length (36 tokens, one and a half rows of the picture: not squares). A token's
score is 1000 a + 0.09 v, with a the class token's attention in the second last block (mean over
heads) and v the variance of its cosines to its run, scaled so that its mean over the run is that of
1000 a; a run's score is the mean. (So it is very nearly 1.09 times the mean of 1000 a: the variance
cancels.) Budget by share of the scores, rounded down, what is left one each to the largest shares;
within a run by attention alone.

As released: tokens of a run stand by falling attention (all of a run: in reading order), and what
a run's budget exceeds its length by is not given to others but filled up with rows of zeros at the
end. Numbered anew. Deviations: the released code hard-codes T = 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, Stage, top
from .shared import RELEASED_TOO, Budget, attention, second_last

RUNS = 16
ALPHA, SCALE, TINY = 0.09, 1e3, 1e-6


def lengths(n: int) -> list[int]:
    """n tokens in runs: the first n % 16 are one longer; none is empty."""
    return [size for i in range(RUNS) if (size := n // RUNS + (i < n % RUNS))]


def run_score(features: Tensor, score: Tensor) -> Tensor:
    """Of one run: features (m, D), attention (m,) -> its score, a scalar."""
    m = len(features)
    if m == 1:
        return score.mean()
    unit = features / (features.norm(dim=1, keepdim=True) + TINY)
    alike = (unit @ unit.T).fill_diagonal_(0.0)  # (m, m)
    mean = alike.sum(1, keepdim=True) / (m - 1)
    spread = (alike - mean).square().sum(1) / (m - 1)  # (m,), its own 0 counted as released
    scaled = score * SCALE
    spread = spread * (scaled.abs().mean() / (spread.abs().mean() + TINY))
    return (scaled + ALPHA * spread).mean()


def budgets(scores: Tensor, keep: int) -> list[int]:
    """Tokens for each run by its share of the scores (r,)."""
    shares = scores / (scores.sum() + TINY)
    given = (shares * keep).floor().long()
    given[top(shares, keep - int(given.sum()), "HoloV's runs")] += 1
    return given.tolist()


@dataclass(frozen=True)
class HoloV(Budget):
    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, NeurIPS 2025, arXiv 2510.02912"
    source: ClassVar[str] = "obananas/HoloV 1d2e65e, llava/model/utils.py"
    acts: ClassVar[str] = "after the projector, before layer 0"
    checked: ClassVar[str] = RELEASED_TOO
    identity: ClassVar[str | None] = None
    drops_only: ClassVar[bool] = False
    stage: ClassVar[Stage] = "embed"

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last(self.name, n_layers),)

    def choose(self, c: Context) -> Keep:
        features, keep = c.features(), self.amount(c.total)
        score, device = attention(c, -2), c.patches.device
        sizes = lengths(len(features))
        parts = list(zip(features.float().split(sizes), score.split(sizes), strict=True))
        given = budgets(torch.stack([run_score(*part) for part in parts]), keep)
        kept, start = [], 0
        for (_, part), m, want in zip(parts, sizes, given, strict=True):
            best = top(part, want, c.what) if want < m else torch.arange(m, device=device)
            kept.append(start + best)
            start += m
        index = torch.cat(kept)
        zeros = features.new_zeros(keep - len(index), features.shape[1])
        return Keep(index, extra=zeros if len(zeros) else None, ordered=True)
