"""The forward pass with pruning in it: `prefill` runs the prompts, `decode` one more token each.

Before the projector, before the decoder and before any decoder layer a plan may ask methods which
image tokens stay. In drop mode the others leave the sequence, so that all later layers, and their
KV cache, are really shorter; in mask mode they stay and are hidden from attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .llava import Encoded, LLaVA
from .pruning.base import Context, Method, Plan, Step, check_keep
from .rows import Choice, Keep, Rows, drop_rows, on_device
from .sample import CacheView, LayerAttention, Mask, Prompt, Sample, Segment

Memory = dict[tuple[int, ...], dict[str, Any]]  # Context.memory of one sample, by step and images


@dataclass(frozen=True)
class Pruned:
    """What one step of the plan did to each sample [b]."""

    step: Step
    before: list[Rows]
    choices: list[list[Choice]]  # without the hidden states of new rows
    left: list[Rows]  # the image rows that are present and visible after it


@dataclass
class State:
    """The samples on their way, what the prefill did, and what decode() needs between tokens."""

    plan: Plan
    samples: list[Sample]
    cache: KVCache | None
    segments: list[Segment] = field(default_factory=list)  # that ran
    history: dict[int, list[Pruned]] = field(default_factory=dict)  # by tokens generated until then
    position: Tensor = field(init=False)  # (segments, B) of the next token in their layers
    length: Tensor = field(init=False)  # (segments, B) rows that these hold of each sample
    graph: Any = None  # a CUDA graph of one token, if the model was loaded with compile=True


def prefill(
    model: LLaVA,
    prompts: Sequence[Prompt],
    encoded: Encoded | None,
    plan: Plan,
    cache: KVCache | None = None,
    seed: int = 0,
    memories: Sequence[Memory] | None = None,
) -> tuple[Tensor, State]:
    """Run all prompts through the model: logits (B, V) of the next tokens, and the state.

    seed: sample b draws random choices with seed + b. memories: what methods kept from earlier
    calls on the same samples (generation without a cache runs the prefill once per token).
    """
    memories = memories or [{} for _ in prompts]
    samples = [
        begin_sample(model, prompt, encoded, seed + b, memory)
        for b, (prompt, memory) in enumerate(zip(prompts, memories, strict=True))
    ]
    state = State(plan, samples, cache)
    prune(model, state, plan.at("vision"))  # s.x is (S, C), text rows still zero
    embed_rows(model, samples)  # s.x is (S, D)
    prune(model, state, plan.at("embed"))
    for s in samples if any(step.stage == "decoder" for step in plan.steps) else ():
        s.embedded = s.x, s.rows

    for layers in plan.segments(model.config.text.num_hidden_layers):
        prune(model, state, plan.at("decoder", layers.start))
        hidden, rows = [s.hidden(layers.start) for s in samples], [s.rows for s in samples]
        n_image_rows = [len(s.visible_images(layers.start)) for s in samples]
        state.segments.append(Segment(layers, rows, n_image_rows, list(rows), hidden))
        if cache is not None:
            cache.reserve(layers, [len(s.rows) for s in samples])
        rope = model.llama.rope(torch.cat([s.rows.position for s in samples]), model.dtype)
        x = pack_rows(samples)  # (R, D): R rows of all samples
        seen = [None if h is None else on_device((~h).nonzero()[:, 0], x) for h in hidden]
        for layer in layers:
            entered = x if plan.at("decoder", layer + 1) else None
            attend = LayerAttention(layer, samples, cache, hidden, seen, None, entered)
            x = model.block(layer)(x, rope, attend)  # (R, D)
        unpack_rows(samples, x)
    logits = model.llama.logits(torch.cat([s.x[-1:] for s in samples]))  # (B, V)
    begin_decoding(state)
    return logits, state


def begin_sample(
    model: LLaVA, prompt: Prompt, encoded: Encoded | None, seed: int, memory: Memory
) -> Sample:
    """A prompt with its image features (S, C) in the places of their placeholders."""
    rows = prompt.rows(model.config.vision.num_patches)
    C, vision = model.config.vision.hidden_size, {}
    x = torch.zeros(len(rows), C, dtype=model.dtype, device=model.device)
    if prompt.images:
        assert encoded is not None
        mine = slice(prompt.images[0], prompt.images[-1] + 1)  # views: nothing is copied
        vision = {i: state[mine] for i, state in encoded.items()}
        # (images, 1 + N, C); any state serves if a method computes all image features itself
        features = vision.get(model.feature_layer, next(iter(vision.values()))).to(x.dtype)
        x[on_device((rows.image >= 0).nonzero()[:, 0], x)] = features[:, 1:].flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    return Sample(prompt, rows, x, vision, generator, memory, len(prompt.ids) - prompt.length)


def embed_rows(model: LLaVA, samples: Sequence[Sample]) -> None:
    """Image features (S, C) through the projector, text rows from the embedding table: (S, D)."""
    is_image = torch.cat([s.rows.image for s in samples]) >= 0  # (R,)
    images = on_device(is_image.nonzero()[:, 0], samples[0].x)  # (n,)
    features = model.projector(pack_rows(samples)[images])  # (n, D)
    # rows that methods added have no token: any one stands in, and is overwritten
    ids = [s.prompt.ids[s.rows.id.clamp(max=len(s.prompt.ids) - 1)] for s in samples]
    y = model.embed(torch.cat(ids))  # (R, D)
    y[images] = features.to(y.dtype)  # under autocast they have another dtype
    unpack_rows(samples, y)


def pack_rows(samples: Sequence[Sample]) -> Tensor:
    """The hidden states of all samples one after another, (R, D); samples keep no copy."""
    x = torch.cat([s.x for s in samples]) if len(samples) > 1 else samples[0].x
    for s in samples:
        s.x = x.new_empty(0, x.shape[1])  # an empty slice would hold all of x
    return x


def unpack_rows(samples: Sequence[Sample], x: Tensor) -> None:
    """Give each sample its part of x (R, D)."""
    for s, part in zip(samples, x.split([len(s.rows) for s in samples]), strict=True):
        s.x = part


# ---------------------------------------------------------------- one token


def begin_decoding(state: State) -> None:
    """Free what only methods of the prefill read; count the rows that each layer's cache holds."""
    for s in state.samples:
        s.vision, s.embedded, s.x = {}, None, s.x.new_empty(0, s.x.shape[1])
    held = [segment.held for segment in state.segments]
    counts = [[[r.next_position for r in rows] for rows in held], [[*map(len, r)] for r in held]]
    state.position, state.length = on_device(torch.tensor(counts), state.samples[0].x)


