"""From logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token () from logits (V,): the largest at temperature 0, otherwise drawn.

    top_p: only the most likely tokens whose probabilities sum up to at least top_p (the most
    likely one always) take part (Holtzman et al. 2020, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax()
    below = logits.double() - logits.max()  # a tiny temperature makes it -inf, never inf
    probabilities = (below / temperature).softmax(-1)  # (V,)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    ordered = ordered.masked_fill((before >= top_p) & (before > 0), 0.0)
    return tokens[torch.multinomial(ordered, 1, generator=generator)[0]]
