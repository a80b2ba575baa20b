"""LLaVA-1.5: pictures through CLIP and the projector into a Llama sequence, pruned on the way.

`encode` runs the vision tower once per picture, `prefill` the prompt of every sample at once,
`decode` one more token each. Samples stand packed one behind the other (llama.py), so that a batch
is what each of its prompts is alone, whatever was dropped from which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache, Mask, Rows, drop, hide, place, splice
from .clip import CLIPVision
from .config import Config
from .llama import Block, Llama, rotate
from .pruning.base import Context, DecoderState, Keep, Plan, Step, VisionState, received

QUERY_ROWS = 256  # rows whose visibility is held as a mask at one time
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
        L = self.config.vision.num_hidden_layers
        return {self.feature_layer}.union(*(m.vision_layers(L) for m in plan.methods))

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

        features = [
            [encoded.hidden[self.feature_layer][i, 1:] for i in p.images] if encoded else []
            for p in prompts
        ]  # [b][image] (N, C)
        for step in plan.steps:
            if step.stage == "vision":
                for b in range(len(prompts)):
                    rows[b], features[b] = run.prune_features(step, b, rows[b], features[b])
                history.append((step, list(rows)))
        features = self._project(features)  # [b][image] (n, D)
        for step in plan.steps:
            if step.stage == "embed":
                for b in range(len(prompts)):
                    rows[b], features[b] = run.prune_features(step, b, rows[b], features[b])
                history.append((step, list(rows)))
        run.entered = features
        embedded = self.embed(torch.cat([p.ids for p in prompts]))
        x = torch.cat(
            [
                splice(part, prompt.rows(N).spans, pieces)
                for part, prompt, pieces in zip(
                    embedded.split([len(p.ids) for p in prompts]), prompts, features, strict=True
                )
            ]
        )  # (R, D): R rows of all samples

        layers: list[list[Rows]] = []
        previous: PromptAttention | None = None
        rope = None
        for layer, block in enumerate(self.llama.blocks):
            steps = [s for s in plan.steps if s.stage == "decoder" and s.layer == layer]
            if steps:
                parts = list(x.split([len(r) for r in rows]))
                for step in steps:
                    for b in range(len(prompts)):
                        rows[b], parts[b] = run.prune_rows(
                            step, b, rows[b], parts[b], block, previous
                        )
                    history.append((step, list(rows)))
                x, rope = torch.cat(parts), None
            if rope is None:
                rope = self.llama.rope(torch.cat([r.position for r in rows]), x.dtype)
            attend = PromptAttention(layer, list(rows), cache)
            x = block(x, rope, attend)  # (R, D)
            layers.append(list(rows))
            previous = attend
        last = torch.tensor([len(r) for r in rows], device=x.device).cumsum(0) - 1
        logits = self.llama.logits(x[last])  # (B, V)
        return logits, State(plan, list(prompts), layers, history, cache)

    def _project(self, features: list[list[Tensor]]) -> list[list[Tensor]]:
        flat = [image for sample in features for image in sample]
        if not flat:
            return features
        projected = iter(self.projector(torch.cat(flat)).split([len(image) for image in flat]))
        return [[next(projected) for _ in sample] for sample in features]

    # ------------------------------------------------------------ one token

    def decode(self, tokens: Tensor, state: State) -> Tensor:
        """Feed one token per sample (B,): logits (B, V) of the next. Advances the state's cache.

        Mask-mode methods that read the newest row choose anew; everything else stays as chosen.
        """
        cache, config = state.cache, self.config.text
        assert cache is not None, "decoding needs a cache; without one the prompt is prefilled anew"
        run = _Run(self, state.prompts, None, 0)
        remask = [s for s in state.plan.steps if s.method.mode == "mask" and s.method.newest_row]
        x = self.embed(tokens)  # (B, D)
        renewed: dict[tuple[int, int], Mask] = {}  # by step and sample
        numbers: tuple[int, ...] = ()
        rope = None
        attend: StepAttention | None = None
        for layer, block in enumerate(self.llama.blocks):
            entering = tuple(r.next_position + state.decoded for r in state.layers[layer])
            if rope is None or entering != numbers:
                numbers = entering
                rope = self.llama.rope(torch.tensor(numbers, device=x.device), x.dtype)
            for step in remask:
                if step.stage == "decoder" and step.layer == layer:
                    assert isinstance(block, Block)
                    for b, rows in enumerate(state.layers[layer]):
                        if rows.spans:
                            part = (rope[0][b : b + 1], rope[1][b : b + 1])
                            renewed[step.number, b] = run.mask_again(
                                step, b, rows, x[b : b + 1], block, part, attend, cache
                            )
            rows_now = [
                replace(r, masks=tuple(renewed.get((m.step, b), m) for m in r.masks))
                if r.masks
                else r
                for b, r in enumerate(state.layers[layer])
            ]
            attend = StepAttention(layer, rows_now, cache, config.num_key_value_heads)
            x = block(x, rope, attend)  # (B, D)
        state.decoded += 1
        return self.llama.logits(x)


# ---------------------------------------------------------------- attention


class PromptAttention:
    """`attend` for a prompt: every row sees the visible rows of its own sample up to itself.

    Keeps queries (R, H, Dh) and keys (R, Hkv, Dh): methods ask the layer before for single rows.
    """

    def __init__(self, layer: int, rows: list[Rows], cache: KVCache | None) -> None:
        self.layer, self.rows, self.cache = layer, rows, cache
        self.lengths = [len(r) for r in rows]
        self.hidden = [r.hidden(layer) for r in rows]
        self.q = self.k = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.q, self.k = q, k
        if self.cache is not None:
            self.cache.store(self.layer, k, v, self.lengths)
        parts = zip(*(t.split(self.lengths) for t in (q, k, v)), self.hidden, strict=True)
        return torch.cat([causal_attention(*part) for part in parts])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """One sample: q (S, H, Dh), k, v (S, Hkv, Dh), hidden (S,) bool -> (S, H, Dh).

    Hidden rows are seen by no row, themselves included; a row that sees nothing returns zeros.
    """
    S, gqa = len(q), q.shape[1] != k.shape[1]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, S, Dh)
    if hidden is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return y[0].transpose(0, 1)
    seen = (~hidden).nonzero()[:, 0]  # (s,)
    if not len(seen):
        return torch.zeros_like(q[0].transpose(0, 1))
    k, v = k[:, :, seen], v[:, :, seen]  # (1, Hkv, s, Dh)
    blocks = []
    for at in torch.arange(S, device=q.device).split(QUERY_ROWS):
        sees = seen <= at[:, None]  # (rows, s)
        nothing = ~sees.any(-1, keepdim=True)  # (rows, 1)
        part = q[:, :, at[0] : at[0] + len(at)]
        y = F.scaled_dot_product_attention(part, k, v, attn_mask=sees | nothing, enable_gqa=gqa)
        blocks.append(y.masked_fill(nothing, 0.0))
    return torch.cat(blocks, dim=2)[0].transpose(0, 1)


class StepAttention:
    """`attend` for one new row per sample: it sees itself and the visible rows in the cache."""

    def __init__(self, layer: int, rows: list[Rows], cache: KVCache, n_kv_heads: int) -> None:
        self.layer, self.rows, self.cache, self.n_kv_heads = layer, rows, cache, n_kv_heads
        self.hidden = [r.hidden(layer) for r in rows]
        self.q = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, Dh = q.shape
        self.q = q
        k, v = self.cache.append(self.layer, k, v)  # (B, Hkv, S, Dh)
        # the heads of a group are rows of one attention: no key is copied for them
        q = q.view(B, self.n_kv_heads, H // self.n_kv_heads, Dh)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._visible(k))
        return y.reshape(B, H, Dh)

    def _visible(self, k: Tensor) -> Tensor | None:
        """(B, 1, 1, S) bool, or None where every row of every sample may be seen."""
        lengths = self.cache.lengths[self.layer]
        if len(set(lengths)) == 1 and all(h is None for h in self.hidden):
            return None
        columns = torch.arange(k.shape[2], device=k.device)
        visible = columns < torch.tensor(lengths, device=k.device)[:, None]  # (B, S)
        for b, hidden in enumerate(self.hidden):
            if hidden is not None:
                visible[b, : len(hidden)] &= ~hidden
        return visible[:, None, None]


# ---------------------------------------------------------------- a plan's steps


class _Run:
    """Carries out the steps of a plan on the samples of one forward."""

    def __init__(
        self, model: LLaVA, prompts: Sequence[Prompt], encoded: Encoded | None, seed: int
    ) -> None:
        self.model, self.prompts, self.encoded = model, prompts, encoded
        self.generators = [torch.Generator().manual_seed(seed + b) for b in range(len(prompts))]
        self.entered: list[list[Tensor]] = []  # [b][image] (n, D), as they entered layer 0

    def prune_features(
        self, step: Step, b: int, rows: Rows, features: list[Tensor]
    ) -> tuple[Rows, list[Tensor]]:
        """A step before the decoder: features of each image (n, C) -> what is left of them."""
        if not rows.spans:
            return rows, features
        starts = [start for start, _ in rows.spans]

        def of(candidates: Sequence[Tensor], images: Sequence[int]) -> Tensor:
            return torch.cat(
                [features[i][c - starts[i]] for i, c in zip(images, candidates, strict=True)]
            )

        chosen = self.choose(step, b, rows, of)
        if step.method.mode == "mask":
            mask = hide(rows, step.number, step.method.until, chosen)
            return replace(rows, masks=(*rows.masks, mask)), features
        left, kept = drop(rows, rows.spans, chosen, step.method.compact)
        return left, [
            _put(part, index - start, keep)
            for part, start, (index, keep) in zip(features, starts, kept, strict=True)
        ]

    def prune_rows(
        self,
        step: Step,
        b: int,
        rows: Rows,
        x: Tensor,
        block: nn.Module,
        previous: PromptAttention | None,
    ) -> tuple[Rows, Tensor]:
        """A step before a decoder layer: one sample's rows x (S, D) -> what is left of them."""
        assert isinstance(block, Block)
        if not rows.spans:
            return rows, x
        trace = None if previous is None else _prompt_trace(previous, b, rows)

        def coming(asked: Tensor) -> Tensor:
            h, (cos, sin) = block.norm1(x), self.model.llama.rope(rows.position, x.dtype)
            q = rotate(block.attn.query(h[asked]), (cos[asked], sin[asked]))
            k = rotate(block.attn.key(h), (cos, sin))
            return received(q, k, asked, rows.hidden(step.layer))

        state = self.decoder_state(step, b, rows, x, trace, coming, len(rows) - 1)
        chosen = self.choose(
            step, b, rows, lambda candidates, _: x[torch.cat(list(candidates))], state
        )
        if step.method.mode == "mask":
            mask = hide(rows, step.number, step.method.until, chosen)
            return replace(rows, masks=(*rows.masks, mask)), x
        shift = step.method.shift
        spans = tuple((start + shift, min(stop + shift, len(rows))) for start, stop in rows.spans)
        left, kept = drop(rows, spans, chosen, step.method.compact)
        if shift:
            left = _unshift(rows, left, kept, shift)
        return left, splice(x, spans, [_put(x, index, keep) for index, keep in kept])

    def mask_again(
        self,
        step: Step,
        b: int,
        rows: Rows,
        x: Tensor,
        block: Block,
        rope: tuple[Tensor, Tensor],
        previous: StepAttention | None,
        cache: KVCache,
    ) -> Mask:
        """While decoding: the choice of a mask-mode step made anew from the newest row x (1, D)."""

        def held(layer: int) -> Tensor:  # (S, Hkv, Dh)
            return cache.keys[layer][b, :, : cache.lengths[layer][b]].transpose(0, 1)

        trace = None
        if previous is not None:
            old = previous.rows[b]
            k = held(previous.layer)
            n_new = len(k) - len(old)
            trace = _Trace(
                previous.q[b : b + 1],
                k,
                _longer(previous.hidden[b], n_new, False),
                _longer(_columns(old, rows), n_new, None, start=len(old)),
            )

        def coming(asked: Tensor) -> Tensor:
            h = block.norm1(x)
            q, k = block.attn.query(h), block.attn.key(h)
            keys = torch.cat((held(step.layer), rotate(k, rope)))
            hidden = _longer(rows.hidden(step.layer, step.number), len(keys) - len(rows), False)
            return received(rotate(q, rope), keys, None, hidden)

        newest = cache.lengths[step.layer][b]
        state = self.decoder_state(step, b, rows, None, trace, coming, newest)
        chosen = self.choose(step, b, rows, None, state)
        return hide(rows, step.number, step.method.until, chosen)

    def decoder_state(
        self,
        step: Step,
        b: int,
        rows: Rows,
        x: Tensor | None,
        trace: _Trace | None,
        coming: Callable[[Tensor], Tensor],
        newest: int,
    ) -> DecoderState:
        model, prompt = self.model, self.prompts[b]
        device = rows.identity.device

        def need_trace() -> _Trace:
            assert trace is not None, "layer 0 has no layer before it"
            return trace

        def hidden() -> Tensor:
            assert x is not None, "rows of the prompt are gone while decoding"
            return x

        text_rows = rows.text_rows()
        return DecoderState(
            rows=torch.empty(0),
            text_rows=text_rows,
            newest=torch.tensor([newest], device=device),
            text=lambda: model.embed(prompt.ids[rows.identity[text_rows]]),
            entered=lambda: torch.empty(0),
            hidden=hidden,
            final_norm=model.llama.norm,
            keys=lambda: need_trace().keys(),
            received=lambda asked, layer: (
                need_trace().received(asked) if layer == -1 else coming(asked)
            ),
        )

    def choose(
        self,
        step: Step,
        b: int,
        rows: Rows,
        features: Callable[[Sequence[Tensor], Sequence[int]], Tensor] | None,
        decoder: DecoderState | None = None,
    ) -> list[tuple[Tensor, Keep]]:
        """Ask the method, once an image or once for all; for each image its candidates and Keep."""
        model, prompt, method = self.model, self.prompts[b], step.method
        N, grid = model.config.vision.num_patches, model.config.vision.grid
        candidates = rows.candidates(step.layer, step.number, method.shift)
        everyone = tuple(range(len(candidates)))
        groups = [everyone] if method.scope == "all" else [(i,) for i in everyone]
        chosen: list[tuple[Tensor, Keep]] = []

        for group in groups:
            parts = [candidates[i] for i in group]
            numbers = [rows.patches(i, candidates[i], N) for i in group]
            patches = torch.cat([torch.where(n < 0, n, n + j * N) for j, n in enumerate(numbers)])

            def rows_here(parts: Sequence[Tensor] = parts, group: Sequence[int] = group) -> Tensor:
                assert features is not None, "rows of the prompt are gone while decoding"
                return features(parts, group)

            def vision(group: Sequence[int] = group) -> VisionState:
                assert self.encoded is not None, "the vision tower's state is gone while decoding"
                which = [prompt.images[i] for i in group]
                hidden = {k: h[which] for k, h in self.encoded.hidden.items()}
                return VisionState(model.vision, hidden, model.feature_layer)

            here = None
            if decoder is not None:
                here = replace(
                    decoder, rows=torch.cat(parts), entered=partial(self._entered, b, group)
                )
            context = Context(
                stage=step.stage,
                layer=step.layer,
                part=step.part,
                total=N * len(group),
                grid=grid,
                patches=patches,
                generator=self.generators[b],
                features=rows_here,
                focus=lambda: model.embed(self._focus_ids(prompt, rows)),
                focus_text=lambda: self._text_of(prompt, rows),
                vision=vision,
                decoder=here,
            )
            chosen += _by_image(parts, method.choose(context))
        return chosen

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

    def _entered(self, b: int, group: Sequence[int]) -> Tensor:
        return torch.cat([self.entered[b][i] for i in group])


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


