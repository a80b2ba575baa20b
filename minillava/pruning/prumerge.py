"""PruMerge and PruMerge+: keep the outliers of the class token's attention, add their neighbours.

Shang et al., ICCV 2025, arXiv 2403.15388. Released code: 42Shawn/LLaVA-PruMerge 097c041,
llava/model/multimodal_encoder/clip_encoder.py, token_prune_merge_advanced and ..._plus (without
training). Between the vision tower and the projector:
1. a is the softmax attention of the class token in the tower's last block, with q and k taken as
   ONE head of the tower's whole width. The share of patches whose a is above Q3 + 1.5 IQR gives
   T = int(N * share), and the best T patches stay.
2. PruMerge+ adds every int(int(1 / share) / 3)-th patch that is not yet among them.
3. Each kept patch i becomes x_i + sum of a_j x_j over its 32 nearest patches j, kept and dropped
   alike, itself excepted (by the cosine of those keys).
4. One added row is the sum of a_j x_j over the dropped patches.

The number of tokens depends on the image. They are ordered by descending attention, then step 2,
then the added row. Positions are renumbered. Deviations: where PruMerge+ divides by 0 (no outlier),
here it counts one. Its regular patches end before the last patch for any N, as the released ones do
for 576. The numbers in the paper are of a model trained with the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import attention_received
from ..rows import on_device, take_rows
from .base import Context, Keep, Method, Stages, top
from .margins import distance_to
from .order import need_patches
from .shared import mark_nan, unchecked_cosines

NEAREST = 32


def outlier_share(score: Tensor) -> float:
    """Share of score (n,) that is above upper_fence()."""
    return int((score > float(upper_fence(score))).sum()) / len(score)


def upper_fence(score: Tensor) -> Tensor:
    """The third quartile of score (n,) plus 1.5 quartile distances: (), float64."""
    q1, q3 = torch.quantile(score, score.new_tensor([0.25, 0.75])).double()
    return q3 + 1.5 * (q3 - q1)


def regular_patches(n: int, share: float) -> Tensor:
    """The patches among n, at equal distances, that PruMerge+ adds."""
    return torch.arange(0, n - 1, max(1, int(int(1 / max(share, 1 / n)) / 3)))


def add_neighbours(features: Tensor, score: Tensor, cosine: Tensor, kept: Tensor) -> Tensor:
    """The kept rows (K, C) of features (n, C), each plus its nearest rows weighted by score (n,).

    cosine (K, n): similarity of the kept rows to all rows.
    """
    others = cosine.scatter(1, kept[:, None], -torch.inf)
    nearest = others.sort(dim=1, descending=True, stable=True).indices[:, :NEAREST]
    nearest = nearest[:, : len(features) - 1]  # (K, 32)
    weights = torch.zeros_like(cosine).scatter(1, nearest, score[nearest])
    return features[kept] + weights.to(features.dtype) @ features


@dataclass(frozen=True)
class PruMerge(Method):
    name, drops_only, numbering, adaptive = "prumerge", False, "compact", True
    plus, adds_rows = False, True
    check_order = need_patches

    def stages(self) -> Stages:
        return (("vision", 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return ((n_tokens if self.plus else n_tokens // 4) + 1,)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (n_layers - 1,)

    def choose(self, c: Context) -> Keep:
        features, patches, n = c.features(), c.whole_patches(), len(c.candidates)
        block = len(c.model.vision.blocks) - 1
        q, k = (x[0].flatten(1) for x in c.model.vision.heads(block, c.vision_state(block)))
        score = take_rows(attention_received(q[:1, None], k[:, None], None)[0, 1:], patches)  # (n,)
        keys = take_rows(k[1:], patches)  # (n, C)
        ranked = mark_nan(score, keys).cpu()
        share = outlier_share(ranked)
        kept = top(ranked, int(n * share), c.where)
        if self.plus:
            regular = regular_patches(n, share)
            kept = torch.cat((kept, regular[~torch.isin(regular, kept)]))
        there = on_device(kept, features)  # (K,)
        merged = add_neighbours(features, score, unchecked_cosines(keys[there], keys), there)
        dropped = score.index_fill(0, there, 0.0).to(features.dtype)  # (n,) 0 where kept
        return Keep(
            kept,
            merged=merged,
            extra=(dropped @ features)[None],
            ordered=True,
            scores=ranked,
            # each kept patch also adds its neighbours to itself, which no single target tells
            merged_into=kept.new_full((n,), len(kept)).index_fill(0, kept, -1),
            closest=distance_to(upper_fence(ranked), ranked),
        )
