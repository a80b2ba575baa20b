"""Simignore: keep the image tokens that resemble the text.

Zhang et al., AAAI 2025, arXiv 2412.09817. Released code (FanshuoZeng/Simignore):
llava_arch.py, prepare_inputs_labels_for_multimodal. After the projector, before layer 0: the
similarity of every image row with every row of the focus (input embeddings, no positions), all
pairs sorted downwards; walk from pair `i_index` in steps of `step`, admit each pair's image row
when it is new, until `keep` rows are in. With step=1, i_index=0 these are the rows with the largest
maximum.

Deviations: any prompt and any number of images, where the released code wants a ScienceQA prompt
with one image. Its mask ends where FastV's layer begins (`until`), by an accident of the mask that
FastV rebuilds; without `until` ours stays. The other measures, of which the released code has only
comments, take the rows as they are and the nearest pair first. What the text is, and how the prompt
was cut into pieces, is the processor's business (`focus`, `tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Context, Keep, Method, Stage, check_amount, check_keep, count

MEASURES = ("cosine", "euclidean", "manhattan")


def similarity(image: Tensor, text: Tensor, measure: str) -> Tensor:
    """Image rows (n, D) against text rows (t, D): (n, t) in float32, larger is more alike."""
    image, text = image.float(), text.float()
    if measure == "cosine":
        return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return -torch.cdist(image, text, p=2.0 if measure == "euclidean" else 1.0)


def walk(pairs: Tensor, keep: int, step: int = 1, i_index: int = 0) -> Tensor:
    """Rows of pairs (n, t) in the order in which the walk meets them, at most `keep`."""
    n, t = pairs.shape
    order = torch.sort(pairs.flatten(), descending=True, stable=True).indices[i_index::step]
    met = torch.full((n,), n * t, device=pairs.device)  # rank at which each row is first met
    rank = torch.arange(len(order), device=pairs.device)
    met = met.scatter_reduce(0, order // t, rank, "amin")
    rows = met.argsort()[: int((met < n * t).sum())]
    return rows[:keep]


@dataclass(frozen=True)
class Simignore(Method):
    keep: float = field(metadata={"help": "number or share kept"})
    step: int = field(default=1, metadata={"help": "pairs per step of the walk"})
    i_index: int = field(default=0, metadata={"help": "the pair it starts with"})
    measure: str = field(default="cosine", metadata={"choices": MEASURES})

    name: ClassVar[str] = "simignore"
    paper: ClassVar[str] = "Simignore, AAAI 2025, arXiv 2412.09817"
    source: ClassVar[str] = "FanshuoZeng/Simignore, llava_arch.py"
    acts: ClassVar[str] = "after the projector, before layer 0"
    checked: ClassVar[str] = "outputs of the released code, 7B and 13B (tests/goldens/simignore)"
    identity: ClassVar[str | None] = "keep=1.0"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount("simignore", self.keep)
        if self.step < 1 or self.i_index < 0:
            raise ValueError(
                f"simignore: step={self.step}, i_index={self.i_index}; "
                "step must be at least 1, i_index at least 0"
            )

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("embed", 0),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        check_keep("simignore", self.keep, n_tokens)

    def most(self, n_tokens: int) -> int:
        return count(self.keep, n_tokens)

    def choose(self, c: Context) -> Keep:
        pairs = similarity(c.features(), c.focus(), self.measure)  # (n, t)
        if pairs.isnan().any():
            raise ValueError(f"NaN among the similarities of {c.what}: the weights are broken")
        return Keep(walk(pairs, count(self.keep, c.total), self.step, self.i_index))