def _unshift(rows: Rows, left: Rows, kept: list[tuple[Tensor, Keep]], shift: int) -> Rows:
    """Image spans after a window that began `shift` rows late: rows before it stayed, text rows in
    it are none of the image's."""
    spans = []
    for (start, stop), (_, end), (index, _) in zip(rows.spans, left.spans, kept, strict=True):
        spans.append((start, end - int((index >= stop).sum())))
    return replace(left, spans=tuple(spans))


# ---------------------------------------------------------------- attention asked for later


@dataclass(frozen=True)
class _Trace:
    """Attention of the layer before for one sample.

    q (T, H, Dh): the rows of this call, the last T of S; k (S, Hkv, Dh); hidden (S,) bool or None;
    columns (S',): for each row as they stand now its row in that layer (-1: it had none); None:
    the same.
    """

    q: Tensor
    k: Tensor
    hidden: Tensor | None
    columns: Tensor | None

    def received(self, asked: Tensor) -> Tensor:
        at = asked if self.columns is None else self.columns[asked]  # (r,)
        result = received(self.q[at - (len(self.k) - len(self.q))], self.k, at, self.hidden)
        if self.columns is None:
            return result  # (H, S)
        return result[:, self.columns] * (self.columns >= 0)  # (H, S')

    def keys(self) -> Tensor:
        return self.k if self.columns is None else self.k[self.columns]


def _prompt_trace(attention: PromptAttention, b: int, rows: Rows) -> _Trace:
    start = sum(attention.lengths[:b])
    part = slice(start, start + attention.lengths[b])
    columns = _columns(attention.rows[b], rows)
    return _Trace(attention.q[part], attention.k[part], attention.hidden[b], columns)


def _columns(old: Rows, new: Rows) -> Tensor | None:
    """For each of the new rows its number among the old ones, -1 where it is not among them."""
    if old.identity is new.identity:
        return None
    table = torch.full((new.identities,), -1, device=old.identity.device)
    table[old.identity] = torch.arange(len(old), device=old.identity.device)
    return table[new.identity]


def _longer(rows: Tensor | None, n: int, fill: bool | None, start: int = 0) -> Tensor | None:
    """Entries for n rows that came since: `fill`, or counted on from `start`."""
    if rows is None:
        return None
    more = (
        torch.arange(start, start + n, device=rows.device)
        if fill is None
        else rows.new_full((n,), fill)
    )
    return torch.cat((rows, more))
