"""ApET: keep the tokens that a few basis tokens explain worst, and merge the others into these.

CVPR 2026, arXiv 2602.19870. Released code: MaQianKun0/ApET 70cc01b, llava/model/llava_arch.py,
encode_images, and modeling_llama_x.py, layer_prune. No attention is read. Between vision tower and
projector `keep` tokens stay, and at the input of decoder layer 16 `final` of them, each time so:
1. `basis` rows are chosen by farthest points (squared L2 distance), the first one at random.
2. Every row is approximated by their linear combination (least squares, 1e-5 added to the diagonal
   of the Gram matrix). The error is the L2 norm of the rest. Those with the largest errors stay.
3. Of these, the last `basis` by error are overwritten by the basis rows, so a basis row stands at
   another token's place: in the first stage in the order of the grid, in the second by falling
   error. A basis row has no error itself, so it is among the dropped, too, unless almost all stay.
4. Each dropped row goes to the most similar of the others that stay (cosine), which becomes the
   mean of itself and those.
Tokens stay in reading order and are renumbered. 96 and 32 are 64 tokens in the mean over 32 layers;
without `final` a third of `keep` stays. `first` gives the first basis row of each stage, the second
counted among the rows that are left: first=11/9.

Deviations: rows are not rounded to float16 between the steps. The error of a basis row is 0, not
what rounding leaves: of these rows, the first in reading order stay. A stage that would keep all
rows changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Context, Keep, Step, option, top
from .margins import lead, least
from .shared import TwoStages, farthest_points, merge_dropped

RIDGE = 1e-5


def approximation_error(x: Tensor, basis: Tensor) -> Tensor:
    """What least squares on basis (k, C) leaves of each row of x (n, C): (n,)."""
    gram = basis @ basis.T + RIDGE * torch.eye(len(basis), device=x.device)
    weights, _ = torch.linalg.solve_ex(gram, basis @ x.T)  # (k, n); solve() would wait for CUDA
    return (x - weights.T @ basis).norm(dim=1)


@dataclass(frozen=True)
class ApET(TwoStages):
    basis: int = option(10, low=1, help="basis rows")
    first: tuple[int, ...] | None = option(None, low=0, help="first basis row of each stage")

    name, identity, drops_only, numbering = "apet", "keep=1.0,final=0", False, "compact"

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        left, n = self.left(n_tokens), n_tokens
        for i, k in enumerate(left):
            if k <= self.basis and k < n:
                raise ValueError(
                    f"apet: basis={self.basis} rows take the places of {k} that stay; "
                    "use a smaller basis"
                )
            if self.first is not None and (len(self.first) != len(left) or self.first[i] >= n):
                raise ValueError(
                    f"apet: first={'/'.join(map(str, self.first))} must name a row for each of "
                    f"{len(left)} stages; there are {n} rows in stage {i}"
                )
            n = k

    def check_order(self, steps: Sequence[Step], per_image: int, n_images: int) -> None:
        for step in steps if self.first is not None else ():
            if step.method is not self:
                raise ValueError(
                    f"apet: first={'/'.join(map(str, self.first or ()))} counts the rows of a "
                    f"whole image, but {step.method.label} runs before; leave one of them out"
                )

    def choose(self, c: Context) -> Keep:
        x, k, n = c.features(), self.left(c.n_tokens)[c.stage_index], len(c.candidates)
        if k >= n:
            return Keep(torch.arange(n))
        if self.first is None:
            first = torch.randint(n, (1,), generator=c.generator)
        else:
            first = torch.tensor(self.first[c.stage_index : c.stage_index + 1])
        rows = x.float()
        basis, closest = farthest_points(rows, first, self.basis)  # (b,)
        error = approximation_error(rows, rows[basis]).index_fill(0, basis, 0.0)  # (n,)
        order = top(error, n, c.where)
        ranked = error[order[: n - self.basis]]  # the basis rows are last
        own, places, dropped = order.split([k - self.basis, self.basis, n - k])
        if c.stage_index == 0:
            places = places.sort().values
        merged, into = merge_dropped(x, own, dropped)
        return Keep(
            torch.cat((own, places)),
            merged=torch.cat((merged, x[basis])),
            scores=error,
            merged_into=into,
            closest=least(closest, *(lead(ranked, i) for i in (k - self.basis, k))),
        )
