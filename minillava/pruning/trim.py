"""TRIM: keep the patches that CLIP finds LEAST like the question, and the mean of the others.

Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal
LLMs", COLING 2025, arXiv 2409.10994. Released code (FreedomIntelligence/TRIM f5a232d):
clip_encoder.py, token_reduction. Patches of LLaVA's feature layer go through CLIP's last norm and
its image projection; the dot product with the text tower's vector of the question, neither of unit
length, is negated before a softmax ranks it. (Descriptions say "most similar"; in CLIP the patches
of what is spoken of come out least similar, and the code keeps those.) int(N * keep) stay in
reading order, followed by one mean of all that were dropped, before the projector. Without keep=
the number is that of outliers: scores above the third quartile by 1.5 interquartile ranges.

Deviations: the question is the focus, or the text behind the image without the template's role;
open_clip's tokenizer also repairs broken Unicode and HTML entities. We rank before the softmax, so
that it makes no ties. Nothing dropped: no mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Keep, Method, Stage, check_amount, top
from .clip_text import OPENAI, load_clip, question
from .shared import RELEASED_TOO


def outliers(likeness: Tensor) -> int:
    """How many of (n,) have a share of the softmax of their negative beyond Tukey's upper fence."""
    share = (-likeness).softmax(0)
    low, high = share.quantile(0.25), share.quantile(0.75)
    n = len(share)
    return int(n * (int((share > high + 1.5 * (high - low)).sum()) / n))


@dataclass(frozen=True)
class TRIM(Method):
    keep: float | None = field(
        default=None, metadata={"help": "number or share kept; without it the outliers"}
    )
    clip: str = field(default=OPENAI, metadata={"help": "the CLIP with the text tower"})

    name: ClassVar[str] = "trim"
    paper: ClassVar[str] = "TRIM, COLING 2025, arXiv 2409.10994"
    source: ClassVar[str] = "FreedomIntelligence/TRIM f5a232d, clip_encoder.py"
    acts: ClassVar[str] = "before the projector"
    checked: ClassVar[str] = RELEASED_TOO
    identity: ClassVar[str | None] = "keep=1.0"
    drops_only: ClassVar[bool] = False
    numbering: ClassVar[str] = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_amount(self.name, self.keep)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("vision", 0),)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if self.keep is None or self.amount(n_tokens) < n_tokens:
            load_clip(self.clip, torch.device("cpu"))

    def amount(self, n_tokens: int) -> int:
        assert self.keep is not None
        return self.keep if isinstance(self.keep, int) else int(n_tokens * self.keep)

    def most(self, n_tokens: int) -> int:
        if self.keep is None:
            return n_tokens
        return min(n_tokens, self.amount(n_tokens) + 1)

    def choose(self, c: Context) -> Keep:
        n = len(c.patches)
        if self.keep is not None and self.amount(c.total) >= n:
            return Keep(torch.arange(n, device=c.patches.device))
        x = c.features()  # (n, C)
        clip = load_clip(self.clip, x.device)
        likeness = clip.patches(x) @ clip.truncated(question(c.focus_text()))[0]  # (n,)
        k = outliers(likeness) if self.keep is None else self.amount(c.total)
        order = top(-likeness, n, c.what)
        return Keep(order[:k], extra=x[order[k:]].mean(0, keepdim=True))
