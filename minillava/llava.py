"""LLaVA-1.5: pictures through CLIP and the projector into a Llama sequence, pruned on the way.

`encode` runs the vision tower once per picture, `prefill` the prompt of every sample at once,
`decode` one more token each. Samples stand packed one behind the other (llama.py), so that a batch
is what each of its prompts is alone, whatever was dropped from which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache, Mask, Rows, drop, hide, place, splice
from .clip import CLIPVision
from .config import Config
from .llama import Block, LayerView, Llama, PromptAttention, StepAttention, longer, rotate
from .pruning.base import Context, DecoderState, Keep, Plan, Step, VisionState, received

PICTURES = 8  # pictures in the vision tower at one time


@dataclass(frozen=True)
class Batch:
    """Prompts and their pictures; made by the processor or by hand.

    ids (B, T) int64, left-padded, each picture widened to N placeholders; mask (B, T) bool, ids
    under False are ignored; pixels (pictures, 3, S, S) float32 or None, in the order of the
    placeholders; focus: None, or for each sample the ids (t,) that text-guided methods look at, or
    None.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor | None = None
    focus: Sequence[Tensor | None] | None = None


@dataclass(frozen=True)
class Prompt:
    """One sample of a batch without its padding."""

    ids: Tensor  # (T,)
    images: tuple[int, ...]  # its pictures, by number in the batch
    starts: tuple[int, ...]  # place of each one's first token
    focus: Tensor | None
    length: int  # T without tokens generated since

    def rows(self, per_image: int) -> Rows:
        numbers = torch.arange(len(self.ids), device=self.ids.device)
        return Rows(
            identity=numbers,
            position=numbers,
            next_position=len(self.ids),
            prompt=self.length,
            total=len(self.ids),
            starts=self.starts,
            spans=tuple((start, start + per_image) for start in self.starts),
            firsts=self.starts,
            identities=len(self.ids),
        )

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The prompt with generated tokens behind it."""
        return replace(self, ids=torch.cat((self.ids, self.ids.new_tensor(tokens))))


@dataclass(frozen=True)
class Encoded:
    """Pictures as the vision tower saw them: hidden states by number, (pictures, 1 + N, C) each."""

    hidden: Mapping[int, Tensor]


@dataclass
class State:
    """A generation between two tokens: its cache, and the rows that entered each layer."""

    plan: Plan
    prompts: list[Prompt]
    layers: list[list[Rows]]  # [layer][b], as the prefill left them
    history: list[tuple[Step, list[Rows]]]  # rows of each sample after each step
    cache: KVCache | None
    seed: int
    decoded: int = 0  # tokens fed since the prefill


class Projector(nn.Module):
    """Two layers with GELU between: CLIP's width C -> the decoder's D."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class LLaVA(nn.Module):
    """The whole model. `dtype` is that of its arithmetic; weights may be stored in a smaller one.

    `decode_text` turns ids into text, for stop strings; load() sets it, a bare model has none.
    """

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.vision = CLIPVision(config.vision)
        self.projector = Projector(config)
        self.llama = Llama(config.text)
        self.decode_text: Callable[[Sequence[int]], str] | None = None

    @property
    def device(self) -> torch.device:
        return self.llama.embed_tokens.weight.device

    @property
    def feature_layer(self) -> int:
        """The vision tower's hidden state whose patches LLaVA reads, counted from 0."""
        layer = self.config.vision_feature_layer
        return layer if layer >= 0 else layer + self.config.vision.num_hidden_layers + 1

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (T, D) of ids (T,)."""
        return self.llama.embed_tokens(ids).to(self.dtype)

    # ------------------------------------------------------------ pictures

    def states_read(self, plan: Plan) -> set[int]:
        """Hidden states of the vision tower, by number, that LLaVA and the plan's methods read."""
        L, N = self.config.vision.num_hidden_layers, self.config.vision.num_patches
        read = set[int]().union(*(m.vision_layers(L) for m in plan.methods))
        if len(plan.methods) == 1 and plan.methods[0].own_features(N):
            return read
        return read | {self.feature_layer}

    def encode(self, pixels: Tensor, plan: Plan) -> Encoded:
        """Run the vision tower on pixels (pictures, 3, S, S); keeps the states the plan reads."""
        wanted = self.states_read(plan)
        parts = [
            self.vision(part.to(self.device, self.dtype), wanted) for part in pixels.split(PICTURES)
        ]
        return Encoded({i: torch.cat([part[i] for part in parts]) for i in sorted(wanted)})

    # ------------------------------------------------------------ prompt

    def prefill(
        self,
        prompts: Sequence[Prompt],
        encoded: Encoded | None,
        plan: Plan,
        cache: KVCache | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, State]:
        """All prompts through the model: logits (B, V) of the next tokens, and the state."""
        N = self.config.vision.num_patches
        rows = [prompt.rows(N) for prompt in prompts]
        run = _Run(self, prompts, encoded, seed)
        history: list[tuple[Step, list[Rows]]] = []

        features = self._features(prompts, encoded)  # [b][image] (N, C)
        for step in plan.at("vision"):
            for b in range(len(prompts)):
                rows[b], features[b] = run.prune_features(step, b, rows[b], features[b])
            history.append((step, list(rows)))
        features = self._project(features)  # [b][image] (n, D)
        for step in plan.at("embed"):
            for b in range(len(prompts)):
                rows[b], features[b] = run.prune_features(step, b, rows[b], features[b])
            history.append((step, list(rows)))
        run.entered = features
        x = self._packed(prompts, features)  # (R, D): R rows of all samples

        layers: list[list[Rows]] = []
        n_layers = self.config.text.num_hidden_layers
        previous: PromptAttention | None = None
        rope = None
        for layer, block in enumerate(self._blocks()):
            steps = plan.at("decoder", layer)
            if steps:
                parts = list(x.split([len(r) for r in rows]))
                for step in steps:
                    for b in range(len(prompts)):
                        here = Here(block, parts[b], rows[b].position)
                        rows[b], parts[b] = run.prune_rows(step, b, rows[b], here, previous)
                    history.append((step, list(rows)))
                x, rope = torch.cat(parts), None
            if rope is None:
                rope = self.llama.rope(torch.cat([r.position for r in rows]), x.dtype)
                if cache is not None:
                    cache.reserve(plan.until_next(layer, n_layers), [len(r) for r in rows])
            asked = bool(plan.at("decoder", layer + 1))
            attend = PromptAttention(layer, list(rows), cache, asked)
            x = block(x, rope, attend)  # (R, D)
            layers.append(list(rows))
            previous = attend if asked else None
        last = torch.tensor([len(r) for r in rows], device=x.device).cumsum(0) - 1
        logits = self.llama.logits(x[last])  # (B, V)
        return logits, State(plan, list(prompts), layers, history, cache, seed)

    def _features(self, prompts: Sequence[Prompt], encoded: Encoded | None) -> list[list[Tensor]]:
        if encoded is None:
            return [[] for _ in prompts]
        rows = encoded.hidden.get(self.feature_layer)
        if rows is None:  # a method makes every row itself: these only hold their places
            rows = next(iter(encoded.hidden.values()))
        return [[rows[i, 1:] for i in p.images] for p in prompts]

    def _project(self, features: list[list[Tensor]]) -> list[list[Tensor]]:
        flat = [image for sample in features for image in sample]
        if not flat:
            return features
        projected = iter(self.projector(torch.cat(flat)).split([len(image) for image in flat]))
        return [[next(projected) for _ in sample] for sample in features]

    def _packed(self, prompts: Sequence[Prompt], features: list[list[Tensor]]) -> Tensor:
        """Embedded text with the image tokens in their places, all samples in one row (R, D)."""
        N = self.config.vision.num_patches
        parts = self.embed(torch.cat([p.ids for p in prompts])).split([len(p.ids) for p in prompts])
        return torch.cat(
            [
                splice(part, prompt.rows(N).spans, pieces)
                for part, prompt, pieces in zip(parts, prompts, features, strict=True)
            ]
        )

    def _blocks(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.llama.blocks)

    # ------------------------------------------------------------ one token

    def decode(self, tokens: Tensor, state: State) -> Tensor:
        """Feed one token per sample (B,): logits (B, V) of the next. Advances the state's cache.

        Mask-mode methods that read the newest row choose anew; everything else stays as chosen.
        """
        cache = state.cache
        assert cache is not None, "decoding needs a cache; without one the prompt is prefilled anew"
        run = _Run(self, state.prompts, None, state.seed)
        x = self.embed(tokens)  # (B, D)
        renewed: dict[tuple[int, int], Mask] = {}  # by step and sample
        numbers: list[int] = []
        rope = None
        previous: StepAttention | None = None
        for layer, block in enumerate(self._blocks()):
            entering = [r.next_position + state.decoded for r in state.layers[layer]]
            if rope is None or entering != numbers:
                numbers = entering
                position = torch.tensor(numbers, device=x.device)
                rope = self.llama.rope(position, x.dtype)
            rows = [r.with_masks(b, renewed) for b, r in enumerate(state.layers[layer])]
            for step in state.plan.chosen_again(layer):
                for b in range(len(rows)):
                    if rows[b].spans:
                        here = Here(block, x[b : b + 1], position[b : b + 1], cache.held(layer, b))
                        renewed[step.number, b] = run.hide(step, b, rows[b], here, previous)
                        rows[b] = rows[b].with_masks(b, renewed)
            attend = StepAttention(layer, rows, cache)
            x = block(x, rope, attend)  # (B, D)
            previous = attend
        state.decoded += 1
        return self.llama.logits(x)


