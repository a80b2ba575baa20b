"""FlowCut: drop patches in every second block of the vision tower, by what they pass on.

Tong et al., NeurIPS 2025, arXiv 2505.19536. Released code: TungChintao/FlowCut a2ecd24, flowcut/
modeling_clip_flowcut.py, utils_flowcut.py. As long as more than `keep` patches are left, each block
scores them by its own attention:

    score = (c / sum c + m / sum m) * |v|

c is the attention from the class token and m the softmax of the products of its value with all
values, not scaled (both means over heads); |v| is the L1 norm of the mean of the heads' values. The
running score is the mean of itself and the new one. Behind every second block, counted back from
the one before the last that LLaVA runs, (n - keep) / sqrt(rest) * (1 - (entropy of c / log n)^2) of
the n patches are dropped, rounded half to even, where `rest` is the number of blocks until there;
there `keep` are left. So with 24 blocks the first drop follows block 1, the last one block 21, and
block 22 runs on the kept rows alone. The class token goes along, and is dropped at the end. The
patches stay in reading order, and are renumbered.

Deviations: each image drops as many as its own entropy says; the released code takes the largest of
a batch. Attention that underflows adds nothing to the entropy, where that code gives NaN. Its
second choice in the decoder is for models with several crops. Where FlowCut is the only method,
the normal tower is not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, log
from typing import cast

import torch
from torch import Tensor

from ..attention import attention_received
from ..clip import Block
from ..llava import LLaVA
from .base import Context, Keep
from .margins import UNKNOWN
from .order import need_all_patches
from .shared import BeforeDecoder, add_attention, check_whole_grid, refuse_nan, tower_heads


def score_patches(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Score (n,) and class attention (n,) of the patches of one image, from the heads of a block,
    (1, H, 1 + n, Dh) each."""
    q, k, v = (heads[0].transpose(0, 1) for heads in (q, k, v))  # (1 + n, H, Dh)
    by_class = attention_received(q[:1], k).mean(0)[1:]  # (n,)
    v = v.float()
    by_value = torch.einsum("hd,jhd->hj", v[0], v).softmax(1).mean(0)[1:]  # (n,)
    shares = by_class / by_class.sum() + by_value / by_value.sum()
    return shares * v.mean(1)[1:].abs().sum(1), by_class


def count_pruned(by_class: Tensor, keep: int, rest: int) -> Tensor:
    """How many of n patches to drop, a whole number () on the device."""
    n = len(by_class)
    entropy = torch.special.entr(by_class / by_class.sum()).sum() / log(n)
    return ((n - keep) / rest**0.5 * (1 - entropy.square())).round()


@dataclass(frozen=True)
class FlowCut(BeforeDecoder):
    name, drops_only = "flowcut", False
    check_order = need_all_patches

    def check_model(self, model: LLaVA) -> None:
        if model.feature_layer < 2:
            raise ValueError(
                "flowcut drops after a block that another one follows, but LLaVA reads hidden "
                f"state {model.feature_layer} of this vision tower; it needs 2 or later"
            )

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (0,)

    def own_features(self, n_tokens: int) -> bool:
        return self.left(n_tokens)[0] < n_tokens

    def choose(self, c: Context) -> Keep:
        check_whole_grid(c, self.name)
        (keep,), last = self.left(c.n_tokens), c.model.feature_layer - 2
        if keep >= c.n_tokens:
            return Keep(torch.arange(c.n_tokens))
        x = c.vision_state(0)[0]  # (1 + N, C)
        kept = torch.arange(c.n_tokens, device=x.device)
        running, scores = None, x.new_zeros(len(kept), dtype=torch.float32)
        for i, module in enumerate(c.model.vision.blocks[: last + 2]):
            block = cast(Block, module)
            heads = tower_heads(block, x)
            y = add_attention(block, x, heads)
            x = y + block.mlp(block.norm2(y))
            if len(kept) <= keep:
                continue
            score, by_class = score_patches(*heads)
            running = score if running is None else (running + score) / 2
            scores = scores.index_copy(0, kept, running)  # a dropped patch has its last one
            if (last - i) % 2 == 0:
                n = keep
                if i < last:  # the host has to know the number
                    pruned = float(count_pruned(by_class, keep, last - i))
                    n = keep if isnan(pruned) else max(len(kept) - int(pruned), keep)
                order = running.sort(descending=True, stable=True).indices[:n].sort().values
                running, kept = running[order], kept[order]
                x = torch.cat((x[:1], x[1:][order]))
        assert running is not None  # keep is less than all, so the first block was scored
        refuse_nan(running, c.where)
        return Keep(kept, merged=x[1:], scores=scores, closest=UNKNOWN)
