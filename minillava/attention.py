"""Which rows attend to which: attention for a prompt, for one new token, and for a pruning method.

All three compute softmax(q k^T / sqrt(Dh)) v, or its weights alone, without ever holding the T x T
matrix of weights: scaled_dot_product_attention (SDPA) does not form it, and a pruning method gets
the weights of the few rows that it asks for. With grouped-query attention H query heads share Hkv
keys and values; LLaVA-1.5 has H = Hkv = 32 (7B) or 40 (13B) with Dh = 128.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import on_device

MASK_ROWS = 256  # query rows whose visibility is held as a mask at one time
WEIGHT_ROWS = 256  # (row, head) pairs whose attention weights are held at one time


def causal_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """All rows of one prompt: q (S, H, Dh), k, v (S, Hkv, Dh), seen (s,) -> (S, H, Dh).

    Row i attends to those of the rows 0..i whose numbers are in `seen`, ascending; None: to all.
    Other rows are not even visible to themselves; a row that sees nothing returns zeros.
    """
    S, gqa = len(q), q.shape[1] != k.shape[1]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H | Hkv, S, Dh)
    if seen is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return y[0].transpose(0, 1)
    if not len(seen):
        return torch.zeros_like(q[0].transpose(0, 1))
    k, v = k[:, :, seen], v[:, :, seen]  # (1, Hkv, s, Dh)
    blocks = []
    for start in range(0, S, MASK_ROWS):
        part = q[:, :, start : start + MASK_ROWS]  # (1, H, rows, Dh)
        row = torch.arange(start, start + part.shape[2], device=q.device)
        sees = seen <= row[:, None]  # (rows, s)
        nothing = ~sees.any(-1, keepdim=True)  # (rows, 1)
        y = F.scaled_dot_product_attention(part, k, v, attn_mask=sees | nothing, enable_gqa=gqa)
        blocks.append(y.masked_fill(nothing, 0.0))
    return torch.cat(blocks, dim=2)[0].transpose(0, 1)


def token_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """One new row per sample: q (B, H, Dh), k, v (B, Hkv, S, Dh) of the KV cache -> (B, H, Dh).

    visible (B, 1, 1, S) bool: which cached rows each sample sees; None: all of them.
    """
    (B, H, Dh), Hkv = q.shape, k.shape[1]
    # the query heads that share keys become the rows of one attention: no key is copied
    q = q.view(B, Hkv, H // Hkv, Dh)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).reshape(B, H, Dh)


def attention_received(
    q: Tensor, k: Tensor, at: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """Attention weight that each of S rows receives from r rows, their mean: (H, S), float32.

    The arguments are those of attention_weights. r = 0 gives zeros.
    """
    total = q.new_zeros((q.shape[1], len(k)), dtype=torch.float32)
    for weights in attention_weights(q, k, at, hidden):
        total[:, : weights.shape[2]] += weights.sum(1)
    return total / max(1, len(q))


def attention_weights(
    q: Tensor, k: Tensor, at: Tensor | None = None, hidden: Tensor | None = None
) -> Iterator[Tensor]:
    """Attention weights of r rows, b at a time: (H, b, end), float32; none sees further than `end`.

    q (r, H, Dh) and k (S, Hkv, Dh), both already rotated. at (r,): query row i sees the rows up to
    at[i]; None: all rows. hidden (s,) bool: which of the first s nobody sees. Both on the CPU.
    """
    (r, H, Dh), (S, Hkv, _) = q.shape, k.shape
    columns, block = torch.arange(S, device=k.device), max(1, WEIGHT_ROWS // H)
    strided = k.dtype == torch.float32  # in 16 bits a CPU would copy keys that are not contiguous
    k = k.transpose(0, 1) if strided else k.transpose(0, 1).contiguous()  # (Hkv, S, Dh)
    at = torch.full((r,), S - 1) if at is None else at
    hidden = columns < 0 if hidden is None else on_device(F.pad(hidden, (0, S - len(hidden))), k)
    for start in range(0, r, block):
        rows, sees = q[start : start + block], at[start : start + block]  # (b, H, Dh), (b,)
        b, end = len(rows), int(sees.max()) + 1
        rows = rows.view(b, Hkv, H // Hkv, Dh).permute(1, 2, 0, 3).reshape(Hkv, -1, Dh)
        weights = (rows @ (k[:, :end] if strided else k).mT)[..., :end].float().reshape(H, b, end)
        unseen = hidden[:end] | (columns[:end] > on_device(sees, k)[:, None])  # (b, end)
        weights = (weights * Dh**-0.5).masked_fill(unseen, -torch.inf).softmax(-1)
        # a row that sees nothing gives nothing, where softmax gives NaN
        yield weights.masked_fill(unseen.all(-1, keepdim=True), 0.0)
