"""What a generation returns: the tokens, and a report of what really happened.

dataclasses.asdict(report) holds plain numbers, strings and lists, so json.dumps takes it as it is.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .engine import Pruned, State
from .llava import LLaVA
from .pruning.base import Plan
from .rows import Choice, Keep, Rows


@dataclass(frozen=True)
class Left:
    """Which image tokens were left of each sample [b] after one pruning step."""

    rule: str  # name of the method
    stage: str  # vision, embed or decoder
    layer: int  # whose input was pruned; 0 before the decoder
    # ascending indices in the unpruned prompt (Rows.id) of patches still present or visible
    positions: list[list[int]]


@dataclass(frozen=True)
class Kept(Left):
    """The same with the reasons. Added rows are named by numbers from the prompt's length on;
    pruning/README.md describes the fields."""

    extra: list[int]  # number of image rows without a patch: class token, means
    candidates: list[list[int]]  # rows that the method chose among
    scores: list[list[float | None]]  # of each candidate; [] if the method gave none
    order: list[list[int]]  # rows that were picked one after the other
    merged_into: list[list[int]]  # row that each candidate went into, or -1; [] if none did
    margin: list[float | None]  # between the lowest kept score above the best dropped one and that
    closest: list[float | None]  # the closest decision, relative to the rms of what it compared
    within_rounding: list[bool | None]  # whether `closest` is; None: not known
    digest: list[str]  # SHA-256 of json.dumps(positions[b])


@dataclass(frozen=True)
class Report:
    """What happened. Rows are counted without padding; times are in seconds."""

    prompt_tokens: list[int]  # [b]
    kept: list[Kept]
    chosen_again: list[list[Left]]  # [token] of steps that choose for every token, else []
    tokens_entering: list[list[int]]  # [layer][b] all rows
    image_tokens_entering: list[list[int]]  # [layer][b] image rows; mask mode: the visible ones
    cache_lengths: list[list[int]]  # [layer][b] after the prefill; 0 without a cache
    next_position: list[int]  # [b] position of the first new token in layer 0
    stopped: list[str]  # [b] eos, length, context or stop
    vision: float  # in the vision tower
    prefill: float
    first_token: float  # from the start to the first token
    per_token: float  # mean of the later ones
    cache_bytes: int  # keys and values held after the prefill
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


class Clock:
    """Notes when it was made and when images, prompt and each token were done, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.seconds: list[float] = []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.cuda)
        self.note()

    def note(self, wait: bool = True) -> None:
        """wait: for CUDA; the host has waited for a token that it has read."""
        if self.cuda and wait:
            torch.cuda.synchronize(self.cuda)
        self.seconds.append(time.perf_counter())


