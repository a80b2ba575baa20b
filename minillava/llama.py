"""The Llama decoder, on packed rows.

The rows of all sequences stand one behind the other in one (R, D) tensor, without padding: every
layer but attention works on single rows and needs no more. Which rows attend to which is the
caller's business: it hands each block an `attend` function; the two of this project, for prompts
and for single new rows, stand at the end. Position is data beside the row, never a length.

Follows Hugging Face's LlamaForCausalLM; RMSNorm and the rotary angles are float32 as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache, Rows
from .config import TextConfig
from .pruning.base import received

QUERY_ROWS = 256  # rows whose visibility is held as a mask at one time
Rope = tuple[Tensor, Tensor]  # cosine and sine, each (R, 1, Dh / 2)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (R, H, Dh), k, v (R, Hkv, Dh) -> as q


def rope(config: TextConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Rotation of each row by its position (R,): cosine and sine, each (R, 1, Dh / 2)."""
    Dh = config.head_dim
    exponent = torch.arange(0, Dh, 2, device=positions.device).float() / Dh
    frequency = 1.0 / (config.rope_theta**exponent) / config.rope_factor  # (Dh / 2,)
    angle = (positions.float()[:, None] * frequency)[:, None]  # (R, 1, Dh / 2), in float32
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate (R, H, Dh); the halves of a head are the two coordinates, as in Hugging Face's."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        self.head_dim = Dh
        self.q_proj = nn.Linear(D, config.num_attention_heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * Dh, D, bias=False)

    def query(self, x: Tensor) -> Tensor:
        """(R, D) -> (R, H, Dh), not rotated yet."""
        return self.q_proj(x).view(len(x), -1, self.head_dim)

    def key(self, x: Tensor) -> Tensor:
        """(R, D) -> (R, Hkv, Dh), not rotated yet."""
        return self.k_proj(x).view(len(x), -1, self.head_dim)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        q, k = rotate(self.query(x), rope), rotate(self.key(x), rope)  # (R, H | Hkv, Dh)
        v = self.v_proj(x).view(len(x), -1, self.head_dim)  # (R, Hkv, Dh)
        return self.o_proj(attend(q, k, v).flatten(1))  # (R, D)


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # in place: at a long prompt each of these is tens of megabytes
        return self.down_proj(F.silu(self.gate_proj(x)).mul_(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, attend)  # (R, D)
        return x + self.mlp(self.norm2(x))  # (R, D)


class Llama(nn.Module):
    """Weights of the decoder; the loop over its blocks is LLaVA's: pruning is part of it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def rope(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rope:
        """Rotation for rows at these positions (R,)."""
        return rope(self.config, positions, dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Rows after the last block (R, D) -> float32 logits (R, V)."""
        return self.lm_head(self.norm(x)).float()


# ---------------------------------------------------------------- who sees whom


@dataclass(frozen=True)
class LayerView:
    """One sample in the attention of a layer that has run, to be asked for single rows.

    q (T, H, Dh): the rows of that call, the last T of S; k (S, Hkv, Dh); hidden (S,) bool or None;
    rows: the prompt's, as they were in that layer (new tokens behind them are not in it).
    """

    q: Tensor
    k: Tensor
    hidden: Tensor | None
    rows: Rows

    def received(self, asked: Tensor, now: Rows, strongest: bool) -> Tensor:
        """Mean attention of rows to all rows, both counted as they stand now: (H, S'), float32;
        strongest: of each row that of its strongest head, (1, S')."""
        if len(asked) > len(self.q):
            raise ValueError(
                f"attention of {len(asked)} rows was asked for, but while decoding only the newest "
                "has a query; ask for `newest`, or say newest_row = False: the choice then stands"
            )
        columns = self._columns(now)
        at = asked if columns is None else columns[asked]
        q = self.q[at - (len(self.k) - len(self.q))]
        result = received(q, self.k, at, self.hidden, strongest)
        if columns is None:
            return result
        return result[:, columns] * (columns >= 0)

    def keys(self, now: Rows) -> Tensor:
        """Keys (S', Hkv, Dh) of the rows as they stand now; zeros for those that were not here."""
        columns = self._columns(now)
        return self.k if columns is None else self.k[columns] * (columns >= 0)[:, None, None]

    def _columns(self, now: Rows) -> Tensor | None:
        """For each row of now its row here, -1 if it is not here; None: they are the same."""
        if self.rows.identity is now.identity:
            return None
        table = torch.full((now.identities,), -1, device=self.k.device)
        table[self.rows.identity] = torch.arange(len(self.rows), device=self.k.device)
        new = torch.arange(len(self.rows), len(self.k), device=self.k.device)
        return torch.cat((table[now.identity], new))


class PromptAttention:
    """`attend` for prompts: every row sees the visible rows of its own sample up to itself.

    asked: whether a method will ask this layer for single rows; queries and keys are then kept.
    """

    def __init__(self, layer: int, rows: list[Rows], cache: KVCache | None, asked: bool) -> None:
        self.layer, self.rows, self.cache, self.asked = layer, rows, cache, asked
        self.lengths = [len(r) for r in rows]
        self.hidden = [r.hidden(layer) for r in rows]
        self.q = self.k = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.asked:
            self.q, self.k = q, k
        if self.cache is not None:
            self.cache.store(self.layer, k, v)
        parts = zip(*(t.split(self.lengths) for t in (q, k, v)), self.hidden, strict=True)
        seen = [causal_attention(*part) for part in parts]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def view(self, b: int) -> LayerView:
        q, k = self.q.split(self.lengths)[b], self.k.split(self.lengths)[b]
        return LayerView(q, k, self.hidden[b], self.rows[b])


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
    for at in range(0, S, QUERY_ROWS):
        part = q[:, :, at : at + QUERY_ROWS]
        own = torch.arange(at, at + part.shape[2], device=q.device)
        sees = seen <= own[:, None]  # (rows, s)
        nothing = ~sees.any(-1, keepdim=True)  # (rows, 1)
        y = F.scaled_dot_product_attention(part, k, v, attn_mask=sees | nothing, enable_gqa=gqa)
        blocks.append(y.masked_fill(nothing, 0.0))
    return torch.cat(blocks, dim=2)[0].transpose(0, 1)


class StepAttention:
    """`attend` for one new row per sample: it sees itself and the visible rows in the cache."""

    def __init__(self, layer: int, rows: list[Rows], cache: KVCache) -> None:
        self.layer, self.rows, self.cache = layer, rows, cache
        self.hidden = [r.hidden(layer) for r in rows]
        self.q = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, H, Dh), Hkv = q.shape, k.shape[1]
        self.q = q
        k, v = self.cache.append(self.layer, k, v)  # (B, Hkv, S, Dh)
        # the heads of a group are rows of one attention: no key is copied for them
        q = q.view(B, Hkv, H // Hkv, Dh)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._visible(k))
        return y.reshape(B, H, Dh)

    def _visible(self, k: Tensor) -> Tensor | None:
        """(B, 1, 1, S) bool, or None where every row of every sample may be seen."""
        lengths, S = self.cache.lengths[self.layer], k.shape[2]
        if len(set(lengths)) == 1 and all(h is None for h in self.hidden):
            return None
        columns = torch.arange(S, device=k.device)
        visible = columns < torch.tensor(lengths, device=k.device)[:, None]  # (B, S)
        for b, hidden in enumerate(self.hidden):
            if hidden is not None:
                visible[b] &= ~longer(hidden, S)
        return visible[:, None, None]

    def view(self, b: int) -> LayerView:
        k, hidden = self.cache.held(self.layer, b), self.hidden[b]
        if hidden is not None:
            hidden = longer(hidden, len(k))
        return LayerView(self.q[b : b + 1], k, hidden, self.rows[b])


def longer(hidden: Tensor, n: int) -> Tensor:
    """Hidden rows (S,) with the visible rows that came since, (n,)."""
    return F.pad(hidden, (0, n - len(hidden)))
