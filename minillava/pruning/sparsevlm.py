"""SparseVLM: drop image tokens in stages by what the relevant text reads, and recycle the best.

Zhang et al., ICML 2025, arXiv 2410.04417. Released code (Gumpest/SparseVLMs 26a5f48,
USE_VERSION=1_0, the paper's v1.5): modelling_sparse_llama.py, score.py, utils.py. Raters are the
text rows behind the image with more than their share of the softmax over text of image x text (rows
as they entered layer 0, mean over image rows). At each stage the raters' attention in the layer
before, averaged over heads and raters, ranks the image rows; the best min(keep, n - 1) of n stay.
Of the dropped, the best int(0.3 * dropped) + 1 are clustered by density peaks into a tenth as many
means, which follow the kept rows and compete with them at the next stage. Positions are renumbered
after every stage, and a new token's position in a layer is that layer's own length. The published
stages 2, 6, 15 name the layers whose OUTPUT is pruned; here 3, 7, 16 are the layers entered.

Deviations: the noise of up to 1e-6 that the released code adds to the densities is zero. Where no
text row is above the mean (a single one, say) all of them rate; the released code would divide by
zero. v2 (no merging, fixed numbers of heads) is left out. A published budget of 192 counts the
layer that prunes as pruned already; `average=192` counts what enters, and merged rows, and scales
the list of 192.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .average import between, check_after_first, check_ascending, check_stages
from .base import Budgeted, Context, Keep, Stage, check_amount, check_keep, count, top


def raters(image: Tensor, text: Tensor) -> Tensor:
    """Which text rows rate (r,): image (m, D) and text (t, D) as they entered the decoder."""
    share = (image.float() @ text.float().T).softmax(1).mean(0)  # (t,)
    above = (share > share.mean()).nonzero()[:, 0]
    return above if len(above) else torch.arange(len(text), device=text.device)


def recycled(dropped: int) -> int:
    """How many of the dropped rows are merged."""
    return int(dropped * 0.3) + 1


def merged(rows: int) -> int:
    """Into how many."""
    return int(rows / 10) + 1


def cluster_means(x: Tensor, n: int) -> Tensor:
    """Means (n, D) of the clusters of rows x (q, D) around n density peaks, densest first.

    A row's density is exp(-mean squared distance to its n nearest rows, itself among them); a peak
    is dense and far from every denser row. Distances are divided by sqrt(D). With n = 2 two rows
    that are nearest to each other are equally dense, and peaks both: such ties stand as topk on a
    CPU, the released code's, leaves them.
    """
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    nearest = distance.topk(n, largest=False).values  # (q, n)
    density = (-nearest.square().mean(1)).exp()  # (q,)
    denser = density > density[:, None]  # (q, q): column j is denser than row i
    apart = distance.where(denser, distance.max()).amin(1)
    peaks = (apart * density).cpu().topk(n).indices.to(x.device)  # (n,)
    cluster = distance[peaks].argmin(0)  # (q,)
    cluster[peaks] = torch.arange(n, device=x.device)
    member = F.one_hot(cluster, n).T.to(x.dtype)  # (n, q)
    return member @ x / member.sum(1, keepdim=True)


@dataclass(frozen=True)
class SparseVLM(Budgeted):
    layers: tuple[int, ...] = field(
        default=(3, 7, 16), metadata={"help": "layers whose input is pruned"}
    )
    keep: tuple[float, ...] = field(
        default=(300, 200, 110), metadata={"help": "numbers or shares kept, without merged rows"}
    )

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, ICML 2025, arXiv 2410.04417"
    source: ClassVar[str] = "Gumpest/SparseVLMs 26a5f48, modelling_sparse_llama.py, score.py"
    acts: ClassVar[str] = "input of several decoder layers"
    checked: ClassVar[str] = "outputs of the released code, two runs (tests/goldens/sparsevlm)"
    drops_only: ClassVar[bool] = False
    numbering: ClassVar[str] = "compact"
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("keep", "average")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average is not None:
            check_ascending(self.name, self.layers)
            if len(self.layers) != len(SparseVLM.keep):
                raise ValueError(
                    f"sparsevlm: average= scales the published list for {len(SparseVLM.keep)} "
                    f"layers, layers={'/'.join(map(str, self.layers))} are {len(self.layers)}; "
                    "give keep="
                )
            return
        check_stages(self.name, self.layers, self.keep, "keep")
        for k in self.keep:
            check_amount(self.name, k)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return tuple(("decoder", layer) for layer in self.layers)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        check_after_first(self.name, self.layers[0])
        for k in self.keep:
            check_keep(self.name, k, n_tokens)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        left, n = [], n_tokens
        for k in self.keep:
            kept = min(count(k, n_tokens), n - 1)
            n = kept + merged(recycled(n - kept))
            left.append(n)
        return tuple(left)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[tuple[str, SparseVLM]]:
        shape = SparseVLM.keep  # the published list of 192
        # round(scale * k) changes at halves; the first stage drops one token at least
        halves = ((m + 0.5) / k for k in shape for m in range(n_tokens))
        most = (n_tokens - 0.5) / shape[0]
        for scale in between(half for half in halves if half <= most):
            keep = tuple(max(1, round(scale * k)) for k in shape)
            yield f"keep={'/'.join(map(str, keep))}", replace(self, average=None, keep=keep)

    def choose(self, c: Context) -> Keep:
        d = c.decoder
        assert d is not None
        if not len(d.rows):
            return Keep(c.patches)
        rows = d.text_rows[raters(d.entered(), d.text())]
        score = d.attention(rows).mean(0)[d.rows]  # (n,)
        order = top(score, len(score), c.what)
        k = min(count(self.keep[c.part], c.total), len(order) - 1)
        again = order[k : k + recycled(len(order) - k)]  # (q,) best of the dropped first
        return Keep(order[:k], extra=cluster_means(c.features()[again], merged(len(again))))
