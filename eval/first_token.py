"""The distribution of the first new token, and how far a plan moves it.

KL(P || Q) compares the unpruned model's P with a plan's Q, in nats. Of P, an answer file keeps the
most likely tokens that have all but REST of its mass, at most MOST of them; all others count as one
event. So the KL is exact but for that event, and never above the exact one.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

MOST = 1024
REST = 1e-6


class Distribution(TypedDict):
    """The most likely tokens, most likely first, with their natural log probabilities."""

    tokens: list[int]
    log_probs: list[float]


class FirstLogits:
    """While it is entered, it notes what the model's output head returns first: `logits` (B, V) of
    the prompts, before any rule for choosing tokens. None if the head did not run."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.logits: Tensor | None = None

    def __enter__(self) -> FirstLogits:
        self._hook = self.head.register_forward_hook(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hook.remove()

    def _note(self, head: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.logits is None:
            self.logits = output.detach()


def distribution(logits: Tensor) -> Distribution:
    """The distribution that logits (V,) give."""
    log_probs, tokens = logits.cpu().double().log_softmax(0).sort(descending=True, stable=True)
    enough = int((log_probs.exp().cumsum(0) < 1 - REST).sum()) + 1
    n = min(enough, MOST, len(tokens))
    return {
        "tokens": tokens[:n].tolist(),
        "log_probs": [round(x, 7) for x in log_probs[:n].tolist()],
    }


def divergence(first: Distribution, logits: Tensor) -> float | None:
    """KL of the distribution of logits (V,) from `first`; None if it has tokens that these lack."""
    tokens = torch.tensor(first["tokens"])
    if not len(tokens) or int(tokens.max()) >= len(logits) or int(tokens.min()) < 0:
        return None
    p = torch.tensor(first["log_probs"], dtype=torch.double).exp()
    q = logits.cpu().double().softmax(0)[tokens]
    rest = torch.stack([1 - p.sum(), 1 - q.sum()]).clamp(min=1e-12)
    p, q = torch.cat([p, rest[:1]]), torch.cat([q, rest[1:]]).clamp(min=1e-300)
    return max(0.0, float((p * (p / q).log()).sum()))
