"""PruMerge and PruMerge+: keep the outliers of the class token's attention, add their neighbours.

Shang et al., ICCV 2025, arXiv 2403.15388. Released code: 42Shawn/LLaVA-PruMerge 097c041,
llava/model/multimodal_encoder/clip_encoder.py, token_prune_merge_advanced and ..._plus (without
training). Between vision tower and projector:

a = the class token's softmax attention in the last block, whose q and k are taken as ONE head of
the tower's whole width. The share of patches with a above Q3 + 1.5 IQR gives T = int(N * share);
the best T stay. Plus adds every int(int(1 / share) / 3)-th patch that is not yet in. Each kept
patch i becomes x_i + sum of a_j x_j over its 32 nearest (cosine of those keys, kept and pruned
alike, itself excepted); one further token is the sum of a_j x_j over the pruned.

The number of tokens is the picture's own. Order: by falling attention, then the grid, then the
further token; numbered anew. Deviations: where the plus form divides by zero (no outlier) it takes
one; its grid ends before the last patch of any N, as released for 576. The paper's numbers are of a
model trained with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, Method, Stage, received, top
from .shared import RELEASED_TOO, cosines, patches

NEAREST = 32


def outlier_share(score: Tensor) -> float:
    """Share of (n,) that lies above the third quartile by more than 1.5 quartile distances."""
    q1, q3 = torch.quantile(score, score.new_tensor([0.25, 0.75])).tolist()
    return int((score > q3 + 1.5 * (q3 - q1)).sum()) / len(score)


def grid(n: int, share: float) -> Tensor:
    """Patches that the plus form adds, of n."""
    return torch.arange(0, n - 1, max(1, int(int(1 / max(share, 1 / n)) / 3)))


def gather(features: Tensor, score: Tensor, likeness: Tensor, kept: Tensor) -> Tensor:
    """Kept rows (K, C) of features (n, C), each with its neighbours weighted by score (n,).

    likeness (K, n): of the kept to all.
    """
    others = likeness.scatter(1, kept[:, None], -torch.inf)
    near = others.sort(dim=1, descending=True, stable=True).indices[:, :NEAREST]
    near = near[:, : len(features) - 1]  # (K, 32)
    weights = torch.zeros_like(likeness).scatter(1, near, score[near])
    return features[kept] + weights.to(features.dtype) @ features


@dataclass(frozen=True)
class PruMerge(Method):
    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "PruMerge, ICCV 2025, arXiv 2403.15388"
    source: ClassVar[str] = "42Shawn/LLaVA-PruMerge 097c041, clip_encoder.py"
    acts: ClassVar[str] = "after the vision tower, before the projector"
    checked: ClassVar[str] = RELEASED_TOO
    drops_only: ClassVar[bool] = False
    numbering: ClassVar[str] = "compact"
    plus: ClassVar[bool] = False

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("vision", 0),)

    def most(self, n_tokens: int) -> int:
        return (n_tokens if self.plus else n_tokens // 4) + 1

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (n_layers - 1,)

    def choose(self, c: Context) -> Keep:
        vision, features, here = c.vision(), c.features(), patches(c)
        last = len(vision.tower.blocks) - 1
        q, k = (part.flatten(2) for part in vision.tower.heads(last, vision.hidden[last]))
        score = received(q[0, :1, None], k[0, :, None], None)[0, 1:][here]  # (n,)
        share = outlier_share(score)
        kept = top(score, int(len(here) * share), c.what)
        if self.plus:
            more = grid(len(here), share).to(here.device)
            kept = torch.cat((kept, more[~torch.isin(more, kept)]))
        keys = k[0, 1:][here]  # (n, C)
        rows = gather(features, score, cosines(keys[kept], keys, c.what), kept)
        pruned = score.index_fill(0, kept, 0.0).to(features.dtype)  # (n,)
        return Keep(kept, rows=rows, extra=(pruned @ features)[None], ordered=True)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    name: ClassVar[str] = "prumerge-plus"
    paper: ClassVar[str] = "PruMerge+, ICCV 2025, arXiv 2403.15388"
    plus: ClassVar[bool] = True
