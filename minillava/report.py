"""What a generation returns: the tokens, and a report of what really happened.

dataclasses.asdict(report) holds plain numbers, strings and lists, so json.dumps takes it as it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .engine import Pruned, State
from .llava import LLaVA
from .pruning.base import Plan
from .rows import Rows


@dataclass(frozen=True)
class Kept:
    """Which image tokens were left after one pruning step of the prefill."""

    rule: str  # name of the method
    layer: int  # whose input was pruned; 0 before the decoder
    # [b] indices in the unpruned prompt (Rows.id), ascending, of patches still present or visible
    positions: list[list[int]]
    extra: list[int]  # [b] number of image rows without a patch: class token, means


@dataclass(frozen=True)
class Report:
    """What happened. Rows are counted without padding; times are in seconds."""

    prompt_tokens: list[int]  # [b]
    kept: list[Kept]
    tokens_entering: list[list[int]]  # [layer][b] all rows
    image_tokens_entering: list[list[int]]  # [layer][b] image rows; mask mode: the visible ones
    cache_lengths: list[list[int]]  # [layer][b] after the prefill; 0 without a cache
    next_position: list[int]  # [b] position of the first new token in layer 0
    stopped: list[str]  # [b] eos, length, context or stop
    vision: float  # in the vision tower
    prefill: float
    first_token: float  # from the start to the first token
    per_token: float  # mean of the later ones
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


class Clock:
    """Measures one generation, in seconds since it was made. It waits for CUDA before it reads."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.read: dict[str, float] = {}  # vision, prefill, first_token, last: when each had ended
        self.n_tokens = 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.cuda)
        self.start = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.cuda)
        return time.perf_counter()

    def note(self, what: str) -> None:
        self.read[what] = self._now() - self.start

    def note_token(self) -> None:
        """After a token was read, for which the host has waited."""
        self.n_tokens += 1
        self.read["last" if self.n_tokens > 1 else "first_token"] = time.perf_counter() - self.start

    def per_token(self) -> float:
        """Mean of the tokens after the first."""
        if self.n_tokens < 2:
            return 0.0
        return (self.read["last"] - self.read["first_token"]) / (self.n_tokens - 1)


def make_report(
    model: LLaVA, state: State, stopped: list[str], clock: Clock, cache_bytes: int
) -> Report:
    """The report on a generation whose prefill left `state`."""
    by_layer = [segment for segment in state.segments for _ in segment.layers]
    entering = [[len(rows) for rows in segment.rows] for segment in by_layer]
    pairs = [zip(segment.rows, segment.hidden, strict=True) for segment in by_layer]
    images = [[int(visible_images(*pair).sum()) for pair in layer] for layer in pairs]
    return Report(
        prompt_tokens=[len(s.prompt.ids) for s in state.samples],
        kept=[image_tokens_left(pruned) for pruned in state.history],
        tokens_entering=entering,
        image_tokens_entering=images,
        cache_lengths=[[len(r) if state.cache else 0 for r in layer.held] for layer in by_layer],
        next_position=[rows.next_position for rows in state.segments[0].held],
        stopped=stopped,
        vision=clock.read["vision"],
        prefill=clock.read["prefill"] - clock.read["vision"],
        first_token=clock.read.get("first_token", clock.read["prefill"]),
        per_token=clock.per_token(),
        cache_bytes=cache_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(clock.cuda) if clock.cuda else None,
        arithmetic=describe_arithmetic(model),
    )


def describe_arithmetic(model: LLaVA) -> str:
    """What the decoder's linear layers compute with: a stored form's words, or "bfloat16"."""
    return getattr(model.block(0).mlp.down_proj, "arithmetic", str(model.dtype)[len("torch.") :])


def image_tokens_left(pruned: Pruned) -> Kept:
    """What one step left: ids of patches, sorted since methods may reorder, and added rows."""
    positions, extra = [], []
    for rows, hidden in zip(pruned.rows, pruned.hidden, strict=True):
        visible = visible_images(rows, hidden)
        ids = rows.id[visible & (rows.patch >= 0)]
        positions.append(sorted(ids.tolist()))
        extra.append(int(visible.sum()) - len(ids))
    return Kept(pruned.step.method.name, pruned.step.layer, positions, extra)


def visible_images(rows: Rows, hidden: Tensor | None) -> Tensor:
    """Which rows (S,) belong to an image and are not hidden."""
    is_image = rows.image >= 0
    return is_image if hidden is None else is_image & ~hidden
