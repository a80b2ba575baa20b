"""SparseVLM: drop image tokens in stages by what relevant text attends to, and merge the best.

Zhang et al., ICML 2025, arXiv 2410.04417. Released code (Gumpest/SparseVLMs 26a5f48,
USE_VERSION=1_0, the paper's v1.5): modelling_sparse_llama.py, score.py, utils.py.
1. Raters: A = softmax over the text tokens of (image @ text.T), from the rows as they entered layer
   0, averaged over the image tokens. The text tokens after the image with A above the mean rate.
2. At each stage the attention of the raters in the layer before, mean over heads and raters, ranks
   the n image rows. The best min(keep, n - 1) stay.
3. Of the dropped, the best int(0.3 * dropped) + 1 are clustered by density peaks, a tenth as many
   clusters, and each cluster becomes its mean. The means follow the kept rows and are ranked
   together with them at the next stage.
Positions are renumbered after every stage, and the position of a new token in a layer is the number
of rows that this layer's cache holds. The published stages 2, 6 and 15 name the layers whose OUTPUT
is pruned; here 3, 7 and 16 are the layers whose input is.

version=2 (USE_VERSION=2_0, SparseVLM+, recommended by its authors) has the same raters and stages,
another score (sparsevlm_plus.py) and other published lists. It merges nothing, and positions stay.

Deviations: the released code adds noise of up to 1e-6 to the densities; here it is zero. Where no
text token is above the mean (a single one, say) all of them rate; the released code would divide by
zero. A published budget of 192 counts the layer that prunes as if its input had been pruned;
`average=192` counts what enters, the means among it, and scales the published list of 192.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..llava import LLaVA
from ..rows import on_device
from .base import Context, Keep, amount, count, option, top
from .margins import TINY, distance_to, lead, least
from .shared import AtLayers, midpoints, refuse_nan
from .sparsevlm_plus import HEADS, check_heads, score_by_strong_heads

PUBLISHED = {1: (300, 200, 110), 2: (300, 200, 118)}  # kept at each stage, for a budget of 192


def select_raters(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Which text tokens rate (r,), on the CPU, and how near any is to the limit, see lead(): image
    (m, D) and text (t, D) as they entered the decoder."""
    share = (image.float() @ text.float().T).softmax(1).mean(0).cpu()  # (t,)
    above = (share > share.mean()).nonzero()[:, 0]
    return above if len(above) else torch.arange(len(text)), distance_to(share.mean(), share)


def count_merged(dropped: int) -> int:
    """How many of the dropped tokens are merged."""
    return int(dropped * 0.3) + 1


def count_clusters(merged: int) -> int:
    """How many means the merged tokens become."""
    return int(merged / 10) + 1


def cluster_rows(x: Tensor, n: int, where: str) -> tuple[Tensor, Tensor]:
    """The cluster 0..n-1 of each of rows x (q, D) around n density peaks, densest first: (q,); and
    how near this is to another result, see lead(). NaN in x raises ValueError, which says `where`
    it was found.

    The density of a row is exp(-mean squared distance to its n nearest rows, itself among them). A
    peak is dense and far from every denser row. Distances are divided by sqrt(D). With n = 2 two
    rows that are nearest to each other are equally dense and both peaks; ties stay in the order
    that topk on a CPU gives them, as in the released code.
    """
    x = x.float()
    distance = x.new_zeros(len(x), len(x))
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    distance[i, j] = torch.pdist(x) / x.shape[1] ** 0.5  # ten times as fast as cdist on a CPU
    distance = distance + distance.T
    nearest = distance.topk(n, largest=False).values  # (q, n)
    density = (-nearest.square().mean(1)).exp()  # (q,)
    denser = density > density[:, None]  # (q, q): column j is denser than row i
    apart = distance.where(denser, distance.max()).amin(1)
    height = (apart * density).cpu()  # (q,)
    refuse_nan(height, where)
    peaks = on_device(height.topk(n).indices, x)  # (n,)
    near = distance[peaks]  # (n, q)
    cluster = near.argmin(0)  # (q,)
    cluster[peaks] = torch.arange(n, device=x.device)
    if n == 1:  # whichever the peak is
        return cluster, x.new_full((), torch.inf)
    first, second = near.topk(2, dim=0, largest=False).values  # (q,) each
    return cluster, least(lead(height, n), (1 - first / second.clamp(min=TINY)).amin())


