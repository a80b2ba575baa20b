"""Attention weights of chosen rows, recorded while a model answers a prompt.

`watch` runs a generation on a model whose decoder blocks hand their queries and keys to a recorder.
It computes the weights of the rows that were asked for and of no others, and adds them up over the
rows: (H, tokens) numbers for a layer, never a map of all rows by all rows. The generation itself is
not changed, and neither is the model: a second LLaVA object shares its modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.attention import attention_weights
from minillava.generate import generate
from minillava.llama import Attend, Block, Rope
from minillava.llava import Encoded, LLaVA
from minillava.pruning.base import Plan
from minillava.report import Result
from minillava.request import prompts_of
from minillava.rows import GENERATED, NO_PATCH, TEXT, Rows, on_device
from minillava.sample import Batch, LayerAttention, Prompt

KINDS = ("BOS", "system", "image", "instruction", "answer")
BOS, SYSTEM, IMAGE, INSTRUCTION, ANSWER = range(len(KINDS))
SINK = 20.0  # see find_sinks


@dataclass(frozen=True)
class Seen:
    """What a group of rows sees in one decoder layer: the mean of their attention weights.

    Tokens are numbered as in the unpruned prompt; rows that a method added come after them, and
    then the answer's.
    """

    layer: int
    n_rows: int  # rows of the group that the layer has; 0: all of them were dropped before it
    n_patches: int  # N, of each image
    weights: Tensor  # (H, tokens) float32; those of a head add up to 1, or to 0 without rows
    visible: Tensor  # (tokens,) bool: tokens that at least one of the rows could attend to
    image: Tensor  # (tokens,) which image of the prompt a token belongs to, TEXT or GENERATED
    patch: Tensor  # (tokens,) which patch of its image it is, or NO_PATCH
    kind: Tensor  # (tokens,) index in KINDS
    sinks: Tensor  # (tokens,) bool, see find_sinks

    def without_bos(self, weights: Tensor) -> Tensor:
        """Weights (H, tokens) with 0 for BOS, the others of each head scaled to the same sum."""
        others = weights * (self.kind != BOS)
        left = others.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return others * (weights.sum(1, keepdim=True) / left)

    def of_image(self, image: int, values: Tensor, absent: float) -> Tensor:
        """The entries of values (..., tokens) that belong to the patches of an image, (..., N);
        `absent` for patches that none of the rows could attend to."""
        mine = (self.visible & (self.image == image) & (self.patch != NO_PATCH)).nonzero()[:, 0]
        found = values.new_full((*values.shape[:-1], self.n_patches), absent)
        found[..., self.patch[mine]] = values[..., mine]
        return found

    def by_kind(self, values: Tensor) -> Tensor:
        """Sums of values (..., tokens) over the tokens of each kind: (..., kinds)."""
        return torch.stack([values[..., self.kind == k].sum(-1) for k in range(len(KINDS))], -1)


def watch(
    model: LLaVA,
    batch: Batch,
    groups: Sequence[Iterable[int]],
    plan: Plan | None = None,
    max_new_tokens: int = 1,
    sample: int = 0,
    encoded: Encoded | None = None,
    **options: Any,
) -> tuple[Result, list[list[Seen]]]:
    """Answer a batch, and record what groups of rows of one of its samples see in every layer.

    groups: numbers of rows: 0 to T - 1 are the prompt's tokens, T + n is answer token n, which is
    fed to choose the next one (so the last is not fed, and has no row). The row from which answer
    token n is chosen is T - 1 + n. The other arguments are those of `generate`. Returns its result
    and what was seen, [layer][group]. Raises ValueError as `generate` does, and for a sample that
    the batch does not have.
    """
    prompts = prompts_of(model, batch)
    if not 0 <= sample < len(prompts):
        raise ValueError(f"sample={sample} must be from 0 to {len(prompts) - 1}")
    recorder = Recorder(model, prompts[sample], sample, groups, max_new_tokens)
    watched = WatchedModel(model, recorder)
    result = generate(watched, batch, plan, max_new_tokens, encoded, **options)
    return result, [recorder.seen(layer) for layer in sorted(recorder.sums)]


def find_sinks(x: Tensor) -> Tensor:
    """Which rows of x (S, D), as they enter a layer, are attention sinks: (S,) bool.

    As in Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    ICLR 2025, arXiv 2503.03321: x over its root mean square is beyond 20 or -20 in one of the few
    dimensions in which that of BOS is. For Llama-2-7B the authors list these dimensions (1415 and
    2533); here they are found in the prompt's first row. A row of D numbers reaches at most
    sqrt(D), so a model with D of 400 or less has no sinks by this definition.
    """
    size = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).abs()
    return (size[:, size[0] > SINK] > SINK).any(-1)


# ---------------------------------------------------------------- recording


@dataclass
class Sums:
    """What was recorded of one layer. Columns: the ids of rows, then the answer's tokens."""

    rows: Rows  # that entered it in the prefill
    sinks: Tensor  # (S,) bool
    weights: Tensor  # (groups, H, columns) sums over the rows, on the model's device
    visible: Tensor  # (groups, columns) bool
    counts: list[int]  # [group] rows