def make_report(model: LLaVA, state: State, stopped: list[str], clock: Clock) -> Report:
    """The report on a generation whose prefill left `state`."""
    text, history = model.config.text, state.history
    by_layer = [segment for segment in state.segments for _ in segment.layers]
    entering = [[len(rows) for rows in segment.rows] for segment in by_layer]
    pairs = [zip(segment.rows, segment.hidden, strict=True) for segment in by_layer]
    images = [[int(visible_images(*pair).sum()) for pair in layer] for layer in pairs]
    cached = [list(n) if state.cache else [0] * len(n) for n in entering]
    again = {pruned.step.number for pruned in history[-1]} if len(history) > 1 else set[int]()
    start, vision, prompt, *tokens = clock.seconds
    return Report(
        prompt_tokens=[len(s.prompt.ids) for s in state.samples],
        kept=[explain_step(pruned, rounding_of(model)) for pruned in history[0]],
        chosen_again=[
            [find_left(p) for p in steps if p.step.number in again] for steps in history if again
        ],
        tokens_entering=entering,
        image_tokens_entering=images,
        cache_lengths=cached,
        next_position=[rows.next_position for rows in state.segments[0].rows],
        stopped=stopped,
        vision=vision - start,
        prefill=prompt - vision,
        first_token=(tokens or [prompt])[0] - start,
        per_token=(tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else 0.0,
        cache_bytes=sum(map(sum, cached))
        * 2
        * text.num_key_value_heads
        * text.head_dim
        * model.dtype.itemsize,
        peak_bytes=torch.cuda.max_memory_allocated(clock.cuda) if clock.cuda else None,
        arithmetic=describe_arithmetic(model),
    )


def describe_arithmetic(model: LLaVA) -> str:
    """What the decoder's linear layers compute with: a stored form's words, or "bfloat16"."""
    return getattr(model.block(0).mlp.down_proj, "arithmetic", str(model.dtype)[len("torch.") :])


def rounding_of(model: LLaVA) -> float:
    return 1e-4


def explain_step(pruned: Pruned, rounding: float) -> Kept:
    """What one step of the prefill left, and why."""
    left, samples = find_left(pruned), range(len(pruned.rows))
    visible = [visible_images(pruned.rows[b], pruned.hidden[b]) for b in samples]
    why = [explain_choices(pruned.choices[b], pruned.before[b], pruned.rows[b]) for b in samples]
    columns = {name: [entry[name] for entry in why] for name in why[0]}
    return Kept(
        **vars(left),
        extra=[int(v.sum()) - len(ids) for v, ids in zip(visible, left.positions, strict=True)],
        **columns,
        within_rounding=[None if c is None else c <= rounding for c in columns["closest"]],
        digest=[sha256(json.dumps(ids).encode()).hexdigest() for ids in left.positions],
    )


def explain_choices(choices: list[Choice], before: Rows, after: Rows) -> dict[str, Any]:
    """Why a step kept what it kept of one sample, by its choices for the images."""
    why: dict[str, list[Any]] = {"candidates": [], "scores": [], "order": [], "merged_into": []}
    margins: list[tuple[float | None, float | None]] = [(None, None)]
    for choice in (c for c in choices if len(c.candidates)):
        keep, ids = choice.keep, before.id[choice.candidates]  # (n,)
        is_new = (after.id >= before.n_ids) & (after.image == before.image[choice.window[0]])
        rows = torch.cat((ids[keep.index], after.id[is_new], torch.tensor([-1])))  # (K + M + 1,)
        into = torch.full_like(ids, -1) if keep.merged_into is None else keep.merged_into.cpu()
        scores = torch.full(ids.shape, torch.nan) if keep.scores is None else keep.scores.cpu()
        why["candidates"] += ids.tolist()
        why["order"] += [] if keep.order is None else ids[keep.order.cpu()].tolist()
        why["merged_into"] += rows[into].tolist()
        why["scores"] += [x if math.isfinite(x) else None for x in scores.tolist()]
        margins.append(measure_margin(keep, scores.double()))
    for name, nothing in (("scores", None), ("merged_into", -1)):
        why[name] = why[name] if set(why[name]) - {nothing} else []
    pairs = zip(("margin", "closest"), zip(*margins, strict=True), strict=True)
    return why | {
        what: min((x for x in found if x is not None), default=None) for what, found in pairs
    }


def measure_margin(keep: Keep, scores: Tensor) -> tuple[float | None, float | None]:
    """`margin` and `closest` of one choice among candidates with these scores (n,), see Kept."""
    is_kept = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, keep.index, True)
    kept, edge = scores[is_kept], scores.new_tensor([torch.inf])
    best = torch.cat((scores[~is_kept], -edge)).max()
    last = torch.cat((kept[kept >= best], edge)).min()  # inf or NaN: there is no cut
    margin = float(last - best)
    # rounding moves weights by a share of themselves, other scores by one of their typical size
    size = scores[scores.isfinite()].square().mean().sqrt() if (scores < 0).any() else last
    closest = margin / max(float(size), 1e-30) if (kept >= best).all() else math.nan
    closest = closest if keep.closest is None else float(keep.closest)
    return margin if math.isfinite(margin) else None, closest if math.isfinite(closest) else None


def find_left(pruned: Pruned) -> Left:
    """The patches that one step left, sorted since methods may reorder."""
    positions = []
    for rows, hidden in zip(pruned.rows, pruned.hidden, strict=True):
        is_left = visible_images(rows, hidden) & (rows.patch >= 0)
        positions.append(sorted(rows.id[is_left].tolist()))
    return Left(pruned.step.method.name, pruned.step.stage, pruned.step.layer, positions)


def visible_images(rows: Rows, hidden: Tensor | None) -> Tensor:
    """Which rows (S,) belong to an image and are not hidden."""
    is_image = rows.image >= 0
    return is_image if hidden is None else is_image & ~hidden