def decode(model: LLaVA, tokens: Tensor, state: State) -> Tensor:
    """Feed one token per sample (B,): logits (B, V) of the next. Advances the state's KV cache.

    Dropped rows are gone. Masks by a score of the newest row are chosen again (Plan.chosen_again).
    """
    cache, samples, plan = state.cache, state.samples, state.plan
    assert cache is not None, "decoding needs a cache; without one, the prompt is prefilled again"
    x = model.embed(tokens)  # (B, D)
    for s in samples:
        s.generated += 1
    for number, segment in enumerate(state.segments):
        layers, position = segment.layers, state.position[number]  # (B,)
        for b, s in enumerate(samples):
            s.rows, s.x = segment.held[b], x[b : b + 1]
            s.cached_keys, s.position = cache.keys_of(layers.start, b), position[b : b + 1]
        prune(model, state, plan.chosen_again(layers.start))
        hidden = [s.hidden(layers.start) for s in samples]
        view = view_cache(state, number, hidden)
        rope = model.llama.rope(position, model.dtype)
        for layer in layers:
            entered = x if plan.chosen_again(layer + 1) else None
            attend = LayerAttention(layer, samples, cache, hidden, [], view, entered)
            x = model.block(layer)(x, rope, attend)  # (B, D)
    state.position += 1
    state.length += 1
    return model.llama.logits(x)


def view_cache(state: State, number: int, hidden: Sequence[Tensor | None]) -> CacheView:
    """What new tokens see in the layers of segment `number`, with rows hidden [b] (S,) masked."""
    assert state.cache is not None
    # the same numbers on the host and on the device
    lengths, length = state.cache.lengths[state.segments[number].layers.start], state.length[number]
    end, ragged = max(lengths) + 1, min(lengths) < max(lengths)
    if not ragged and all(h is None for h in hidden):
        return CacheView(end, None, None)
    visible = torch.arange(end, device=length.device) <= length[:, None]  # (B, end)
    if any(h is not None for h in hidden):
        masked = torch.zeros(len(hidden), end, dtype=torch.bool)
        for b, rows in enumerate(hidden):
            if rows is not None:
                masked[b, : len(rows)] = rows
        visible &= ~on_device(masked, visible)
    return CacheView(end, length if ragged else None, visible[:, None, None])


