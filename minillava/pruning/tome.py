"""ToMe: merge the most similar tokens inside the vision tower, block by block.

Bolya et al., ICLR 2023, arXiv 2210.09461. Released code: facebookresearch/ToMe, tome/merge.py,
bipartite_soft_matching and merge_wavg; tome/patch/clip.py. In every block that LLaVA's feature
layer needs, between attention and MLP: tokens at even places are matched with those at odd places
by the cosine of their keys (mean over heads, the block's own); the r even ones with the best match
are merged into it, a mean weighted by how many patches each stands for. The class token stands at
place 0 and is never merged. Attention adds log(size) to the logits of a key once sizes differ.

The order is that of the released code, unmerged even tokens, then odd ones, in every block anew: it
is not reading order. Numbered anew. A merged token has the number of the odd one it went into.
`keep` instead of r: as many merges as leave that number, spread over the blocks as evenly as
possible, the first ones taking more.

Alone in a plan it runs in the tower's place; in a plan with others, which may read the tower as it
is, beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Context, Keep, Method, Stage, check_amount, count
from .shared import RELEASED_TOO, assigned, cosines, whole_grid

if TYPE_CHECKING:
    from ..clip import Block


@dataclass(frozen=True)
class Tokens:
    """The tower's tokens in one block."""

    rows: Tensor  # (T, C)
    size: Tensor  # (T,) float32, patches behind each
    name: Tensor  # (T,) the patch it is named after, -1 for the class token


def match(metric: Tensor, r: int, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Places (T, d) to merge: the r even ones, their odd targets, and the even ones left.

    All count within their half, as does the class token's place 0.
    """
    alike = cosines(metric[::2], metric[1::2], what)  # (E, O)
    alike[0] = -torch.inf
    best = alike.max(1)
    order = best.values.sort(descending=True, stable=True).indices
    merged, left = order[:r], order[r:].sort().values
    return merged, best.indices[merged], left


def merge(tokens: Tokens, merged: Tensor, into: Tensor, left: Tensor) -> Tokens:
    """The even tokens `merged` go into the odd ones `into`."""
    sums = assigned(into, len(tokens.rows) // 2, tokens.size.dtype)  # (O, r)

    def join(x: Tensor) -> Tensor:
        even, odd = x[::2], x[1::2]
        return torch.cat((even[left], odd + sums @ even[merged]))

    size = join(tokens.size)
    rows = (join(tokens.rows * tokens.size[:, None]) / size[:, None]).to(tokens.rows.dtype)
    return Tokens(rows, size, torch.cat((tokens.name[::2][left], tokens.name[1::2])))


def run_block(block: Block, tokens: Tokens, r: int, what: str) -> Tokens:
    """One block of the tower, with r merges behind its attention."""
    x, attn = tokens.rows, block.attn
    h = block.norm1(x)
    q, k, v = (
        proj(h).view(1, len(x), attn.n_heads, -1).transpose(1, 2)  # (1, H, T, Dh)
        for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    bias = None if (tokens.size == 1).all() else tokens.size.log().to(x.dtype)[None, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    x = x + attn.out_proj(y[0].transpose(0, 1).reshape(len(x), -1))
    tokens = Tokens(x, tokens.size, tokens.name)
    r = min(r, (len(x) - 1) // 2)
    if r:
        tokens = merge(tokens, *match(k[0].mean(0), r, what))
    return Tokens(tokens.rows + block.mlp(block.norm2(tokens.rows)), tokens.size, tokens.name)


def within_reach(tokens: int, blocks: int) -> int:
    """How many of so many tokens (with the class token) can be merged in so many blocks."""
    left = tokens
    for _ in range(blocks):
        left -= (left - 1) // 2
    return tokens - left


@dataclass(frozen=True)
class ToMe(Method):
    r: int | None = field(default=None, metadata={"help": "tokens merged in every block"})
    keep: float | None = field(default=None, metadata={"help": "number or share left, instead"})

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, ICLR 2023, arXiv 2210.09461"
    source: ClassVar[str] = "facebookresearch/ToMe, tome/merge.py and tome/patch/clip.py"
    acts: ClassVar[str] = "in every block of the vision tower"
    checked: ClassVar[str] = RELEASED_TOO
    identity: ClassVar[str | None] = "r=0"
    drops_only: ClassVar[bool] = False
    numbering: ClassVar[str] = "compact"
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("r", "keep")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and self.keep is None:
            raise ValueError(
                "tome needs r= (merges in every block) or keep=, for example tome:r=16"
            )
        if self.r is not None and self.r < 0:
            raise ValueError(f"tome: r={self.r} must be 0 or more")
        if self.keep is not None:
            check_amount("tome", self.keep)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("vision", 0),)

    def most(self, n_tokens: int) -> int:
        if self.keep is not None:
            return count(self.keep, n_tokens)
        return n_tokens - min(self.r or 0, n_tokens // 2)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (0,)

    def own_features(self, n_tokens: int) -> bool:
        if self.keep is None:
            return bool(self.r)
        return count(self.keep, n_tokens) < n_tokens

    def merges(self, total: int, blocks: int) -> list[int]:
        """How many in each block; a block cannot merge more than half of its tokens."""
        if self.keep is None:
            return [self.r or 0] * blocks
        surplus, tokens, plan = total - count(self.keep, total), total + 1, []
        for later in reversed(range(blocks)):
            r = -(-surplus // (later + 1))
            while r < surplus - within_reach(tokens - r, later):
                r += 1
            plan.append(min(r, (tokens - 1) // 2))
            tokens, surplus = tokens - plan[-1], surplus - plan[-1]
        if surplus:
            raise ValueError(
                f"tome: keep={self.keep} cannot be reached in {blocks} blocks, each of which "
                f"merges half of its tokens at most; use keep={tokens - 1}"
            )
        return plan

    def choose(self, c: Context) -> Keep:
        whole_grid(c, self.name)
        vision = c.vision()
        plan = self.merges(c.total, vision.feature_layer)
        if not any(plan):
            return Keep(torch.arange(c.total, device=c.patches.device))
        rows = vision.hidden[0][0]  # (1 + N, C)
        name = torch.arange(-1, c.total, device=rows.device)
        tokens = Tokens(rows, torch.ones(len(rows), device=rows.device), name)
        for block, r in zip(vision.tower.blocks, plan, strict=False):
            tokens = run_block(cast("Block", block), tokens, r, c.what)
        return Keep(tokens.name[1:], rows=tokens.rows[1:], ordered=True)
