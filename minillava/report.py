"""What a generation returns: the tokens, and a report of what really happened.

dataclasses.asdict(report) holds plain numbers, strings and lists, so json.dumps takes it as it is.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .engine import Pruned, State
from .llava import LLaVA
from .pruning.base import Plan
from .rows import Keep


@dataclass(frozen=True)
class Kept:
    """Which image tokens of each sample [b] one pruning step left, and why (pruning/README.md).
    A row is named by its index in the unpruned prompt (Rows.id), an added one from its end on."""

    rule: str  # name of the method
    stage: str  # vision, embed or decoder
    layer: int  # whose input was pruned; 0 before the decoder
    positions: list[list[int]]  # patches still present or visible, ascending
    extra: list[int]  # number of image rows without a patch: class token, means
    candidates: list[list[int]]  # rows that the method chose among
    scores: list[list[float | None]]  # of each candidate; [] if the method gave none
    order: list[list[int]]  # rows that were picked one after the other
    merged_into: list[list[int]]  # row that each candidate went into, or -1; [] if none did
    margin: list[float | None]  # score of the last kept row less that of the first dropped one
    closest: list[float | None]  # the closest decision, as a share of what it compared
    within_rounding: list[bool | None]  # whether rounding can turn `closest`; None: not known
    digest: list[str]  # SHA-256 of json.dumps(positions[b])


@dataclass(frozen=True)
class Report:
    """What happened. Rows are counted without padding; times are in seconds."""

    prompt_tokens: list[int]  # [b]
    kept: list[Kept]
    chosen_again: list[list[Kept]]  # [token] steps that chose again for it; [] if none ever does
    tokens_entering: list[list[int]]  # [layer][b] all rows
    image_tokens_entering: list[list[int]]  # [layer][b] image rows; mask mode: the visible ones
    cache_lengths: list[list[int]]  # [layer][b] after the prefill; 0 without a cache
    next_position: list[int]  # [b] position of the first new token in layer 0
    stopped: list[str]  # [b] eos, length, context or stop
    vision: float  # in the vision tower
    prefill: float
    first_token: float  # from the start to the first token
    per_token: float  # mean of the tokens after the first
    cache_bytes: int  # keys and values that this process holds after the prefill
    peak_bytes: int | None  # peak of allocated memory, CUDA only
    arithmetic: str  # of the decoder's linear layers: float32, bfloat16, or its stored form's


@dataclass(frozen=True)
class Result:
    """The answers to a batch."""

    tokens: list[list[int]]  # [b] new ids, EOS included
    texts: list[str] | None  # [b] the same decoded, a stop string included; None: no tokenizer
    report: Report
    plan: Plan  # with average= solved
    config: Config
    starts: list[tuple[int, ...]]  # [b] index of the first token of each image in the prompt
    logits: Tensor | None = None  # (B, n_new, V) that each token was chosen from; NaN after the end


def read_clock(device: torch.device, wait: bool = True) -> float:
    """Seconds. It waits for CUDA, unless the host has just done so to read a token."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_report(model: LLaVA, state: State, stopped: list[str], times: list[float]) -> Report:
    """The report on a generation whose prefill left `state`, by the times of the start, of the end
    of the vision tower and of the prefill, and of each token."""
    text, device = model.llama.config, model.device
    arithmetic, rounding = describe_arithmetic(model)
    by_layer = [segment for segment in state.segments for _ in segment.layers]
    cached = [[len(rows) if state.cache else 0 for rows in layer.held] for layer in by_layer]
    row_bytes = 2 * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    start, vision, prompt, *tokens = times
    return Report(
        prompt_tokens=[len(s.prompt.ids) for s in state.samples],
        kept=[explain_step(pruned, rounding) for pruned in state.history.get(0, [])],
        chosen_again=[  # without reasons, which would be a lot
            [explain_step(replace(p, choices=[[]] * len(p.left)), rounding) for p in steps]
            for steps in (state.history.values() if len(state.history) > 1 else [])
        ],
        tokens_entering=[[len(rows) for rows in layer.rows] for layer in by_layer],
        image_tokens_entering=[list(segment.n_image_rows) for segment in by_layer],
        cache_lengths=cached,
        next_position=[rows.next_position for rows in state.segments[0].held],
        stopped=stopped,
        vision=vision - start,
        prefill=prompt - vision,
        first_token=(tokens or [prompt])[0] - start,
        per_token=(tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else 0.0,
        cache_bytes=sum(map(sum, cached)) * row_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        arithmetic=arithmetic,
    )


def describe_arithmetic(model: LLaVA) -> tuple[str, float]:
    """In words, what the decoder's linear layers compute with; and the share of itself by which
    rounding may move a score: about half of a dtype's digits are safe."""
    layer, eps = model.block(0).mlp.down_proj, torch.finfo(model.dtype).eps
    words = getattr(layer, "arithmetic", str(model.dtype)[len("torch.") :])
    return words, max(2 * eps**0.5, getattr(layer, "rounding", 0.0))


def explain_step(pruned: Pruned, rounding: float) -> Kept:
    """What one step left, and why."""
    entries = [explain_sample(pruned, b, rounding) for b in range(len(pruned.left))]
    columns: dict[str, Any] = {name: [entry[name] for entry in entries] for name in entries[0]}
    return Kept(pruned.step.method.name, pruned.step.stage, pruned.step.layer, **columns)


def explain_sample(pruned: Pruned, b: int, rounding: float) -> dict[str, Any]:
    """The entries of one sample in Kept."""
    before, left, margin, closest = pruned.before[b], pruned.left[b], math.inf, math.inf
    positions = sorted(left.id[left.patch >= 0].tolist())  # methods may reorder
    why: dict[str, list[Any]] = {"candidates": [], "scores": [], "order": [], "merged_into": []}
    for choice in (choice for choice in pruned.choices[b] if len(choice.candidates)):
        keep, ids = choice.keep, before.id[choice.candidates].tolist()  # [n]
        added = left.id[(left.id >= before.n_ids) & (left.image == before.image[choice.window[0]])]
        rows = [*(ids[i] for i in keep.index.tolist()), *added.tolist(), -1]  # [K + M + 1]
        scores = [] if keep.scores is None else keep.scores.tolist()
        scores = scores if all(map(math.isfinite, scores)) else []
        order = [] if keep.order is None else keep.order.tolist()
        into = [-1] * len(ids) if keep.merged_into is None else keep.merged_into.tolist()
        if {*order} - {*range(len(ids))} or {*into} - {*range(-1, len(rows) - 1)}:
            raise ValueError(f"{pruned.step.method.label}: Keep.order or merged_into names no row")
        why["candidates"] += ids
        why["scores"] += scores or [None] * len(ids)
        why["order"] += [ids[i] for i in order]
        why["merged_into"] += [rows[i] for i in into]
        margin, closest = map(min, measure_margin(keep, scores), (margin, closest))
    return {
        "positions": positions,
        "extra": len(left) - len(positions),
        **{name: x if set(x) - {None, -1} else [] for name, x in why.items()},
        "margin": margin if margin < math.inf else None,
        "closest": closest if closest < math.inf else None,
        "within_rounding": closest <= rounding if closest < math.inf else None,
        "digest": sha256(json.dumps(positions).encode()).hexdigest(),
    }


def measure_margin(keep: Keep, scores: list[float]) -> tuple[float, float]:
    """`margin` and `closest` (see Kept) of a choice by scores [n]; [] or infinite: not known."""
    kept = set(keep.index.tolist())
    near = [] if keep.closest is None else torch.as_tensor(keep.closest).flatten().tolist()
    closest = min(near, default=math.inf)
    first_dropped = max((s for i, s in enumerate(scores) if i not in kept), default=-math.inf)
    above = [s for i, s in enumerate(scores) if i in kept and s >= first_dropped]
    margin = min(above, default=math.inf) - first_dropped
    if keep.closest is None and 0 < len(above) == len(kept):
        # rounding moves weights by a share of themselves, other scores by one of the largest
        size = max(map(abs, scores)) if min(scores) < 0 else min(above)
        closest = margin / max(size, 1e-30)
    return margin, closest
