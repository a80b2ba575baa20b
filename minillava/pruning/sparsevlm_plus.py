"""SparseVLM+, which is `sparsevlm:version=2`: how image tokens are ranked at a stage.

Released code: Gumpest/SparseVLMs 26a5f48 with USE_VERSION=2_0, modelling_sparse_llama.py, score.py.
The attention weight of rater i (sparsevlm.py) to image token j in the layer before is divided by

    w(i, j) = 2 / sqrt(Dh) * sum over f of cos((p_i - p_j) theta_f),

the score that RoPE gives to a query and a key of ones at their positions p: what distance alone
would add. The 14 heads with the largest sums over raters and image tokens rank, by the mean over
these heads and the raters. The best `keep` stay, none is merged, and positions are the original
ones. The new tokens' positions follow the unpruned prompt.

At long distances w is near 0 or negative, so a score can be huge or change its sign; one token or
one head may win by that. The published lists: 300/200/118 for 192 tokens, 238/108/60 for 128,
246/54/28 for 96, 66/34/20 for 64. The 14 are counted for 7B (32 heads) and 13B (40) alike.

Deviations: any number of images and samples; all text tokens rate where that code gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import on_device
from .base import Context
from .margins import lead

HEADS = 14


def check_heads(heads: int | None, n_heads: int) -> None:
    if (heads or HEADS) > n_heads:
        raise ValueError(
            f"sparsevlm: version=2 ranks by heads={heads or HEADS} heads, but the decoder has "
            f"{n_heads}; give heads={n_heads} or fewer"
        )


def score_of_ones(c: Context, raters: Tensor) -> Tensor:
    """w of `raters` (r,) and the candidates: (r, n), from their positions."""
    (cos, sin), Dh = c.model.llama.rope(c.rows.position), c.model.config.text.head_dim
    cos, sin = cos[:, 0, Dh // 2 :], sin[:, 0, Dh // 2 :]  # (S, Dh / 2)
    own, others = on_device(raters, cos), on_device(c.candidates, cos)
    return 2 * (cos[own] @ cos[others].T + sin[own] @ sin[others].T) / Dh**0.5


def score_by_strong_heads(c: Context, raters: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Score (n,) of the candidates by the attention of `raters` (r,) in the layer before; and how
    near the choice of heads is to another one, see lead()."""
    divisor, start = score_of_ones(c, raters), 0
    H, n = c.model.config.text.num_attention_heads, divisor.shape[1]
    scores = torch.zeros(H, n, device=divisor.device)
    for weights in c.attention_by_row(raters):  # (H, b, n)
        end = start + weights.shape[1]
        scores += (weights / divisor[start:end]).sum(1)
        start = end
    strength = scores.sum(1)  # (H,)
    strong = strength.topk(heads).indices  # (heads,)
    return scores[strong].mean(0) / len(raters), lead(strength, heads)
