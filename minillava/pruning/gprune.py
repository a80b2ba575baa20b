"""G-Prune: keep the tokens that collect most information along the graph of similar tokens.

Jiang et al., AAAI 2025, arXiv 2501.02268. Released code: jytmelon/G-Prune 762c637, LLaVA-NeXT/
llava/model/llava_arch.py. After the projector, before layer 0, two tokens are neighbours if their
cosine is at least `similarity`; each is its own neighbour. A token passes its information on to its
neighbours in shares softmax(cosine / temperature). At first it has the norm of its features, and
after `steps` rounds the score is what a token has received, divided by its number of neighbours.
The int(keep * N) best stay, in reading order, and keep their positions.

The released code is for LLaVA-NeXT: it treats the first 576 tokens as here, and the crops apart. A
cosine that crosses `similarity` changes the number of neighbours of two tokens, and so the order.

Deviations: cosines and shares are float32. The released code ignores cosines below 1e-6; here
`similarity` alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep, option, top
from .margins import distance_to, lead, least
from .shared import BeforeDecoder, count_down, unchecked_cosines


@dataclass(frozen=True)
class GPrune(BeforeDecoder):
    similarity: float = option(0.5, low=0, high=1, help="least cosine of neighbours")
    temperature: float = option(0.03, low=0.001, help="of the softmax over neighbours")
    steps: int = option(5, low=0, help="rounds in which information is passed on")

    name, stage, numbering = "gprune", "embed", "original"

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count_down(self.keep, n_tokens),)

    def choose(self, c: Context) -> Keep:
        features = c.features().float()  # (n, D)
        cosine = unchecked_cosines(features, features)  # (n, n)
        neighbours = cosine >= self.similarity
        shares = (cosine / self.temperature).masked_fill(~neighbours, -5000.0).softmax(1)
        score = features.norm(dim=1)  # (n,)
        for _ in range(self.steps):
            score = score @ shares
        score = score / (shares > 0).sum(1)
        (keep,), limit = self.left(c.n_tokens), cosine.new_full((), self.similarity)
        closest = least(lead(score, keep), distance_to(limit, cosine))
        return Keep(top(score, keep, c.where), scores=score, closest=closest)