# ---------------------------------------------------------------- pruning


def prune(model: LLaVA, state: State, steps: Sequence[Step]) -> None:
    """Carry out steps of the plan on the rows that each sample has now, and note what they did."""
    samples = state.samples
    for step in steps:
        before, done = [s.rows for s in samples], []
        for s in samples:
            chosen = ask_method(model, step, s)
            done.append([replace(c, keep=replace(c.keep, merged=None, extra=None)) for c in chosen])
            if step.method.mode == "mask":
                s.masks[step.number] = hide_rows(step, s.rows, chosen)
                continue
            for choice in reversed(chosen):  # so that the row numbers of the others stay valid
                s.x, s.rows = drop_rows(s.x, s.rows, choice)
            s.rows = s.rows.renumber() if step.method.compact else s.rows
        if samples[0].cached_keys is None:
            forget_rows(state, step.method)
        left = [s.visible_images(step.layer) for s in samples]
        noted = state.history.setdefault(samples[0].generated, [])
        noted.append(Pruned(step, before, done, left))
    for s in samples:
        s.last = None  # the queries and keys that were kept for these steps


def forget_rows(state: State, method: Method) -> None:
    """Cut from the caches of earlier layers the rows that have left the sequence (cache=all)."""
    for segment in state.segments:
        if method.cut_from is None or segment.layers.start < method.cut_from:
            continue
        pairs = list(zip(segment.held, state.samples, strict=True))
        stay = [torch.isin(rows.id, s.rows.id).nonzero()[:, 0] for rows, s in pairs]
        held = [rows.select(i) for rows, i in zip(segment.held, stay, strict=True)]
        segment.held[:] = [replace(r, next_position=len(r)) if method.compact else r for r in held]
        hidden = zip(segment.hidden, stay, strict=True)
        segment.hidden[:] = [None if h is None else h[i] for h, i in hidden]
        if state.cache is not None:
            state.cache.cut(segment.layers, stay)


def ask_method(model: LLaVA, step: Step, sample: Sample) -> list[Choice]:
    """Ask a step's method what to keep, image by image, or once for all images (scope=all)."""
    images = list(range(len(sample.prompt.images)))
    groups = [images] if step.method.scope == "all" and images else [[i] for i in images]
    hidden = sample.hidden(step.layer, before=step.number)
    choices = []
    for group in groups:
        window = torch.cat([sample.rows.of_image(i) for i in group])
        window = window + step.method.shift(sample.prompt.starts[group[0]])
        window = window[window < len(sample.rows)]
        candidates = window if hidden is None else window[~hidden[window]]
        keep = Keep(candidates)  # empty if there is nothing to choose from: no method is asked
        if len(candidates):
            keep = step.method.choose(Context(model, sample, step, group, candidates))
            keep = check_keep(step.method, keep, len(candidates), sample.x.shape[1])
            keep = model.llama.agree(keep)
        choices.append(Choice(window, candidates, keep))
    return choices


def hide_rows(step: Step, rows: Rows, choices: Sequence[Choice]) -> Mask:
    """The mask that hides the candidates that were not kept."""
    hidden = torch.zeros(rows.n_ids, dtype=torch.bool)
    for choice in choices:
        ids = rows.id[choice.candidates]
        hidden[ids] = True
        hidden[ids[choice.keep.index]] = False
    return Mask(step.layer, step.method.until, hidden)


def hidden_states_read(model: LLaVA, plan: Plan) -> set[int]:
    """Numbers of the vision tower's hidden states that LLaVA and the plan's methods read."""
    n, read = model.config.vision.num_hidden_layers, set[int]()
    for method in plan.methods:
        layers: Any = method.vision_layers(n)
        if not isinstance(layers, tuple) or not set(layers) <= {*range(n + 1)}:
            said, form = f"vision_layers() gave {layers!r}", f"a tuple of numbers from 0 to {n}"
            raise ValueError(f"{method.label}: {said}; it must be {form}")
        read |= set(layers)
    own = [method.own_features(model.config.vision.num_patches) for method in plan.methods]
    return read if read and own == [True] else read | {model.feature_layer}
