"""Simignore: keep the image tokens that resemble the text.

Zhang et al., AAAI 2025, arXiv 2412.09817. Released code (FanshuoZeng/Simignore): llava_arch.py,
prepare_inputs_labels_for_multimodal. After the projector, before layer 0, all pairs of an image
token and a token of the focus (input embeddings) are sorted by descending similarity. The walk goes
through them from pair `i_index` in steps of `step` and keeps each pair's image token, until `keep`
different ones are kept. With step=1 and i_index=0 these are the tokens with the largest maximum.

Deviations: any prompt and any number of images, not ScienceQA's with one. The released FastV ends
Simignore's mask (`until=`), and there the other measures are commented out (the smallest is best).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Context, Keep, Method, Stages, amount, count, option


def similarity(image: Tensor, text: Tensor, measure: str) -> Tensor:
    """Image tokens (n, D) against text tokens (t, D): (n, t), float32; larger is more alike."""
    image, text = image.float(), text.float()
    if measure == "cosine":
        return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return -torch.cdist(image, text, p=2.0 if measure == "euclidean" else 1.0)


def walk(pairs: Tensor, keep: int, step: int = 1, i_index: int = 0) -> Tensor:
    """Rows of pairs (n, t) in the order in which the walk meets them first, at most `keep`."""
    n, t = pairs.shape
    order = torch.sort(pairs.flatten(), descending=True, stable=True).indices[i_index::step]
    rank = torch.arange(len(order), device=pairs.device)
    met = rank.new_full((n,), n * t).scatter_reduce(0, order // t, rank, "amin")  # first rank
    return met.argsort()[: int((met < n * t).sum())][:keep]


@dataclass(frozen=True)
class Simignore(Method):
    keep: float = amount()
    step: int = option(1, low=1, help="pairs per step of the walk")
    i_index: int = option(0, low=0, help="index of the pair that the walk starts with")
    measure: str = option("cosine", choices=("cosine", "euclidean", "manhattan"))
    name, identity = "simignore", "keep=1.0"

    def stages(self) -> Stages:
        return (("embed", 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count(self.keep, n_tokens),)

    def choose(self, c: Context) -> Keep:
        pairs = similarity(c.features(), c.focus(), self.measure).cpu()  # (n, t)
        if pairs.isnan().any():
            raise ValueError(f"NaN among the similarities of {c.where}: the weights are broken")
        (k,) = self.left(c.n_tokens)
        return Keep(walk(pairs, k, self.step, self.i_index), scores=pairs.amax(1))
