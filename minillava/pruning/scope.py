"""SCOPE: keep the patches that cover the others best, weighted by the class token's attention.

Deng et al., NeurIPS 2025, arXiv 2510.24214. Released code: kinredon/SCOPE 6bf7306,
scope/clip_encoder.py. After the vision tower, before the projector, a patch covers another as well
as their features' cosine says; how well a patch is covered is the cosine to the nearest chosen one,
at least 0. Patches are chosen one by one, each time that with the highest gain: the sum over all
patches of what it adds to their coverage, times its attention from the class token in the
second-last block (sum over heads), to the power `alpha`. combine=add adds the attention instead. A
sum of gains starts at the order of N and attention at that of heads / N, so it decides late. The
chosen patches stay in reading order, and are renumbered.

Deviations: scores are float32. The released code divides the budget among several images, rounded
down; here `keep` counts for each. Its settings are environment variables (ALPHA, COMBINED).
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep, option
from .shared import ByClassToken, choose_covering, cosines


@dataclass(frozen=True)
class SCOPE(ByClassToken):
    alpha: float = option(1.0, low=0, help="power of the class token's attention")
    combine: str = option("multi", choices=("multi", "add"), help="attention times or plus gain")

    name = "scope"

    def choose(self, c: Context) -> Keep:
        (keep,) = self.left(c.n_tokens)
        features, weight = c.features(), c.vision_attention(-2).sum(0) ** self.alpha  # (n,)
        covers = cosines(features, features, c.where)  # (n, n)
        times, plus = (weight, 0.0) if self.combine == "multi" else (1.0, weight)
        return choose_covering(covers, min(keep, len(covers)), times, plus)
