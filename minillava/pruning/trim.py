"""TRIM: keep the patches that CLIP finds LEAST similar to the question, and a mean of the others.

Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal
LLMs", COLING 2025, arXiv 2409.10994. Released code (FreedomIntelligence/TRIM f5a232d):
clip_encoder.py, token_reduction. Before the projector, the patches of LLaVA's feature layer go
through CLIP's last norm and its image projection. Their dot product with the text tower's vector of
the question (neither normalised) is negated, and a softmax of it ranks the patches. (Descriptions
say "most similar"; but in CLIP the patches that show what the text names come out least similar,
and the code keeps those.) int(N * keep) patches stay in reading order, followed by one mean of all
that were dropped. Without keep= the number is that of outliers: scores above the third quartile by
more than 1.5 interquartile ranges.

Deviations: the question is the focus, or the text after the image without the template's role.
open_clip's tokenizer also repairs broken Unicode and HTML entities. Patches are ranked before the
softmax, so that it makes no ties. If nothing is dropped, there is no mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..llava import LLaVA
from ..rows import take_rows
from .base import Context, Keep, Method, Stages, amount, option, top
from .clip_text import OPENAI, check_clip, load_clip, question
from .margins import distance_to


def count_outliers(similarity: Tensor) -> tuple[int, Tensor]:
    """How many of (n,) have a share of softmax(-similarity) above Tukey's upper fence; and how near
    any share is to it, see lead()."""
    share = (-similarity).softmax(0)
    low, high = share.quantile(0.25), share.quantile(0.75)
    n, fence = len(share), high + 1.5 * (high - low)
    found = int(n * (int((share > fence).sum()) / n))  # rounded as released
    return found, distance_to(fence, share)


@dataclass(frozen=True)
class TRIM(Method):
    keep: float | None = amount(None, help="number or share kept; without it the outliers")
    clip: str = option(OPENAI, help="the CLIP with the text tower")

    name, identity, drops_only, numbering = "trim", "keep=1.0", False, "compact"
    adds_rows = True

    def stages(self) -> Stages:
        return (("vision", 0),)

    def n_kept(self, n_tokens: int) -> int | None:
        """Patches kept out of n_tokens; None: the similarities decide."""
        return int(n_tokens * self.keep) if isinstance(self.keep, float) else self.keep

    def left(self, n_tokens: int) -> tuple[int, ...]:
        k = self.n_kept(n_tokens)
        return (n_tokens if k is None else min(n_tokens, k + 1),)

    def check_model(self, model: LLaVA) -> None:
        if self.n_kept(model.config.vision.num_patches) != model.config.vision.num_patches:
            check_clip(model, self.name, self.clip)

    def choose(self, c: Context) -> Keep:
        n, k = len(c.candidates), self.n_kept(c.n_tokens)
        if k is not None and k >= n:
            return Keep(torch.arange(n))
        features = c.features()  # (n, C)
        clip = load_clip(self.clip, features.device)
        text = clip.truncated(question(c.focus_text()))[0]  # (E,)
        similarity = (clip.patches(features) @ text).cpu()  # (n,)
        order, closest = top(-similarity, n, c.where), None
        if k is None:
            k, closest = count_outliers(similarity)
        return Keep(
            order[:k],
            extra=take_rows(features, order[k:]).mean(0, keepdim=True),
            scores=-similarity,
            merged_into=torch.full_like(order, k).index_fill(0, order[:k], -1),
            closest=closest,
        )
