"""What the answers of one run have cost: tokens, FLOPs, bytes and times, over its questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillava.config import TextConfig

from . import cost
from .store import Row

TIMES = ("vision", "prefill", "first_token", "per_token")


@dataclass(frozen=True)
class Costs:
    """Means over questions, and times with their quartiles over batches. Shares are of what the
    same prompts cost unpruned; None: nothing was measured."""

    questions: int
    batch: int  # largest batch; times are those of whole batches
    prompt_tokens: float
    image_tokens: float  # entering a layer, mean over layers; mask mode: visible ones
    tokens_entering: list[float]  # [layer] all rows
    new_tokens: float
    fastv_share: float  # of FLOPs by FastV's formula
    sparsevlm_share: float
    flops: float  # exact, of a prefill
    flops_share: float
    cache_bytes: float
    vision: cost.Spread | None
    prefill: cost.Spread | None
    first_token: cost.Spread | None
    per_token: cost.Spread | None
    choosing_share: float | None  # of the prefill's time, spent in the plan's choices
    peak_bytes: int | None  # of a CUDA device; else the process's, where it was measured


def summary(rows: Sequence[Row], config: TextConfig, peak_bytes: int | None = None) -> Costs:
    """Costs of the answers that predict has written. ValueError for no answer."""
    if not rows:
        raise ValueError("there is no answer to sum up; ask at least one question")
    told = [row["metadata"] for row in rows]
    n, layers = len(told), config.num_hidden_layers
    fastv = sparse = exact = whole_fastv = whole_sparse = whole = 0
    for t in told:
        entering, unpruned = t["tokens_entering"], [t["prompt_tokens"]] * layers
        fastv += sum(cost.fastv_flops(rows, config) for rows in entering)
        whole_fastv += sum(cost.fastv_flops(rows, config) for rows in unpruned)
        sparse += sum(cost.sparsevlm_flops(rows, config) for rows in entering)
        whole_sparse += sum(cost.sparsevlm_flops(rows, config) for rows in unpruned)
        exact += cost.decoder_flops(entering, config)
        whole += cost.decoder_flops(unpruned, config)
    # one row for each batch, the first few of each process apart unless there are no others
    batches = list({(t["prefill"], t["vision"], t["first_token"]): t for t in told}.values())
    batches = [t for t in batches if t["warm"]] or batches
    spent = sum(t["prefill"] for t in batches)
    peaks = [t["peak_bytes"] for t in told if t["peak_bytes"] is not None]
    return Costs(
        questions=n,
        batch=max(t["batch"] for t in told),
        prompt_tokens=_mean([t["prompt_tokens"] for t in told]),
        image_tokens=_mean([_mean(t["image_tokens_entering"]) for t in told]),
        tokens_entering=[
            _mean(column) for column in zip(*(t["tokens_entering"] for t in told), strict=True)
        ],
        new_tokens=_mean([t["new_tokens"] for t in told]),
        fastv_share=fastv / whole_fastv,
        sparsevlm_share=sparse / whole_sparse,
        flops=exact / n,
        flops_share=exact / whole,
        cache_bytes=_mean([t["cache_bytes"] for t in told]),
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
