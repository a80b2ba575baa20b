"""A plain decoder for one sample in float64, with a T x T mask per layer.

It never removes a row. A row that a plan drops or hides stays in its place, but no row sees it;
dropping must give the same result. The prompt and the tokens generated after it are one sequence,
whose last rows are those that decoding with a cache computes one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tiny import watching
from torch import Tensor

from minillava import Batch
from minillava.generate import generate
from minillava.pruning.base import Plan
from minillava.report import Report

See = Callable[[int, Tensor, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Traced:
    """What the layers computed. `hidden[i]` (T, D) is the input of layer i, the last the output."""

    hidden: list[Tensor]
    attention: list[Tensor]  # (H, T, T) of each layer
    logits: Tensor  # (T, V)


class Reference:
    """The decoder with the weights of one of our models."""

    def __init__(self, model: Any) -> None:
        self.config = model.config.text
        self.weights = {k: v.double() for k, v in model.llama.state_dict().items()}

    def embed(self, ids: Tensor, pictures: Tensor, image_token: int) -> Tensor:
        """Input rows (T, D): embeddings of ids (T,), with image rows for the placeholders."""
        x = self.weights["embed_tokens.weight"][ids]
        x[ids == image_token] = pictures.double()
        return x

    def __call__(self, x: Tensor, positions: Sequence[Tensor], see: See) -> Traced:
        """Run all layers on x (T, D) with positions[i] (T,) in layer i.

        see(i, rows entering layer i, attention of the layers before) returns (T, T) bool: which
        columns each row sees in layer i.
        """
        hidden, attentions = [x], []
        for i in range(self.config.num_hidden_layers):
            visible = see(i, x, attentions)
            out, attention = self._attend(i, x, positions[i], visible)
            x = x + out
            h = self._norm(x, f"blocks.{i}.norm2")
            gate, up = (self._linear(h, f"blocks.{i}.mlp.{n}_proj") for n in ("gate", "up"))
            x = x + self._linear(gate * torch.sigmoid(gate) * up, f"blocks.{i}.mlp.down_proj")
            attentions.append(attention)
            hidden.append(x)
        logits = self._linear(self._norm(x, "norm"), "lm_head")
        return Traced(hidden, attentions, logits)

    def attention(self, i: int, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Attention weights (H, T, T) of layer i for its input x; rows that see nothing are 0."""
        T, heads, kv_heads = len(x), self.config.num_attention_heads, self._kv_heads
        h = self._norm(x, f"blocks.{i}.norm1")
        q = self._linear(h, f"blocks.{i}.attn.q_proj").view(T, heads, -1)
        k = self._linear(h, f"blocks.{i}.attn.k_proj").view(T, kv_heads, -1)
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)

    def _attend(
        self, i: int, x: Tensor, positions: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = self.attention(i, x, positions, visible)
        h = self._norm(x, f"blocks.{i}.norm1")
        v = self._linear(h, f"blocks.{i}.attn.v_proj").view(len(x), self._kv_heads, -1)
        v = v.repeat_interleave(self.config.num_attention_heads // self._kv_heads, dim=1)
        y = torch.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1)
        return self._linear(y, f"blocks.{i}.attn.o_proj"), weights

    @property
    def _kv_heads(self) -> int:
        return self.config.num_key_value_heads

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return self.weights[f"{name}.weight"] * x / scale

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate coordinates j and j + Dh / 2 of each head by position x theta^(-2j / Dh)."""
        half = x.shape[-1] // 2
        turn = self.config.rope_theta ** (-torch.arange(half).double() / half)
        turned = torch.polar(torch.ones(()).double(), positions.double()[:, None, None] * turn)
        y = torch.complex(x[..., :half], x[..., half:]) * turned
        return torch.cat((y.real, y.imag), dim=-1)


def picture_rows(model: Any, batch: Batch) -> Tensor:
    """Projected rows of all images of a batch, (images * N, D)."""
    if batch.pixels is None:
        return torch.empty(0, model.config.text.hidden_size)
    with watching(model.projector) as (outputs,):
        generate(model, batch, max_new_tokens=1)
    return torch.cat([out.flatten(0, -2) for out in outputs])


# ---------------------------------------------------------------- the effect of a plan


@dataclass(frozen=True)
class Layer:
    """All T rows of one sample's prompt at the input of a layer."""

    present: Tensor  # (T,) bool: still in the sequence and the cache
    visible: Tensor  # (T,) bool: present and not hidden by a mask
    positions: Tensor  # (T,), valid for the rows that are present
    next_position: int


def layers_of(
    plan: Plan,
    report: Report,
    b: int,
    is_image: Tensor,
    n_layers: int,
    compact: Collection[str] = (),
) -> list[Layer]:
    """The state of sample b at each layer, from the plan and the kept positions of its report.

    is_image (T,) bool; compact: names of methods that renumber. It applies to methods that add no
    rows and whose candidates are exactly the image tokens.
    """
    T = len(is_image)
    present, positions, next_position = torch.ones(T, dtype=torch.bool), torch.arange(T), T
    masks: list[tuple[Tensor, int]] = []  # hidden rows, layer from which they are visible again
    steps = list(zip(plan.steps, report.kept, strict=True))
    result = []
    for layer in range(n_layers):
        while steps and (steps[0][0].stage != "decoder" or steps[0][0].layer == layer):
            step, kept = steps.pop(0)
            stays = ~is_image
            stays[kept.positions[b]] = True
            if not is_image.any():
                continue
            if step.method.mode == "mask":
                until = n_layers if step.method.until is None else step.method.until
                masks.append((_visible(present, masks, layer) & ~stays, until))
                continue
            present = present & stays
            if step.method.name in compact:
                positions = present.cumsum(0) - 1
                next_position = int(present.sum())
        visible = _visible(present, masks, layer)
        result.append(Layer(present, visible, positions, next_position))
    return result


def _visible(present: Tensor, masks: Sequence[tuple[Tensor, int]], layer: int) -> Tensor:
    visible = present.clone()
    for hidden, until in masks:
        if layer < until:
            visible &= ~hidden
    return visible


def replay(reference: Reference, x: Tensor, layers: Sequence[Layer], n_new: int) -> Traced:
    """Run the whole sequence x (T + n_new, D), prompt and new tokens. In each layer the rows that
    `layers` hides stay hidden for the new tokens too."""
    T, S = len(x) - n_new, len(x)
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    new = torch.ones(n_new, dtype=torch.bool)
    columns = [torch.cat((layer.visible, new)) for layer in layers]
    positions = [
        torch.cat((layer.positions, layer.next_position + torch.arange(n_new))) for layer in layers
    ]
    assert all(len(p) == S for p in positions), (T, S)
    return reference(x, positions, lambda i, *_: causal & columns[i])
