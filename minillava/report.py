"""What a generation returns: the tokens, and a report of what really happened.

dataclasses.asdict(report) holds plain numbers, strings and lists, so json.dumps takes it as it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .engine import Pruned, State
from .llava import LLaVA
from .pruning.base import Plan
from .rows import Rows


@dataclass(frozen=True)
class Kept:
    """Which image tokens were left after one pruning step of the prefill."""

    rule: str  # name of the method
    layer: int  # whose input was pruned; 0 before the decoder
    positions: list[list[int]]  # [b] ascending original positions still present (mask: visible)
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
    vision: float
    prefill: float
    first_token: float  # from the start to the first token
    per_token: float  # mean of the later ones
    cache_bytes: int  # keys and values held after the prefill
    peak_bytes: int | None  # peak of allocated memory, CUDA only


@dataclass(frozen=True)
class Layout:
    """Where images are in the prompts, for drawing what the report says."""

    size: int  # S, pixels along an image's side
    grid: int  # patches along it
    aspect: str  # how the checkpoint wants images made square
    starts: list[list[int]]  # [b] index of the first token of each image


@dataclass(frozen=True)
class Result:
    """The answers to a batch."""

    tokens: list[list[int]]  # [b] new ids, EOS included
    texts: list[str] | None  # [b] the same decoded; None without a tokenizer
    report: Report
    plan: Plan
    layout: Layout
    logits: Tensor | None = None  # (B, n_new, V): each token's logits; NaN after a sample's end


class Clock:
    """Seconds since it was made. It waits for CUDA before it reads the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self) -> float:
        return self._now() - self.start

    def peak_bytes(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device)


@dataclass
class Times:
    """Seconds of one generation, as they are measured."""

    vision: float
    prefill: float
    first_token: float = 0.0
    end: float = 0.0
    n_tokens: int = 0

    def note_token(self, clock: Clock) -> None:
        if not self.n_tokens:
            self.first_token = clock.seconds()
        self.n_tokens += 1

    @property
    def per_token(self) -> float:
        later = self.n_tokens - 1
        return (self.end - self.first_token) / later if later > 0 else 0.0


def make_report(
    state: State, stopped: list[str], times: Times, cache_bytes: int, peak_bytes: int | None
) -> Report:
    """The report on a generation whose prefill left `state`."""
    by_layer = [segment for segment in state.segments for _ in segment.layers]
    entering = [[len(rows) for rows in segment.rows] for segment in by_layer]
    images = [count_images(segment.rows, segment.hidden) for segment in state.segments]
    return Report(
        prompt_tokens=[len(s.prompt.ids) for s in state.samples],
        kept=[image_tokens_left(pruned) for pruned in state.history],
        tokens_entering=entering,
        image_tokens_entering=[
            list(n) for n, s in zip(images, state.segments, strict=True) for _ in s.layers
        ],
        cache_lengths=[list(n) if state.cache else [0] * len(n) for n in entering],
        next_position=[rows.next_position for rows in state.segments[0].rows],
        stopped=stopped,
        vision=times.vision,
        prefill=times.prefill,
        first_token=times.first_token or times.vision + times.prefill,
        per_token=times.per_token,
        cache_bytes=cache_bytes,
        peak_bytes=peak_bytes,
    )


def make_result(
    model: LLaVA, state: State, tokens: list[list[int]], report: Report, logits: Tensor | None
) -> Result:
    vision, tokenizer = model.config.vision, model.tokenizer
    texts = [tokenizer.decode(ids) for ids in tokens] if tokenizer else None
    starts = [list(s.prompt.starts) for s in state.samples]
    layout = Layout(vision.image_size, vision.grid, model.config.image_aspect, starts)
    return Result(tokens, texts, report, state.plan, layout, logits)


def count_images(rows: list[Rows], hidden: list[Tensor | None]) -> list[int]:
    """[b] number of image rows that are visible."""
    return [int(visible_images(r, h).sum()) for r, h in zip(rows, hidden, strict=True)]


def image_tokens_left(pruned: Pruned) -> Kept:
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
