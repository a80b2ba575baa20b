"""PruneSID: group patches by principal directions, and thin out what looks alike in each group.

Fang et al., ICLR 2026, arXiv 2603.09480. Released code: ZhengyaoFang/PruneSID 4ef17d9, prunesid/
prunesid_llava/clip_encoder.py. Between vision tower and projector, T = keep rows stay: the class
token, first, and T - 1 patches.
1. The sigmoid of the features gives T // 4 principal directions over the patches (torch's
   pca_lowrank, which starts at random). A patch belongs to the direction where it weighs most.
2. In each group the patch with the most attention from the class token in the second-last block
   (sum over heads) wins, and all that resemble it more than T / 32 times the mean cosine of all
   patches leave the race; then the best of the rest, and so on. The group's order is its winners,
   then the others by attention. With T / 32 times the mean above 1 everybody wins.
3. Every group gets one place, and the rest by its share of all winners, at most 5 ceil(T / 64) and
   not more than it has winners, unless these bounds leave less than T. What is missing is filled up
   in the groups with the most winners.
The order is group after group, each in its own order, not that of the grid. Rows are renumbered.
`seed` draws the start as after torch.manual_seed(seed), anew for every image.

Deviations: scores are float32. The paper's dynamic budget (-Dyn) is not in the released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from ..llava import LLaVA
from ..rows import on_device
from .base import Context, Keep, count, option, top
from .margins import UNKNOWN
from .shared import ByClassToken, cosines


def principal_directions(x: Tensor, q: int, generator: torch.Generator) -> Tensor:
    """The q first principal directions (n, q) of x (C, n), by two rounds of subspace iteration."""
    x = x - x.mean(0)
    tall = x if len(x) >= x.shape[1] else x.T
    start = on_device(torch.randn(tall.shape[1], q, generator=generator, dtype=x.dtype), x)
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis).Q).Q
    left, _, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    return right.T if tall is x else basis @ left


def order_groups(
    score: Tensor, groups: list[int], alike: Tensor, q: int, where: str
) -> tuple[list[list[int]], list[int]]:
    """The patches of each group in its order, and how many of these are winners. score (n,) and
    alike (n, n), which says whose resemblance is above the limit, are on the CPU."""
    winners: list[list[int]] = [[] for _ in range(q)]
    others: list[list[int]] = [[] for _ in range(q)]
    for j in top(score, len(score), where).tolist():
        g = groups[j]
        beaten = bool(alike[j, winners[g]].any())
        (others if beaten else winners)[g].append(j)
    return [a + b for a, b in zip(winners, others, strict=True)], [len(w) for w in winners]


def group_quotas(sizes: list[int], winners: list[int], keep: int) -> list[int]:
    """How many patches each group keeps, keep - 1 in all."""
    low = [min(1, n) for n in sizes]
    high = [min(5 * ceil(keep / 64), *pair) for pair in zip(sizes, winners, strict=True)]
    while sum(high) < keep:
        high = [min(h + 1, n) for h, n in zip(high, sizes, strict=True)]
    n_won, other = torch.tensor(winners), max(0, keep - 1 - sum(low))
    ends = ((n_won / n_won.sum()).cumsum(0) * other).round().int()  # float32, half to even
    quotas = (ends.diff(prepend=ends.new_zeros(1)) + torch.tensor(low)).tolist()
    quotas = [min(a, h) for a, h in zip(quotas, high, strict=True)]
    for g in sorted(range(len(quotas)), key=lambda g: -winners[g]):
        quotas[g] += min(high[g] - quotas[g], other + sum(low) - sum(quotas))
    return quotas


@dataclass(frozen=True)
class PruneSID(ByClassToken):
    seed: int | None = option(None, low=0, help="of the random start; unset: the sample's own")

    name, drops_only, adds_rows = "prunesid", False, True
    identity: ClassVar[str | None] = None

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if (keep := count(self.keep, n_tokens)) < 4:
            raise ValueError(
                f"prunesid: keep={self.keep} is {keep} rows with the class token; give at least 4, "
                "for one group"
            )

    def check_model(self, model: LLaVA) -> None:
        vision = model.config.vision
        q, C = count(self.keep, vision.num_patches) // 4, vision.hidden_size
        if q > C:
            raise ValueError(
                f"prunesid: keep={self.keep} needs {q} groups, but the features have {C} "
                f"directions; keep at most {4 * C + 3}"
            )

    def choose(self, c: Context) -> Keep:
        features = c.features().float()  # (n, C)
        n, keep = len(features), min(self.left(c.n_tokens)[0], len(features))
        cosine, q = cosines(features, features, c.where), max(1, keep // 4)
        generator = c.generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
        directions = principal_directions(features.sigmoid().T, q, generator)
        group = directions.abs().argmax(1)  # (n,)
        limit = keep / 32 * (cosine.triu(1).sum() / max(1, n * (n - 1) // 2))
        score = c.vision_attention(-2).sum(0)  # (n,)
        both = torch.cat((cosine > limit, score[None], group[None])).cpu()  # (n + 2, n), one wait
        groups = both[-1].long().tolist()
        order, winners = order_groups(both[-2], groups, both[:-2] > 0, q, c.where)
        quotas = group_quotas([len(g) for g in order], winners, keep)
        index = [j for g, k in zip(order, quotas, strict=True) for j in g[:k]]
        return Keep(
            torch.tensor(index),
            extra=c.vision_state()[:, 0],  # the class token
            extra_first=True,
            ordered=True,
            scores=both[-2],  # that a group's patches are ranked by
            closest=UNKNOWN,
        )