def cluster_means(x: Tensor, cluster: Tensor, n: int) -> Tensor:
    """Means (n, D) of the rows x (q, D) of each cluster, from cluster (q,)."""
    x = x.float()
    member = F.one_hot(cluster, n).T.to(x.dtype)  # (n, q)
    return member @ x / member.sum(1, keepdim=True)


def merge_best_dropped(c: Context, score: Tensor, k: int, closest: Tensor) -> Keep:
    """Keep the k < n candidates with the highest score (n,), and the means of the best of the
    others. closest: of decisions before this one, see lead()."""
    # not top(), for which a GPU would wait: NaN is refused with that of the merged rows
    order = score.sort(descending=True, stable=True).indices  # (n,)
    merged = order[k : k + count_merged(len(score) - k)]  # (q,)
    x, groups = c.features()[merged], count_clusters(len(merged))
    marked = x.masked_fill(score.isnan().any(), torch.nan)  # (q, D)
    cluster, between = cluster_rows(marked, groups, c.where)
    return Keep(
        order[:k],
        extra=cluster_means(x, cluster, groups),
        scores=score,
        merged_into=torch.full_like(order, -1).index_copy(0, merged, k + cluster),
        closest=least(closest, lead(score, k), lead(score, k + len(merged)), between),
    )


@dataclass(frozen=True)
class SparseVLM(AtLayers):
    layers: tuple[int, ...] = option(
        (3, 7, 16), low=1, help="layers whose input is pruned; each needs one before it"
    )
    keep: tuple[float, ...] | None = amount(
        None, help="numbers or shares kept, without merged rows; unset: the list for 192"
    )
    version: int = option(1, low=1, high=2, help="1: the paper's, which merges; 2: SparseVLM+")
    heads: int | None = option(None, low=1, help="of version 2: heads that rank; unset: 14")

    name, drops_only, numbering, adds_rows = "sparsevlm", False, "compact", True

    def __post_init__(self) -> None:
        if self.version == 2:  # it merges nothing
            object.__setattr__(self, "drops_only", True)
            object.__setattr__(self, "adds_rows", False)
            object.__setattr__(self, "numbering", "original")
        super().__post_init__()
        if self.version == 1 and self.heads is not None:
            raise ValueError(f"sparsevlm: heads={self.heads} is an option of version=2")

    def numbers(self) -> tuple[float, ...]:
        """Tokens kept at each stage."""
        return PUBLISHED[self.version] if self.keep is None else self.keep

    def check_model(self, model: LLaVA) -> None:
        if self.version == 2:
            check_heads(self.heads, model.config.text.num_attention_heads)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        left, n = [], n_tokens
        for k in self.numbers():
            kept = min(count(k, n_tokens), n - 1)
            n = kept + (count_clusters(count_merged(n - kept)) if self.version == 1 else 0)
            left.append(n)
        return tuple(left)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[SparseVLM]:
        published = PUBLISHED[self.version]
        if len(self.layers) != len(published):
            raise ValueError(
                f"sparsevlm: average= scales the published list for {len(published)} layers, "
                f"layers={'/'.join(map(str, self.layers))} are {len(self.layers)}; give keep="
            )
        # round(scale * k) changes at halves; the first stage drops one token at least
        halves = ((m + 0.5) / k for k in published for m in range(n_tokens))
        most = (n_tokens - 0.5) / published[0]
        for scale in midpoints(half for half in halves if half <= most):
            keep = tuple(max(1, round(scale * k)) for k in published)
            yield replace(self, keep=keep)

    def choose(self, c: Context) -> Keep:
        raters, from_limit = select_raters(c.entered(), c.text())
        raters, n = c.text_rows[raters], len(c.candidates)
        k = min(count(self.numbers()[c.stage_index], c.n_tokens), n - 1)
        if self.version == 2:
            score, by_head = score_by_strong_heads(c, raters, self.heads or HEADS)
            closest = least(from_limit, by_head, lead(score, k))
            return Keep(top(score, k, c.where), scores=score, closest=closest)
        score = c.attention(raters).mean(0)  # (H, n) -> (n,)
        return merge_best_dropped(c, score, k, from_limit)
