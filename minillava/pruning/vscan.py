"""VScan: a local and a global scan of the tower's attention, merging, and one drop in the decoder.

Zhang et al., TMLR 2026, arXiv 2505.22654. Released code: Tencent/SelfEvolvingAgent, VScan/,
llava/model/llava_arch.py, encode_images, and modeling_llama_x.py, layer_prune.

1. After the projector: (T // 2) // 16 tokens from each of 4 x 4 windows of the grid (6 x 6 patches
   of 24 x 24), by the class token's attention in block 5; the others of the T are the best of what
   is left by that in the second last block (means over heads). Every dropped token goes to the kept
   one with the most similar projected feature (cosine); a kept token becomes the mean of itself and
   what went to it. Reading order, numbered anew.
2. At the input of decoder layer 16 the `final` tokens stay that the newest row attends to, by the
   coming layer's own q and k, mean over heads (as PyramidDrop); numbered anew. The README's 96 and
   32 are 64 tokens in the mean over 32 layers; without `final` a third of T, as these.

`block` counts from 0; a tower that is not 24 deep has it at the same share unless told otherwise.
final=0 leaves the second part out. Deviation: for other grids the number of windows is kept, not
their size. Written from a description of the released code, not from its files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import Budgeted, Context, Keep, Stage, check_amount, count, top
from .shared import (
    assigned,
    attention,
    block_number,
    cosines,
    depth,
    second_last,
    whole_grid,
)

SIDE = 4  # windows along one side


def windows(grid: int) -> Tensor:
    """Patches of each window, in reading order: (16, patches per window)."""
    at = torch.arange(grid * grid).view(SIDE, grid // SIDE, SIDE, grid // SIDE)
    return at.transpose(1, 2).reshape(SIDE * SIDE, -1)


def scan(local: Tensor, final: Tensor, keep: int, what: str) -> Tensor:
    """Patches chosen by the two scores (N,), ascending: (keep,)."""
    panes = windows(round(len(local) ** 0.5)).to(local.device)  # (16, w)
    each = keep // 2 // len(panes)
    best = local[panes].sort(dim=1, descending=True, stable=True).indices[:, :each]
    near = panes.gather(1, best).flatten()
    far = top(final.index_fill(0, near, -torch.inf), keep - len(near), what)
    return torch.cat((near, far)).sort().values


def merge(features: Tensor, kept: Tensor, what: str) -> Tensor:
    """Each kept row (K, D) of features (n, D) as mean of itself and the dropped ones nearest it."""
    dropped = torch.ones(len(features), dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    others = features[dropped]
    if not len(kept) or not len(others):
        return features[kept]
    nearest = cosines(others, features[kept], what).argmax(1)  # (n - K,)
    into = assigned(nearest, len(kept), features.dtype)  # (K, n - K)
    return (features[kept] + into @ others) / (1 + into.sum(1, keepdim=True))


@dataclass(frozen=True)
class VScan(Budgeted):
    keep: float = field(default=96, metadata={"help": "number or share kept before the decoder"})
    layer: int = field(default=16, metadata={"help": "decoder layer of the second drop"})
    final: float | None = field(
        default=None, metadata={"help": "number or share of N left from that layer on; 0: no drop"}
    )
    block: int | None = field(
        default=None, metadata={"help": "block of the local scan, from 0; 5 of 24"}
    )

    name: ClassVar[str] = "vscan"
    paper: ClassVar[str] = "VScan, TMLR 2026, arXiv 2505.22654"
    source: ClassVar[str] = "Tencent/SelfEvolvingAgent, VScan/llava/model/llava_arch.py"
    acts: ClassVar[str] = "after the projector, and input of decoder layer 16"
    checked: ClassVar[str] = "an independent reference, token by token"
    identity: ClassVar[str | None] = "keep=1.0,final=0"
    drops_only: ClassVar[bool] = False
    newest_row: ClassVar[bool] = True
    numbering: ClassVar[str] = "compact"
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("keep", "average")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.name, self.keep)
        if self.final is not None:
            check_amount("vscan", self.final)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("embed", 0),) if self.final == 0 else (("embed", 0), ("decoder", self.layer))

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        if self.final != 0 and not 0 <= self.layer < n_layers:
            raise ValueError(
                f"vscan: layer={self.layer}, but the decoder has layers 0 to {n_layers - 1}; use, "
                f"for example, layer={n_layers // 2}, or final=0 for its first part alone"
            )
        super().check(n_layers, n_tokens, starts)
        keep, final = count(self.keep, n_tokens), self.last(n_tokens)
        if final > keep:
            raise ValueError(f"vscan: final={self.final} is more than the {keep} tokens of keep")
        grid = round(n_tokens**0.5)
        if grid % SIDE:
            raise ValueError(
                f"vscan cuts the picture into {SIDE} x {SIDE} windows; its {grid} x {grid} patches "
                "cannot be"
            )

    def last(self, total: int) -> int:
        """Tokens left by the second part."""
        if self.final is None:
            keep = count(self.keep, total)
            return min(keep, max(1, round(keep / 3)))
        return count(self.final, total)

    def most(self, n_tokens: int) -> int:
        return count(self.keep, n_tokens)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count(self.keep, n_tokens), self.last(n_tokens))[: len(self.stages())]

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[tuple[str, VScan]]:
        for k in range(max(1, self.last(n_tokens) if self.final else 1), n_tokens + 1):
            yield f"keep={k}", replace(self, average=None, keep=k)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        last = second_last(self.name, n_layers)
        return (self.shallow(n_layers), last)

    def shallow(self, n_layers: int) -> int:
        return block_number(self.name, self.block, n_layers, released=5)

    def choose(self, c: Context) -> Keep:
        if c.decoder is not None:
            score = c.decoder.attention(c.decoder.newest, 0).mean(0)[c.decoder.rows]
            return Keep(top(score, self.last(c.total), c.what))
        whole_grid(c, self.name)
        features = c.features()
        local, end = attention(c, self.shallow(depth(c))), attention(c, -2)
        kept = scan(local, end, count(self.keep, c.total), c.what)
        return Keep(kept, rows=merge(features, kept, c.what), ordered=True)
