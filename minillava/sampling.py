"""Choose the next token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Logits (V,) -> one token id (): the most likely at temperature 0, otherwise a random draw.

    top_p: draw only among the most likely tokens, as few as have a total probability of at least
    top_p (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751), at least the most likely one.
    """
    if temperature == 0:
        return logits.argmax()
    shifted = logits.double() - logits.max()  # at most 0: a tiny temperature gives -inf, not inf
    probabilities = (shifted / temperature).softmax(-1)  # (V,)
    ordered, tokens = probabilities.sort(descending=True, stable=True)  # (V,), (V,)
    before = ordered.cumsum(0) - ordered  # (V,) total probability of the more likely tokens
    ordered = ordered.masked_fill((before >= top_p) & (before > 0), 0.0)
    # torch.multinomial draws in the same way, but makes the host wait for a check of its input
    noise = torch.empty_like(ordered).exponential_(generator=generator)
    return tokens.index_select(0, (ordered / noise).argmax(keepdim=True))[0]