# ---------------------------------------------------------------- a plan's steps


@dataclass(frozen=True)
class Here:
    """One sample at the door of a decoder layer.

    x (T, D): the rows of this call, the last T of S; position (T,); held (S - T, Hkv, Dh): the
    layer's keys of the rows before them, in a cache.
    """

    block: Block
    x: Tensor
    position: Tensor
    held: Tensor | None = None


class _Run:
    """Carries out the steps of a plan on the samples of one forward."""

    def __init__(
        self, model: LLaVA, prompts: Sequence[Prompt], encoded: Encoded | None, seed: int
    ) -> None:
        self.model, self.prompts, self.encoded = model, prompts, encoded
        self.generators = [torch.Generator().manual_seed(seed + b) for b in range(len(prompts))]
        self.entered: list[list[Tensor]] = []  # [b][image] (n, D), as they entered layer 0

    # ------------------------------------------------------------ acts

    def prune_features(
        self, step: Step, b: int, rows: Rows, features: list[Tensor]
    ) -> tuple[Rows, list[Tensor]]:
        """A step before the decoder: features of each image (n, C) -> what is left of them."""
        starts = [start for start, _ in rows.spans]

        def of(images: Sequence[int], candidates: Sequence[Tensor]) -> Tensor:
            return torch.cat(
                [features[i][c - starts[i]] for i, c in zip(images, candidates, strict=True)]
            )

        chosen = self._choose(step, b, rows, of, None)
        if step.method.mode == "mask":
            return rows.masked(hide(rows, step.number, step.method.until, chosen)), features
        left, kept = drop(rows, rows.spans, chosen, step.method.compact)
        return left, [
            _put(part, index - start, keep)
            for part, start, (index, keep) in zip(features, starts, kept, strict=True)
        ]

    def prune_rows(
        self, step: Step, b: int, rows: Rows, here: Here, previous: PromptAttention | None
    ) -> tuple[Rows, Tensor]:
        """A step before a decoder layer: one sample's rows x (S, D) -> what is left of them."""
        if not rows.spans:
            return rows, here.x
        if step.method.mode == "mask":
            return rows.masked(self.hide(step, b, rows, here, previous)), here.x
        chosen = self._choose_rows(step, b, rows, here, previous)
        shift = step.method.shift
        spans = tuple((start + shift, min(stop + shift, len(rows))) for start, stop in rows.spans)
        left, kept = drop(rows, spans, chosen, step.method.compact)
        if shift:
            left = _unshift(rows, left, kept)
        return left, splice(here.x, spans, [_put(here.x, index, keep) for index, keep in kept])

    def hide(
        self,
        step: Step,
        b: int,
        rows: Rows,
        here: Here,
        previous: PromptAttention | StepAttention | None,
    ) -> Mask:
        """The mask of a step before a decoder layer, for the prompt or (again) for a new token."""
        chosen = self._choose_rows(step, b, rows, here, previous)
        return hide(rows, step.number, step.method.until, chosen)

    # ------------------------------------------------------------ choices

    def _choose_rows(
        self,
        step: Step,
        b: int,
        rows: Rows,
        here: Here,
        previous: PromptAttention | StepAttention | None,
    ) -> list[tuple[Tensor, Keep]]:
        def of(_: Sequence[int], candidates: Sequence[Tensor]) -> Tensor:
            return self._whole(here)[torch.cat(list(candidates))]

        state = partial(self._decoder_state, step, b, rows, here, previous)
        return self._choose(step, b, rows, of, state)

    def _choose(
        self,
        step: Step,
        b: int,
        rows: Rows,
        features: Callable[[Sequence[int], Sequence[Tensor]], Tensor],
        decoder: Callable[[Sequence[int], Tensor], DecoderState] | None,
    ) -> list[tuple[Tensor, Keep]]:
        """Ask the method, once an image or once for all; for each image its candidates and Keep."""
        model, prompt, method = self.model, self.prompts[b], step.method
        N, grid = model.config.vision.num_patches, model.config.vision.grid
        candidates = rows.candidates(step.layer, step.number, method.shift)
        everyone = list(range(len(candidates)))
        groups = [everyone] if method.scope == "all" and everyone else [[i] for i in everyone]
        chosen: list[tuple[Tensor, Keep]] = []
        for group in groups:
            parts = [candidates[i] for i in group]
            if not any(map(len, parts)):  # nothing left to choose from: the method is not asked
                chosen += [(part, Keep(part)) for part in parts]
                continue
            numbers = [rows.patches(i, candidates[i], N) for i in group]
            context = Context(
                stage=step.stage,
                layer=step.layer,
                part=step.part,
                total=N * len(group),
                grid=grid,
                patches=torch.cat([n + j * N * (n >= 0) for j, n in enumerate(numbers)]),
                generator=self.generators[b],
                features=partial(features, group, parts),
                focus=lambda: model.embed(self._focus_ids(prompt, rows)),
                focus_text=lambda: self._text_of(prompt, rows),
                vision=partial(self._vision_state, [prompt.images[i] for i in group]),
                decoder=None if decoder is None else decoder(group, torch.cat(parts)),
            )
            chosen += _by_image(parts, method.choose(context))
        return chosen

    # ------------------------------------------------------------ what a method may ask for

    def _decoder_state(
        self,
        step: Step,
        b: int,
        rows: Rows,
        here: Here,
        previous: PromptAttention | StepAttention | None,
        group: Sequence[int],
        candidates: Tensor,
    ) -> DecoderState:
        model, prompt = self.model, self.prompts[b]
        before = 0 if here.held is None else len(here.held)
        newest = torch.tensor([before + len(here.x) - 1], device=here.x.device)
        text_rows = rows.text_rows()

        def coming(asked: Tensor, strongest: bool) -> Tensor:
            h, (cos, sin) = here.block.norm1(here.x), model.llama.rope(here.position, here.x.dtype)
            own = asked - before
            q = rotate(here.block.attn.query(h[own]), (cos[own], sin[own]))
            k = rotate(here.block.attn.key(h), (cos, sin))
            if here.held is not None:
                k = torch.cat((here.held, k))
            hidden = rows.hidden(step.layer, step.number)
            if hidden is not None:
                hidden = longer(hidden, len(k))
            return received(q, k, asked, hidden, strongest)

        def view() -> LayerView:
            if previous is None:
                raise ValueError(
                    f"{step.method.name}: layer 0 has no layer before it whose attention could be "
                    "read; ask for that of the coming layer, attention(rows, 0)"
                )
            return previous.view(b)

        return DecoderState(
            rows=candidates,
            text_rows=text_rows,
            newest=newest,
            text=lambda: model.embed(prompt.ids[rows.identity[text_rows]]),
            entered=lambda: torch.cat([self.entered[b][i] for i in group]),
            hidden=lambda: self._whole(here),
            final_norm=model.llama.norm,
            keys=lambda: view().keys(rows),
            received=lambda asked, layer, strongest: (
                coming(asked, strongest) if layer == 0 else view().received(asked, rows, strongest)
            ),
        )

    @staticmethod
    def _whole(here: Here) -> Tensor:
        if here.held is not None:
            raise ValueError(
                "while decoding, rows of the prompt are gone; say newest_row = False, so that the "
                "choice of the prompt stands, or read nothing but the newest row's attention"
            )
        return here.x

    def _vision_state(self, pictures: list[int]) -> VisionState:
        assert self.encoded is not None, "the vision tower's state is gone while decoding"
        hidden = {i: h[pictures] for i, h in self.encoded.hidden.items()}
        return VisionState(self.model.vision, hidden, self.model.feature_layer)

    @staticmethod
    def _focus_ids(prompt: Prompt, rows: Rows) -> Tensor:
        """What text-guided methods look at: the focus, else the text behind the last image."""
        if prompt.focus is not None:
            return prompt.focus
        return prompt.ids[rows.identity[rows.text_rows()]]

    def _text_of(self, prompt: Prompt, rows: Rows) -> str:
        if self.model.decode_text is None:
            raise ValueError("this method reads text: it needs a model with a tokenizer (load)")
        return self.model.decode_text(self._focus_ids(prompt, rows).tolist())


def _by_image(parts: Sequence[Tensor], keep: Keep) -> list[tuple[Tensor, Keep]]:
    """Split a choice among the candidates of several images into one for each."""
    if len(parts) == 1:
        return [(parts[0], keep)]
    result, at = [], 0
    for part in parts:
        mine = keep.index[(keep.index >= at) & (keep.index < at + len(part))] - at
        result.append((part, replace(keep, index=mine)))
        at += len(part)
    return result


def _put(rows: Tensor, index: Tensor, keep: Keep) -> Tensor:
    """What stands there after a choice, from rows (n, C) and the numbers of those kept."""
    kept = rows[index] if keep.rows is None else keep.rows.to(rows.dtype)
    extra = None if keep.extra is None else keep.extra.to(rows.dtype)
    return place(kept, extra, keep.extra_first)


def _unshift(rows: Rows, left: Rows, kept: list[tuple[Tensor, Keep]]) -> Rows:
    """Image spans after a window that began late: rows before it stayed, and the text rows that
    stayed at its end are none of the image's."""
    spans = []
    for (start, stop), (_, end), (index, _) in zip(rows.spans, left.spans, kept, strict=True):
        spans.append((start, end - int((index >= stop).sum())))
    return replace(left, spans=tuple(spans))