class Recorder:
    """Adds up the attention weights of one sample in all layers."""

    def __init__(
        self,
        model: LLaVA,
        prompt: Prompt,
        sample: int,
        groups: Sequence[Iterable[int]],
        max_new_tokens: int,
    ) -> None:
        self.prompt, self.sample, self.n_new = prompt, sample, max_new_tokens
        self.groups = [torch.tensor(sorted({*group})) for group in groups]  # (r,) each
        self.n_patches = model.config.vision.num_patches
        self.whole_heads = model.llama.whole_heads  # where processes share the decoder
        self.sums: dict[int, Sums] = {}  # by layer

    def record(self, x: Tensor, q: Tensor, k: Tensor, attend: LayerAttention) -> None:
        """Record a layer that has computed x (R, D), q (R, H, Dh) and k (R, Hkv, Dh) of all
        samples: of their prompts, or of one new token each."""
        s, b = attend.samples[self.sample], self.sample
        if attend.view is None:
            lengths = [len(other.rows) for other in attend.samples]
            x, q, k = (t.split(lengths)[b] for t in (x, q, k))  # (S, D), (S, H, Dh), ...
            columns, T = s.rows.id, self.prompt.length
            numbers = torch.where(columns < T, columns, -1)  # added rows are in no group
        else:
            assert attend.cache is not None
            q, k = q[b : b + 1], attend.cache.keys_of(attend.layer, b)
            numbers = torch.tensor([self.prompt.length + s.generated - 1])
            columns = torch.cat((s.rows.id, s.rows.n_ids + torch.arange(s.generated)))
        q, k, first = self.whole_heads(q), self.whole_heads(k), len(k) - len(q)
        if attend.layer not in self.sums:
            self.sums[attend.layer] = self._new_sums(s.rows, x, q)
        sums = self.sums[attend.layer]
        there = on_device(columns, q)
        hidden = attend.hidden[b]
        seen = torch.ones(len(columns), dtype=torch.bool)
        seen = seen if hidden is None else ~F.pad(hidden, (0, len(seen) - len(hidden)))
        for g, group in enumerate(self.groups):
            mine = torch.isin(numbers, group).nonzero()[:, 0]  # (r,)
            for w in attention_weights(q[on_device(mine, q)], k, mine + first, hidden):
                sums.weights[g].index_add_(1, there[: w.shape[2]], w.sum(1))
            last = int(mine.max()) + first if len(mine) else -1
            sums.visible[g, columns[: last + 1]] |= seen[: last + 1]
            sums.counts[g] += len(mine)

    def _new_sums(self, rows: Rows, x: Tensor, q: Tensor) -> Sums:
        n, size = len(self.groups), rows.n_ids + self.n_new
        sinks = find_sinks(x).cpu() if rows.image[0] == TEXT else rows.id < 0
        weights = torch.zeros(n, q.shape[1], size, device=q.device)
        return Sums(rows, sinks, weights, torch.zeros(n, size, dtype=torch.bool), [0] * n)

    def seen(self, layer: int) -> list[Seen]:
        """What each group has seen in a layer."""
        sums = self.sums[layer]
        rows, size = sums.rows, sums.weights.shape[2]
        first = self.prompt.starts[0] if self.prompt.starts else self.prompt.length
        text = torch.where(rows.id < first, SYSTEM, INSTRUCTION)
        text[:1] = BOS
        columns = [
            (rows.image, GENERATED),
            (rows.patch, NO_PATCH),
            (torch.where(rows.image == TEXT, text, IMAGE), ANSWER),
            (sums.sinks, False),
        ]
        spread = [torch.full((size,), other).index_copy(0, rows.id, x) for x, other in columns]
        return [
            Seen(layer, n, self.n_patches, weights / max(1, n), visible, *spread)
            for n, weights, visible in zip(
                sums.counts, sums.weights.cpu(), sums.visible, strict=True
            )
        ]


class WatchedModel(LLaVA):
    """A model that shares the modules of another one, and records what its layers compute."""

    def __init__(self, model: LLaVA, recorder: Recorder) -> None:
        self.__dict__.update(model.__dict__)
        self.compiled = None  # compiled layers have no recorder
        self.recorder = recorder

    def block(self, layer: int) -> Block:
        return WatchedBlock(super().block(layer), self.recorder)


class WatchedBlock(Block):
    """A decoder block that hands its queries and keys to a recorder."""

    def __init__(self, block: Block, recorder: Recorder) -> None:
        self.__dict__.update(block.__dict__)
        self.recorder = recorder

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        assert isinstance(attend, LayerAttention)
        return super().forward(x, rope, WatchedAttention(x, attend, self.recorder))


@dataclass(frozen=True)
class WatchedAttention:
    """The attention of a layer, with what entered it."""

    x: Tensor  # (R, D)
    attend: LayerAttention
    recorder: Recorder

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = self.attend(q, k, v)
        self.recorder.record(self.x, q, k, self.attend)
        return y
