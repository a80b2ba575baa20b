"""VLM-Pruner: from a few pivots outwards, admit tokens that nothing near them resembles.

Wu et al., arXiv 2512.02700. Released code: Casey-bit/VLMPruner 556a914, llava/model/language_model/
modeling_llama_self.py, get_retained_image_token. At the input of layer 2, `keep` of the n stay:
1. The first pivot is the image token whose rotated key in the layer before, all heads together, has
   the largest L1 norm; the others of the 4 are each the farthest from those before (L2, same keys).
2. Tokens are compared by the cosine of their 256 channels that vary most over the image. A token is
   as redundant as its largest cosine to the chosen ones times 1 + half its distance to the nearest
   of them on the grid, as a share of the grid's diagonal.
3. In each round the others are taken in batches of 16, least redundant first. Those whose
   redundancy, with what was chosen so far, is below `threshold` are admitted; of the batch that
   would be too many, the least redundant. It grows by 0.1 with each round. A round ends if its
   first batch admits none, and the choice with a round that admits none, so fewer than `keep` can
   stay.
4. Each dropped token goes to the chosen one with the largest cosine. Where the cosines of those sum
   to more than 0, a chosen row becomes 0.3 of itself and 0.7 of their mean weighted by the cosines.
Order and positions stay. The released settings for 192, 128 and 64 tokens differ in `keep` alone.

Deviations: any number of images and samples, and grids. Cosines are float32. With keep below the
number of pivots there are fewer of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows import on_device, take_rows
from .base import Context, Keep, amount, option
from .margins import COSINE, least
from .order import need_patches
from .shared import (
    AtLayer,
    farthest_points,
    mark_nan,
    other_numbers,
    refuse_nan,
    unchecked_cosines,
)

CHANNELS = 256


def grid_distances(patches: Tensor, grid: int) -> Tensor:
    """Distances of patches (n,) on the grid as shares of its diagonal: (n, n)."""
    places = torch.stack((patches % grid, patches // grid), 1).float()
    return torch.cdist(places, places) / (grid * 2**0.5)


def admit_tokens(
    cosine: Tensor, distance: Tensor, pivots: Tensor, k: int, limit: float, batch: int
) -> tuple[Tensor, Tensor]:
    """At most k tokens, `pivots` first, in the order of their admission; and how near any of the
    decisions was to the limit, see lead(). cosine, distance (n, n). All on the CPU."""
    chosen, free = pivots, torch.ones(len(cosine), dtype=torch.bool).index_fill(0, pivots, False)
    alike, near = cosine[:, pivots].amax(1), distance[:, pivots].amin(1)
    closest, before = cosine.new_full((), torch.inf), 0
    while before < len(chosen) < k:
        before, left = len(chosen), free.nonzero()[:, 0]
        order = left[(alike * (1 + near / 2))[left].sort(stable=True).indices]
        for number, part in enumerate(order.split(batch)):
            if number == 1 and len(chosen) == before:
                break
            redundant = alike[part] * (1 + near[part] / 2)
            closest = torch.minimum(closest, (redundant - limit).abs().amin())
            taken, room = part[redundant < limit], k - len(chosen)
            if len(taken) > room:
                taken = part[redundant.sort(stable=True).indices[:room]]
            if len(taken):
                chosen, free[taken] = torch.cat((chosen, taken)), False
                alike = torch.maximum(alike, cosine[:, taken].amax(1))
                near = torch.minimum(near, distance[:, taken].amin(1))
            if len(chosen) == k:
                break
        limit += 0.1
    return chosen, closest


def blend_dropped(x: Tensor, cosine: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen rows (k, D) of x (n, D) blended with what goes into them; and Keep.merged_into."""
    dropped = other_numbers(len(x), chosen)
    rows, into = take_rows(x, chosen), torch.full((len(x),), -1)
    if not len(dropped):
        return rows, into
    weight, nearest = cosine[dropped][:, chosen].max(1)  # (m,)
    weights = torch.zeros(len(chosen), len(dropped))
    weights[nearest, torch.arange(len(dropped))] = weight
    total = weights.sum(1, keepdim=True)  # (k, 1)
    weights = on_device(weights / total.clamp(min=1e-8), x)
    blend = 0.3 * rows.float() + 0.7 * (weights @ take_rows(x, dropped).float())
    blended = torch.where(on_device(total, x) > 0, blend.to(x.dtype), rows)
    return blended, into.index_copy(0, dropped, nearest)


@dataclass(frozen=True)
class VLMPruner(AtLayer):
    keep: float = amount(128, help="number or share kept")
    layer: int = option(2, low=1, help="layer whose input is pruned; it needs one before it")
    threshold: float = option(0.8, low=0, help="redundancy from which on a token waits")
    batch: int = option(16, low=1, help="tokens that are compared at a time")
    pivots: int = option(4, low=1, help="tokens to begin with")

    name, identity, drops_only = "vlmpruner", "layer=2,keep=1.0", False
    adaptive = True
    check_order = need_patches

    def choose(self, c: Context) -> Keep:
        x, n, (k,) = c.features(), len(c.candidates), self.left(c.n_tokens)
        if not 0 < k < n:
            return Keep(torch.arange(n)[:k])
        keys = take_rows(c.keys().flatten(1), c.candidates).float()  # (n, Hkv * Dh)
        first = keys.abs().sum(1).argmax(keepdim=True)
        pivots, by_key = farthest_points(keys, first, min(self.pivots, k))
        channels = x.float().var(0).topk(min(CHANNELS, x.shape[1])).indices
        some = x[:, channels]
        cosine = unchecked_cosines(some, some)
        both = torch.cat((mark_nan(cosine, keys).flatten(), pivots)).cpu()  # so the host waits once
        cosine, pivots = both[: n * n].view(n, n), both[n * n :].long()
        refuse_nan(cosine, c.where)
        distance = grid_distances(c.whole_patches(), c.grid)
        chosen, closest = admit_tokens(cosine, distance, pivots, k, self.threshold, self.batch)
        merged, into = blend_dropped(x, cosine, chosen)
        closest = least(by_key, closest / COSINE)
        return Keep(chosen, merged, order=chosen, merged_into=into, closest=closest)
