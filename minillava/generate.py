"""Answers from a model: `generate` for batches, `stream` for text as it comes.

One loop serves both: the prompt is prefilled, then tokens are drawn and fed one at a time. With a
cache the choice of a dropping plan stands; without one (`use_cache=False`) the whole sequence is
run again for every token and the plan chooses anew.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache, Rows
from .config import Config
from .llava import Batch, Encoded, LLaVA, Prompt
from .pruning.base import Plan, Step
from .sampling import sample

if TYPE_CHECKING:
    from .processor import Processor
    from .tokenizer import StreamDecoder


@dataclass(frozen=True)
class Kept:
    """Image tokens after one step of the plan that ran in the prefill."""

    rule: str
    layer: int  # whose input was pruned; 0 before the decoder
    positions: list[list[int]]  # [b] ascending original positions still present (mask: visible)
    extra: list[int]  # [b] rows without a patch: class token, means


@dataclass(frozen=True)
class Report:
    """What really happened. Rows are counted without padding; times are in seconds."""

    prompt_tokens: list[int]
    kept: list[Kept]
    tokens_entering: list[list[int]]  # [layer][b] all rows
    image_tokens_entering: list[list[int]]  # [layer][b], mask mode: visible ones
    cache_lengths: list[list[int]]  # [layer][b] after the prefill; 0 without a cache
    next_position: list[int]  # of the first new token, in layer 0
    stopped: list[str]  # eos, length, context or stop
    vision: float
    prefill: float
    first_token: float
    per_token: float
    cache_bytes: int  # rows held after the prefill
    peak_bytes: int | None  # CUDA only


@dataclass(frozen=True)
class Layout:
    """Where pictures stand in the prompts, for those who draw what the report says."""

    size: int  # S, pixels along a picture's side
    grid: int  # patches along it
    aspect: str  # how the checkpoint wants pictures made square
    starts: list[list[int]]  # [b] position of the first token of each picture


@dataclass(frozen=True)
class Result:
    """tokens: B lists of new ids, EOS included; texts: the same decoded, None without a tokenizer;
    logits (B, n_new, V) float32 or None, NaN after a sample's end: what each token was chosen from.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    report: Report
    plan: Plan
    layout: Layout
    logits: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn and when to stop; checked when it is made (ValueError)."""

    max_new_tokens: int
    min_new_tokens: int
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    seed: int | None

    def __post_init__(self) -> None:
        counts = (self.max_new_tokens, self.min_new_tokens)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in counts):
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens!r}, min_new_tokens={self.min_new_tokens!r}: "
                "both must be whole numbers"
            )
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number")
        if self.max_new_tokens < 0 or self.min_new_tokens < 0:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}, min_new_tokens={self.min_new_tokens}: "
                "both must be 0 or more"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than "
                f"max_new_tokens={self.max_new_tokens}"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more, finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ValueError(f"stop={self.stop!r}: stop strings must be text, not empty")
        if self.seed is not None and not 0 <= self.seed < 2**62:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^62 - 1")


def generate(
    model: LLaVA,
    batch: Batch,
    plan: Plan | None = None,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    use_cache: bool = True,
    output_logits: bool = False,
    encoded: Encoded | None = None,
) -> Result:
    """Answer every prompt of a batch; each sample gets what it would get alone.

    seed: sample b draws with seed + b (None: plans as with 0, sampling anew each time). encoded:
    the pictures as `encode_images` left them, instead of running the vision tower again.
    Raises ValueError for what cannot be done, before any forward.
    """
    settings = Settings(max_new_tokens, min_new_tokens, _texts(stop), temperature, top_p, seed)
    steps = _steps(model, batch, plan or Plan(), settings, use_cache, output_logits, encoded)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def stream(
    model: LLaVA,
    processor: Processor,
    batch: Batch,
    plan: Plan | None = None,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    use_cache: bool = True,
    encoded: Encoded | None = None,
) -> Generator[str, None, Result]:
    """The answer to one prompt in pieces of text, each as soon as it is certain; then the Result.

    Unfinished UTF-8, and what may be the beginning of a stop string, is held back; the stop string
    itself is not part of the text.
    """
    if len(batch.ids) != 1:
        raise ValueError(f"stream answers one prompt, the batch has {len(batch.ids)}; use generate")
    settings = Settings(max_new_tokens, min_new_tokens, _texts(stop), temperature, top_p, seed)
    steps = _steps(model, batch, plan or Plan(), settings, use_cache, False, encoded)
    return _text(steps, processor.stream_decoder(), settings.stop)


def encode_images(model: LLaVA, batch: Batch, plan: Plan | None = None) -> Encoded | None:
    """Run the vision tower once; the result serves any number of calls with the same pictures.

    It holds what the plan reads; a call with a plan that reads more raises ValueError.
    """
    if batch.pixels is None:
        return None
    prompts_of(model, batch)
    with torch.inference_mode():
        return model.encode(batch.pixels, plan or Plan())


# ---------------------------------------------------------------- before any forward


def prompts_of(model: LLaVA, batch: Batch) -> list[Prompt]:
    """A batch without padding, every picture with its place. ValueError where it is not sound."""
    config, ids, mask = model.config, batch.ids, batch.mask
    if ids.ndim != 2 or ids.dtype != torch.int64 or not len(ids):
        raise ValueError(f"ids must be (B, T) int64, not {tuple(ids.shape)} {ids.dtype}")
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be {tuple(ids.shape)} bool as ids, not {tuple(mask.shape)} {mask.dtype}"
        )
    if batch.focus is not None and len(batch.focus) != len(ids):
        raise ValueError(f"focus has {len(batch.focus)} entries for {len(ids)} prompts")
    pictures = 0 if batch.pixels is None else _check_pixels(config, batch.pixels)
    prompts: list[Prompt] = []
    used = 0
    for b in range(len(ids)):
        sample = ids[b][mask[b]]  # (T,)
        focus = batch.focus[b] if batch.focus is not None else None
        _check_ids(config, sample, f"prompt {b}")
        starts = _image_starts(config, sample.tolist(), b)
        if focus is not None:
            _check_ids(config, focus, f"the focus of prompt {b}")
            focus = focus.to(model.device)
        images = tuple(range(used, used + len(starts)))
        prompts.append(Prompt(sample.to(model.device), images, starts, focus, len(sample)))
        used += len(starts)
    if used != pictures:
        raise ValueError(
            f"the prompts have placeholders for {used} pictures, but pixels holds {pictures}; "
            f"each picture takes {config.vision.num_patches} placeholders"
        )
    return prompts


def _check_pixels(config: Config, pixels: Tensor) -> int:
    S = config.vision.image_size
    if pixels.ndim != 4 or pixels.shape[1:] != (3, S, S) or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be (pictures, 3, {S}, {S}) float, not "
            f"{tuple(pixels.shape)} {pixels.dtype}"
        )
    return len(pixels)


def _check_ids(config: Config, ids: Tensor, what: str) -> None:
    V = config.text.vocab_size
    if ids.ndim != 1 or ids.dtype != torch.int64 or not len(ids):
        raise ValueError(f"{what} must be one row of int64 ids, at least one; got {ids!r}")
    if int(ids.min()) < 0 or int(ids.max()) >= V:
        wrong = ids[(ids < 0) | (ids >= V)][0].item()
        raise ValueError(f"{what} has id {wrong}; the vocabulary has ids 0 to {V - 1}")


def _image_starts(config: Config, ids: list[int], b: int) -> tuple[int, ...]:
    """Where each picture of a prompt begins; its placeholders stand in runs of whole pictures."""
    N, starts, at = config.vision.num_patches, [], 0
    while at < len(ids):
        if ids[at] != config.image_token_id:
            at += 1
            continue
        if ids[at : at + N] != [config.image_token_id] * N:
            run = next((i for i, x in enumerate(ids[at:]) if x != ids[at]), len(ids) - at)
            raise ValueError(
                f"prompt {b} has {run} placeholders from place {at} on that are no whole picture; "
                f"each picture takes {N} in a row"
            )
        starts.append(at)
        at += N
    return tuple(starts)


def check_plan(model: LLaVA, prompts: Sequence[Prompt], plan: Plan, settings: Settings) -> None:
    """Refuse a plan that cannot run on the prompts, and prompts beyond the model's positions."""
    config = model.config
    N, most = config.vision.num_patches, config.text.max_position_embeddings
    for b, prompt in enumerate(prompts):
        plan.check(config.text.num_hidden_layers, N, prompt.starts)
        images = len(prompt.starts)
        left = plan.left(N, images)
        text = len(prompt.ids) - images * N
        if not text and plan.methods:
            raise ValueError(
                f"prompt {b} is nothing but pictures: a plan could leave no row of it; put text "
                "(the beginning token at least) before them"
            )
        if text + left <= most:
            continue
        room = (most - text - min(settings.max_new_tokens, most // 8)) // max(images, 1)
        advice = (
            f"prune before the decoder, for example uniform:keep={room},positions=compact"
            if images and room > 0
            else "shorten the text"
        )
        raise ValueError(
            f"prompt {b} has {len(prompt.ids)} tokens, {text + left} of them for the decoder, but "
            f"the model has {most} positions: {advice}"
        )


def _check_encoded(
    model: LLaVA, batch: Batch, plan: Plan, encoded: Encoded | None
) -> Encoded | None:
    if encoded is None:
        return None
    pictures = 0 if batch.pixels is None else len(batch.pixels)
    if any(len(h) != pictures for h in encoded.hidden.values()):
        raise ValueError(f"encoded holds other pictures than the {pictures} of this batch")
    missing = model.states_read(plan) - encoded.hidden.keys()
    if missing:
        raise ValueError(
            f"encoded lacks hidden states {sorted(missing)} that the plan reads; "
            "call encode_images with this plan"
        )
    return encoded


# ---------------------------------------------------------------- the loop


@torch.inference_mode()
def _steps(
    model: LLaVA,
    batch: Batch,
    plan: Plan,
    settings: Settings,
    use_cache: bool,
    output_logits: bool,
    encoded: Encoded | None,
) -> Generator[list[int | None], None, Result]:
    """One step a token: yields the new id of each sample, None for those that have ended."""
    if not isinstance(plan, Plan):
        raise ValueError(f"plan={plan!r} is no Plan; make one with parse_plan")
    prompts = prompts_of(model, batch)
    plan = plan.resolve(model.config.text.num_hidden_layers, model.config.vision.num_patches)
    check_plan(model, prompts, plan, settings)
    encoded = _check_encoded(model, batch, plan, encoded)
    if settings.stop and model.decode_text is None:
        raise ValueError("stop strings need a model with a tokenizer, as load() gives it")
    B, clock = len(prompts), _Clock(model.device)

    # 1. pictures
    if encoded is None and batch.pixels is not None:
        encoded = model.encode(batch.pixels, plan)
    vision = clock.seconds()

    # 2. prompt
    n_layers, seed = model.config.text.num_hidden_layers, settings.seed or 0
    most = model.config.text.max_position_embeddings
    room = max(min(settings.max_new_tokens, most) - 1, 0)
    cache = KVCache(model.config.text, room, model.dtype, model.device) if use_cache else None
    logits, state = model.prefill(prompts, encoded, plan, cache, seed)
    prefilled, after_prompt = state, clock.seconds()
    cache_lengths = [list(n) for n in cache.lengths] if cache else [[0] * B] * n_layers
    cache_bytes = cache.used_bytes() if cache else 0

    # 3. one token after the other
    generators = _generators(settings, B, model.device)
    limits = [min(settings.max_new_tokens, most - len(rows)) for rows in state.layers[0]]
    tokens: list[list[int]] = [[] for _ in prompts]
    fed: list[list[int]] = [[] for _ in prompts]  # a sample that has ended goes on unheard
    stopped = ["" if limit > 0 else _spent(limit, settings) for limit in limits]
    chosen_from: list[Tensor] = []
    first_token = after_prompt
    while not all(stopped):
        running = [not reason for reason in stopped]
        if output_logits:
            ended = ~torch.tensor(running, device=logits.device)
            chosen_from.append(logits.masked_fill(ended[:, None], float("nan")))
        early = len(fed[0]) < settings.min_new_tokens
        new = _draw(logits, generators, settings, model.config.eos_token_ids if early else ())
        drawn = new.tolist()
        if not fed[0]:
            first_token = clock.seconds()
        for b, token in enumerate(drawn):
            fed[b].append(token)
            if running[b]:
                tokens[b].append(token)
                stopped[b] = _ends(model, tokens[b], limits[b], settings)
        yield [token if here else None for token, here in zip(drawn, running, strict=True)]
        if all(stopped):
            break
        if cache is not None:
            logits = model.decode(new, state)
        else:
            longer = [p.extended(f) for p, f in zip(prompts, fed, strict=True)]
            logits, state = model.prefill(longer, encoded, plan, None, seed)
    later = len(fed[0]) - 1

    # 4. what happened
    report = Report(
        prompt_tokens=[len(p.ids) for p in prompts],
        kept=[_kept(step, rows) for step, rows in prefilled.history],
        tokens_entering=[[len(r) for r in rows] for rows in prefilled.layers],
        image_tokens_entering=[
            [sum(len(c) for c in r.candidates(layer)) for r in rows]
            for layer, rows in enumerate(prefilled.layers)
        ],
        cache_lengths=cache_lengths,
        next_position=[r.next_position for r in prefilled.layers[0]],
        stopped=stopped,
        vision=vision,
        prefill=after_prompt - vision,
        first_token=first_token,
        per_token=(clock.seconds() - first_token) / later if later > 0 else 0.0,
        cache_bytes=cache_bytes,
        peak_bytes=clock.peak_bytes(),
    )
    texts = [model.decode_text(ids) for ids in tokens] if model.decode_text else None
    eye = model.config.vision
    starts = [list(p.starts) for p in prompts]
    layout = Layout(eye.image_size, eye.grid, model.config.image_aspect, starts)
    stacked = None
    if output_logits:
        none = logits.new_empty((B, 0, logits.shape[1]))
        stacked = torch.stack(chosen_from, dim=1) if chosen_from else none
    return Result(tokens, texts, report, plan, layout, stacked)


def _draw(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    settings: Settings,
    forbidden: Sequence[int],
) -> Tensor:
    """One new token per sample (B,) from logits (B, V)."""
    if logits.isnan().any():
        raise ValueError("the model's logits are not numbers: its weights or the input are broken")
    if forbidden:
        logits = logits.index_fill(1, torch.tensor(forbidden, device=logits.device), -torch.inf)
    drawn = [
        sample(row, settings.temperature, settings.top_p, generator)
        for row, generator in zip(logits, generators, strict=True)
    ]
    return torch.stack(drawn)


def _generators(settings: Settings, B: int, device: torch.device) -> list[torch.Generator]:
    made = [torch.Generator(device) for _ in range(B)]
    for b, generator in enumerate(made):
        if settings.seed is None:
            generator.seed()
        else:
            generator.manual_seed(settings.seed + b)
    return made


def _ends(model: LLaVA, tokens: list[int], limit: int, settings: Settings) -> str:
    """Why a sample ends with these tokens; empty: it goes on."""
    if tokens[-1] in model.config.eos_token_ids:
        return "eos"
    if settings.stop and len(tokens) >= settings.min_new_tokens:
        assert model.decode_text is not None
        text = model.decode_text(tokens)
        if any(s in text for s in settings.stop):
            return "stop"
    return _spent(limit, settings) if len(tokens) >= limit else ""


def _spent(limit: int, settings: Settings) -> str:
    return "length" if limit == settings.max_new_tokens else "context"


def _kept(step: Step, rows: Sequence[Rows]) -> Kept:
    found = [r.image_positions(step.layer) for r in rows]
    return Kept(step.method.name, step.layer, [p for p, _ in found], [n for _, n in found])


class _Clock:
    """Seconds since it was made, with the device's work done."""

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


# ---------------------------------------------------------------- text


def _texts(stop: Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _text(
    steps: Generator[list[int | None], None, Result], decoder: StreamDecoder, stop: tuple[str, ...]
) -> Generator[str, None, Result]:
    """Pieces of text from steps of one sample; text from a stop string on is swallowed."""
    held, done = "", False
    while True:
        try:
            (token,) = next(steps)
        except StopIteration as end:
            result: Result = end.value
            break
        assert token is not None
        held += decoder.push(token)
        if done:
            continue
        found = [held.index(s) for s in stop if s in held]
        cut = min(found) if found else len(held) - _beginning(held, stop)
        done = bool(found)
        if held[:cut]:
            yield held[:cut]
        held = held[cut:]
    held += decoder.finish()
    cut = min((held.index(s) for s in stop if s in held), default=len(held))
    if held[:cut] and not done:
        yield held[:cut]
    return result


def _beginning(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    longest = max((len(s) for s in stop), default=0)
    for n in range(min(longest - 1, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return n
    return 0


if __name__ == "__main__":
    import runpy

    runpy.run_module("minillava", run_name="__main__", alter_sys=True)
