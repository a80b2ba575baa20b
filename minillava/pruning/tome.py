"""ToMe: merge the most similar tokens inside the vision tower, block by block.

Bolya et al., ICLR 2023, arXiv 2210.09461. Released code: facebookresearch/ToMe, tome/merge.py,
bipartite_soft_matching and merge_wavg; tome/patch/clip.py. In every block up to LLaVA's feature
layer, between attention and MLP:
1. The tokens at even places are matched with those at odd places by the cosine of the block's own
   keys, mean over heads. The class token stands at place 0 and is never merged.
2. The r even tokens with the best matches are merged into these, a mean weighted by size: the
   number of patches that each stands for.
Once sizes differ, attention adds log(size) to the logits of a key.

In every block the order is that of the released code: first the even tokens that are left,
then the odd ones. It is not the order of the grid. Positions are renumbered, and a merged token has
the number of the odd token that it was merged into. `keep` instead of r: as many merges as leave
that number, spread over the blocks as evenly as possible, the first ones taking more.

If ToMe is the only method, the normal tower is not run. Otherwise both run, because other methods
read the unmerged tower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..clip import Block
from ..llava import LLaVA
from .base import Context, Keep, Method, Stages, amount, count, option
from .margins import COSINE, lead
from .order import need_all_patches
from .shared import (
    add_attention,
    assignment,
    check_whole_grid,
    refuse_nan,
    tower_heads,
    unchecked_cosines,
)


@dataclass(frozen=True)
class Tokens:
    """The tower's tokens in one block."""

    x: Tensor  # (T, C)
    size: Tensor  # (T,) float32, patches that each stands for
    patch: Tensor  # (T,) the patch whose number it has, -1 for the class token
    of: Tensor  # (1 + N,) the token that each token of the image's is part of now
    closest: Tensor  # () the least lead() of what was merged
    merged: bool = False  # whether one of them stands for several patches


def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What to merge of tokens with metric (T, d): the r even ones, the odd ones that they go into,
    and the even ones left. Each counts within its half; the class token is the even token 0. Last,
    how near this is to another result."""
    cosine = unchecked_cosines(metric[::2], metric[1::2])  # (E, O)
    cosine[0] = -torch.inf
    best = cosine.max(1)
    order = best.values.sort(descending=True, stable=True).indices
    merged, left = order[:r], order[r:].sort().values
    into = best.indices[merged]
    other = cosine[merged].scatter(1, into[:, None], -torch.inf).amax(1)  # (r,) the second best
    margin = (best.values[merged] - other).amin() / COSINE
    closest = torch.minimum(lead(best.values, r, scale=COSINE), margin)
    return merged, into, left, closest


def merge(tokens: Tokens, merged: Tensor, into: Tensor, left: Tensor, closest: Tensor) -> Tokens:
    """Merge the even tokens `merged` into the odd ones `into`."""
    sums = assignment(into, len(tokens.x) // 2, tokens.size.dtype)  # (O, r)

    def join(x: Tensor) -> Tensor:
        even, odd = x[::2], x[1::2]
        return torch.cat((even[left], odd + sums @ even[merged]))

    size = join(tokens.size)
    x = (join(tokens.x * tokens.size[:, None]) / size[:, None]).to(tokens.x.dtype)
    now = torch.empty_like(tokens.patch)  # (T,) where each token went
    odd = torch.arange(len(left), len(x), device=x.device)
    now[1::2] = odd
    now[2 * left] = torch.arange(len(left), device=x.device)
    now[2 * merged] = odd[into]
    patch = torch.cat((tokens.patch[::2][left], tokens.patch[1::2]))
    closest = torch.minimum(tokens.closest, closest)
    return Tokens(x, size, patch, now[tokens.of], closest, merged=True)


def run_block(block: Block, tokens: Tokens, r: int) -> Tokens:
    """One block of the tower, with r merges after its attention."""
    x, heads = tokens.x, tower_heads(block, tokens.x)
    bias = tokens.size.log().to(x.dtype)[None, None, None] if tokens.merged else None
    tokens = replace(tokens, x=add_attention(block, x, heads, bias))
    if r := min(r, (len(x) - 1) // 2):
        tokens = merge(tokens, *match(heads[1][0].mean(0), r))
    return replace(tokens, x=tokens.x + block.mlp(block.norm2(tokens.x)))


def most_merges(tokens: int, blocks: int) -> int:
    """How many of `tokens` (class token included) `blocks` blocks can merge."""
    left = tokens
    for _ in range(blocks):
        left -= (left - 1) // 2
    return tokens - left


@dataclass(frozen=True)
class ToMe(Method):
    r: int | None = option(None, low=0, help="tokens merged in every block")
    keep: float | None = amount(None, instead_of=("r",), help="number or share left")

    name, identity, drops_only, numbering = "tome", "r=0", False, "compact"
    check_order = need_all_patches

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and self.keep is None:
            raise ValueError(
                "tome needs r= (merges in every block) or keep=, for example tome:r=16"
            )

    def stages(self) -> Stages:
        return (("vision", 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        if self.keep is None:
            return (n_tokens - min(self.r or 0, n_tokens // 2),)
        return (count(self.keep, n_tokens),)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (0,)

    def check_model(self, model: LLaVA) -> None:
        self.merges(model.config.vision.num_patches, model.feature_layer)

    def own_features(self, n_tokens: int) -> bool:
        return self.left(n_tokens)[0] < n_tokens

    def merges(self, n_tokens: int, blocks: int) -> list[int]:
        """How many tokens each block merges; none can merge more than half of what it has."""
        if self.keep is None:
            return [self.r or 0] * blocks
        surplus, tokens, merges = n_tokens - count(self.keep, n_tokens), n_tokens + 1, list[int]()
        for later in reversed(range(blocks)):
            r = -(-surplus // (later + 1))  # rounded up
            while r < surplus - most_merges(tokens - r, later):
                r += 1
            merges.append(min(r, (tokens - 1) // 2))
            tokens, surplus = tokens - merges[-1], surplus - merges[-1]
        if surplus:
            raise ValueError(
                f"tome: keep={self.keep} cannot be reached in {blocks} blocks, each of which "
                f"merges half of its tokens at most; use keep={tokens - 1}"
            )
        return merges

    def choose(self, c: Context) -> Keep:
        check_whole_grid(c, self.name)
        merges = self.merges(c.n_tokens, c.model.feature_layer)
        if not any(merges):
            return Keep(torch.arange(c.n_tokens))
        x = c.vision_state(0)[0]  # (1 + N, C)
        each = torch.arange(len(x), device=x.device)
        one = torch.ones(len(x), device=x.device)
        tokens = Tokens(x, one, each - 1, each, one.new_full((), torch.inf))
        for block, r in zip(c.model.vision.blocks, merges, strict=False):
            tokens = run_block(cast(Block, block), tokens, r)
        refuse_nan(tokens.x, c.where)
        index = tokens.patch[1:]
        return Keep(
            index,
            merged=tokens.x[1:],
            ordered=True,
            merged_into=(tokens.of[1:] - 1).index_fill(0, index, -1),
            closest=tokens.closest,
        )
