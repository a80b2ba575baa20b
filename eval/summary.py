"""The costs of one run over all its questions: tokens, FLOPs, bytes and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillava.config import TextConfig

from . import cost
from .store import Row

TIMES = ("vision", "prefill", "first_token", "per_token")


@dataclass(frozen=True)
class Costs:
    """Means over questions, and the medians and quartiles of times over batches.

    A share is relative to the same prompts without pruning. None means that nothing was measured.
    """

    questions: int
    batch: int  # size of the largest batch; times are those of whole batches
    prompt_tokens: float
    image_tokens: float  # entering a layer, mean over layers; in mask mode the visible ones
    image_tokens_each: cost.Spread  # the same of each question
    image_tokens_most: float | None  # the same of one image at most, by what the methods declare
    tokens_entering: list[float]  # [layer] all rows
    new_tokens: float
    fastv_share: float  # share of FLOPs by FastV's formula
    sparsevlm_share: float
    flops: float  # exact FLOPs of a prefill
    flops_share: float
    cache_bytes: float
    vision: cost.Spread | None
    prefill: cost.Spread | None
    first_token: cost.Spread | None
    per_token: cost.Spread | None
    choosing_share: float | None  # share of the prefill's time spent in the plan's choices
    peak_bytes: int | None  # of the CUDA device, otherwise of the process if it was measured


def summarise(
    rows: Sequence[Row],
    config: TextConfig,
    peak_bytes: int | None = None,
    most: float | None = None,
) -> Costs:
    """The costs of answers that `predict` has written. Raises ValueError if there are none.

    most: image tokens of one image that enter a layer at most, see average.most_entering().
    """
    if not rows:
        raise ValueError("there are no answers to summarise; ask at least one question")
    measured = [row["metadata"] for row in rows]
    n, layers = len(measured), config.num_hidden_layers
    fastv = sparse = exact = unpruned_fastv = unpruned_sparse = unpruned_exact = 0
    for t in measured:
        entering, full = t["tokens_entering"], [t["prompt_tokens"]] * layers
        fastv += sum(cost.fastv_flops(rows, config) for rows in entering)
        unpruned_fastv += sum(cost.fastv_flops(rows, config) for rows in full)
        sparse += sum(cost.sparsevlm_flops(rows, config) for rows in entering)
        unpruned_sparse += sum(cost.sparsevlm_flops(rows, config) for rows in full)
        exact += cost.decoder_flops(entering, config)
        unpruned_exact += cost.decoder_flops(full, config)
    # one row for each batch; the warm-up batches count only if there are no others
    batches = list({(t["prefill"], t["vision"], t["first_token"]): t for t in measured}.values())
    batches = [t for t in batches if t["warm"]] or batches
    spent = sum(t["prefill"] for t in batches)
    image_tokens = [_mean(t["image_tokens_entering"]) for t in measured]
    peaks = [t["peak_bytes"] for t in measured if t["peak_bytes"] is not None]
    return Costs(
        questions=n,
        batch=max(t["batch"] for t in measured),
        prompt_tokens=_mean([t["prompt_tokens"] for t in measured]),
        image_tokens=_mean(image_tokens),
        image_tokens_each=cost.Spread.of(image_tokens),
        image_tokens_most=most,
        tokens_entering=[
            _mean(column) for column in zip(*(t["tokens_entering"] for t in measured), strict=True)
        ],
        new_tokens=_mean([t["new_tokens"] for t in measured]),
        fastv_share=fastv / unpruned_fastv,
        sparsevlm_share=sparse / unpruned_sparse,
        flops=exact / n,
        flops_share=exact / unpruned_exact,
        cache_bytes=_mean([t["cache_bytes"] for t in measured]),
        vision=_spread([t["vision"] for t in batches]),
        prefill=_spread([t["prefill"] for t in batches]),
        first_token=_spread([t["first_token"] for t in batches]),
        per_token=_spread([t["per_token"] for t in batches if t["per_token"] is not None]),
        choosing_share=sum(t["choosing"] for t in batches) / spent if spent else None,
        peak_bytes=max(peaks, default=peak_bytes),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> cost.Spread | None:
    return cost.Spread.of(values) if values else None
