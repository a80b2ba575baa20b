"""How near a choice is to another one: for Keep.closest, and so for the report.

Rounding depends on the machine, the batch size and the stored form of the weights, and two scores
that are nearly equal may then change places. Each method says how nearly: the smallest difference
that any of its decisions turned on, as a share of the numbers that were compared. Rounding moves an
attention weight by a share of itself, say 0.4. It moves a cosine, however small, by at most a
twentieth of that, 0.02 (COSINE; on a demo of 64 tokens, in all stored forms, a fiftieth). A method
whose only decision is the cut of Keep.scores need not give `closest`: the report computes it.

The host waits for nothing here. All results are () and infinite where nothing was decided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import on_device
from .base import Keep

TINY = 1e-30  # keeps quotients of zeros finite
UNKNOWN = torch.tensor(torch.inf)  # `closest` where scores are given but do not tell it
COSINE = 0.05  # a `scale` for cosines


def lead(scores: Tensor, k: int, scale: float | Tensor | None = None) -> Tensor:
    """For a choice of the k highest of scores (n,): the k-th highest less the next, as a share of
    `scale`; by default of the k-th highest, or where scores are negative of their typical size."""
    scores = scores.float()
    if not 0 < k < len(scores):
        return scores.new_full((), torch.inf)
    last, following = scores.topk(k + 1).values[-2:]
    return (last - following) / (size_of(scores, last) if scale is None else scale)


def least_gap(scores: Tensor, scale: float | Tensor | None = None) -> Tensor:
    """The same for a choice that depends on the whole order of scores (n,)."""
    ordered = scores.float().sort().values
    if len(ordered) < 2:
        return ordered.new_full((), torch.inf)
    size = size_of(ordered, ordered[1:]) if scale is None else scale
    return ((ordered[1:] - ordered[:-1]) / size).amin()


def distance_to(limit: Tensor, scores: Tensor) -> Tensor:
    """The same for a choice of all scores (n,) above a limit ()."""
    return (scores - limit).abs().amin() / limit.abs().clamp(min=TINY)


def size_of(scores: Tensor, some: Tensor) -> Tensor:
    """What rounding of `some` of scores (n,) is a share of: themselves, if none is negative, or
    else the root mean square of all."""
    finite = scores.nan_to_num(0.0, 0.0, 0.0)
    rms = finite.square().mean().sqrt()
    return torch.where((finite >= 0).all(), some, rms).clamp(min=TINY)


def least(*leads: Tensor) -> Tensor:
    """The smallest of several, which may be on the CPU or on one other device."""
    there = next((x for x in leads if x.device.type != "cpu"), leads[0])
    return torch.stack([on_device(x, there) for x in leads]).amin()


class Picks:
    """A greedy choice of k of n candidates: their order, and how near each pick was to another."""

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.order = torch.empty(k, dtype=torch.long, device=device)
        self.scores = torch.zeros(n, device=device)  # when it was picked, or the last pick was
        self.leads = torch.full((k,), torch.inf, device=device)  # of each pick over the next best

    def take(self, number: int, scores: Tensor) -> Tensor:
        """The next pick (1,): the highest of scores (n,), which are -inf for earlier picks."""
        pick = scores.argmax(keepdim=True)  # the host would read an index without a dimension
        self.order[number] = pick[0]
        self.scores = torch.where(scores == -torch.inf, self.scores, scores)
        second = scores.index_fill(0, pick, -torch.inf).amax()
        self.leads[number] = scores[pick][0] - second
        return pick

    def keep(self, scale: float | Tensor) -> Keep:
        """scale: of the numbers that were subtracted from each other, see lead()."""
        return Keep(self.order, scores=self.scores, order=self.order, closest=self.leads / scale)
