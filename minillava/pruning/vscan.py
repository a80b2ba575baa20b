"""VScan: choose by local and global attention of the tower, merge, and drop once in the decoder.

Zhang et al., TMLR 2026, arXiv 2505.22654. Released code: Tencent/SelfEvolvingAgent, VScan/,
llava/model/llava_arch.py, encode_images, and modeling_llama_x.py, layer_prune.
1. After the projector, T tokens stay. (T // 2) // 16 come from each of 4 x 4 windows of the grid
   (6 x 6 patches of 24 x 24): those with the most attention from the class token in block 5. The
   others of the T are the best of the rest by the same attention in the second-last block (both
   means over heads). Every dropped token is assigned to the kept one whose projected feature is the
   most similar (cosine), and each kept token becomes the mean of itself and those. The order is
   that of the grid. Positions are renumbered.
2. At the input of decoder layer 16 the `final` tokens stay to which the newest row attends most, by
   the queries and keys of the coming layer, mean over heads (as in PyramidDrop). Positions are
   renumbered. The 96 and 32 of the README are 64 tokens averaged over 32 layers. Without `final`,
   a third of T stays, as there.

`block` counts from 0; without it, a tower that does not have 24 blocks uses the one at the same
share of its depth. final=0 leaves the second part out. Deviations: for other grids the number of
windows stays, not their size. Where the windows cannot share T // 2 equally, the others make up for
it, so that T stay (281 of 281); the released code then keeps fewer (269).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Keep, option, top
from .margins import lead, least
from .order import need_all_patches
from .shared import (
    TwoStages,
    block_number,
    check_whole_grid,
    mark_nan,
    merge_dropped,
    other_numbers,
    second_last_block,
    window_patches,
)

SIDE = 4  # windows along one side


def scan_patches(
    local_score: Tensor, global_score: Tensor, k: int, where: str
) -> tuple[Tensor, Tensor]:
    """The k patches that the two scores (N,), on the CPU, choose, ascending: (k,); and the least
    lead() of these choices."""
    grid = round(len(local_score) ** 0.5)
    windows = window_patches(grid, grid // SIDE)  # (16, w)
    each = k // 2 // len(windows)
    best = local_score[windows].sort(dim=1, descending=True, stable=True).indices[:, :each]
    local = windows.gather(1, best).flatten()
    rest = global_score.index_fill(0, local, -torch.inf)
    others = top(rest, k - len(local), where)
    leads = [lead(score, each) for score in local_score[windows]]
    leads.append(lead(rest, len(others)))
    return torch.cat((local, others)).sort().values, least(*leads)


@dataclass(frozen=True)
class VScan(TwoStages):
    block: int | None = option(None, help="block of the local scan, from 0; 5 of 24")

    name, identity, newest_row = "vscan", "keep=1.0,final=0", True
    drops_only, numbering, stage = False, "compact", "embed"
    check_order = need_all_patches

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        grid = round(n_tokens**0.5)
        if grid % SIDE:
            raise ValueError(
                f"vscan cuts the image into {SIDE} x {SIDE} windows; its {grid} x {grid} patches "
                "cannot be"
            )

    def local_block(self, n_blocks: int) -> int:
        return block_number(self.name, self.block, n_blocks, released=5)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        last = second_last_block(self.name, n_layers)
        return (self.local_block(n_layers), last)

    def choose(self, c: Context) -> Keep:
        k = self.left(c.n_tokens)[c.stage_index]
        if c.stage_index == 1:
            score = c.attention(c.newest, layer=0).mean(0)  # (H, n) -> (n,)
            return Keep(top(score, k, c.where), scores=score)
        check_whole_grid(c, self.name)
        block = self.local_block(len(c.model.vision.blocks))
        scores = torch.stack([c.vision_attention(b).mean(0) for b in (block, -2)])
        features = c.features()
        local, whole = mark_nan(scores, features).cpu()  # (N,) each
        kept, closest = scan_patches(local, whole, k, c.where)
        merged, into = merge_dropped(features, kept, other_numbers(len(features), kept))
        return Keep(kept, merged, scores=whole, merged_into=into, closest=closest)
