"""Check a request and split it into prompts, before the first forward of a generation.

Each check raises ValueError with one line that names the value, what was allowed and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .llava import Encoded, LLaVA
from .pruning.base import Plan
from .sample import Batch, Prompt


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn, and when to stop."""

    max_new_tokens: int = 256
    # with fewer tokens neither EOS nor a stop string ends the answer; 0: as the checkpoint says
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()  # strings that end the answer
    temperature: float = 0.0  # 0: the likeliest token (greedy)
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    seed: int | None = None  # sample b draws with seed + b; None: any for sampling, 0 in plans
    use_cache: bool = True  # False: the whole sequence is run again for every token
    output_logits: bool = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str | None) else tuple(self.stop)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number, 0 or more")
        least, most, t, p = self.min_new_tokens, self.max_new_tokens, self.temperature, self.top_p
        seed = 0 if self.seed is None else self.seed
        texts, real = all(isinstance(s, str) and s for s in self.stop_strings), (int, float)
        for good, rule in (
            (least <= most, f"min_new_tokens={least} is more than max_new_tokens={most}"),
            (isinstance(t, real) and 0 <= t < inf, f"temperature={t!r} must be 0 or more, finite"),
            (isinstance(p, real) and 0 < p <= 1, f"top_p={p!r} must be above 0, at most 1"),
            (texts, f"stop={self.stop!r}: stop strings must be text, not empty"),
            (type(seed) is int and 0 <= seed < 2**62, f"seed={seed!r} must be from 0 to 2^62 - 1"),
        ):
            if not good:
                raise ValueError(rule)


def prompts_of(model: LLaVA, batch: Batch) -> list[Prompt]:
    """The samples of a batch without padding, with the place of every image."""
    config, ids, mask = model.config, batch.ids.cpu(), batch.mask.cpu()
    if ids.ndim != 2 or ids.dtype != torch.int64 or not len(ids):
        raise ValueError(f"ids must be (B, T) int64, not {tuple(ids.shape)} {ids.dtype}")
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be {tuple(ids.shape)} bool as ids, not {tuple(mask.shape)} {mask.dtype}"
        )
    if batch.focus is not None and len(batch.focus) != len(ids):
        raise ValueError(f"focus has {len(batch.focus)} entries for {len(ids)} prompts")
    S = config.vision.image_size
    pixels = torch.zeros(0, 3, S, S) if batch.pixels is None else batch.pixels
    if pixels.ndim != 4 or pixels.shape[1:] != (3, S, S) or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be (images, 3, {S}, {S}) float, not {tuple(pixels.shape)} {pixels.dtype}"
        )
    sizes = batch.sizes or ()
    if batch.sizes is not None:
        check_sizes(sizes, len(pixels))
    prompts, used = list[Prompt](), 0
    for b in range(len(ids)):
        tokens = ids[b][mask[b]]  # (T,)
        focus = batch.focus[b] if batch.focus is not None else None
        check_ids(config, tokens, f"prompt {b}")
        starts = find_images(config, tokens.tolist(), b)
        if focus is not None:
            focus = focus.cpu()
            check_ids(config, focus, f"the focus of prompt {b}")
        images = tuple(range(used, used + len(starts)))
        used += len(starts)
        mine = tuple(sizes[i] for i in images if sizes)
        prompts.append(Prompt(tokens, images, starts, focus, len(tokens), mine))
    if used != len(pixels):
        raise ValueError(
            f"the prompts have placeholders for {used} images, but pixels holds {len(pixels)}; "
            f"each image takes {config.vision.num_patches} placeholders"
        )
    return prompts


def check_sizes(sizes: Sequence[Any], n_images: int) -> None:
    for size in sizes if len(sizes) == n_images else [f"{len(sizes)} entries"]:
        match size:
            case (int(width), int(height), "crop" | "pad") if min(width, height) > 0:
                continue
        form = "(width, height, 'crop' or 'pad')"
        raise ValueError(f"sizes has {size!r}; give {form} for each of {n_images} images")


def check_ids(config: Config, ids: Tensor, what: str) -> None:
    V = config.text.vocab_size
    if ids.ndim != 1 or ids.dtype != torch.int64 or not len(ids):
        raise ValueError(f"{what} must be one row of int64 ids, at least one; got {ids!r}")
    if wrong := [id for id in ids.tolist() if not 0 <= id < V]:
        raise ValueError(f"{what} has id {wrong[0]}; the vocabulary has ids 0 to {V - 1}")


def find_images(config: Config, ids: list[int], b: int) -> tuple[int, ...]:
    """Where each image of prompt b begins. Two adjacent images are 2N placeholders in a row."""
    N, starts, at = config.vision.num_patches, list[int](), 0
    for is_image, run in groupby(id == config.image_token_id for id in ids):
        n = len(list(run))
        if is_image and n % N:
            raise ValueError(
                f"prompt {b} has {n % N} placeholders from index {at + n - n % N} on, not a whole "
                f"image; each image takes {N} in a row"
            )
        starts += range(at, at + n, N) if is_image else ()
        at += n
    return tuple(starts)


def check_encoded(batch: Batch, encoded: Encoded, read: set[int]) -> None:
    """Images encoded before have to be the batch's, with the hidden states that are read."""
    n_images = 0 if batch.pixels is None else len(batch.pixels)
    if any(len(state) != n_images for state in encoded.values()):
        raise ValueError(f"encoded holds other images than the {n_images} of this batch")
    if missing := read - encoded.keys():
        raise ValueError(
            f"encoded lacks hidden states {sorted(missing)} that the plan reads; "
            "call encode_images with this plan"
        )


def check_plan(model: LLaVA, prompts: Sequence[Prompt], plan: Plan, settings: Settings) -> None:
    """Refuse a plan that cannot run on the prompts, and prompts beyond the model's positions."""
    config = model.config
    if settings.stop_strings and model.tokenizer is None:
        raise ValueError("stop strings need a model with a tokenizer, as load() gives it")
    N, most = config.vision.num_patches, config.text.max_position_embeddings
    for b, prompt in enumerate(prompts):
        images = len(prompt.starts)
        for method in plan.methods if images else ():
            method.check_model(model)
            n_tokens = N * images if method.scope == "all" else N
            method.check(config.text.num_hidden_layers, n_tokens, prompt.starts)
        for number, step in enumerate(plan.steps if images else (), 1):
            step.method.check_order(plan.steps[:number], N, images)
        text, left = len(prompt.ids) - images * N, plan.left(N, images)
        if not text and plan.methods:
            raise ValueError(
                f"prompt {b} is nothing but images: a plan could leave no row of it; put text "
                "(at least the BOS token) before them"
            )
        if text + left <= most:
            continue
        room = (most - text - min(settings.max_new_tokens, most // 8)) // max(images, 1)
        advice = "shorten the text"
        if images and room > 0:
            advice = f"prune before the decoder, for example uniform:keep={room},positions=compact"
        raise ValueError(
            f"prompt {b} has {len(prompt.ids)} tokens, {text + left} of them for the decoder, but "
            f"the model has {most} positions: {advice}"
        )
