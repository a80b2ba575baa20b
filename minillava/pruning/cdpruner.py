"""CDPruner: keep image tokens that differ from each other, given the question.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", NeurIPS 2025, arXiv 2506.10967. Released code (Theia-4869/CDPruner 9541616): llava_arch.py,
encode_images, and clip_encoder.py. A determinantal point process with the kernel
K_ij = r_i cos_ij r_j, where cos compares projected rows and r is a patch's relevance: the negated
cosine of CLIP's patch and text vectors, mean over pieces of the text, brought to 0..1. The set is
grown greedily, each time by the row with the largest d^2, what is left of its own kernel value
once the chosen ones explain what they can.

Deviations: relevance is brought to 0..1 within each image (released: within the batch); everything
is float32 (released: rows are normalised in float16). The question is the focus, or the text behind
the image without the template's role, and without the released instruction to answer in a word.
Where rounding leaves a d^2 of 0 or less, which the released code takes the root of, the row
explains nothing; where all patches are equally relevant they count 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Context, Keep, Stage
from .clip_text import OPENAI, load_clip, question
from .shared import RELEASED_TOO, Budget, patches

BRIEF = "Answer the question using a single word or phrase."


def relevance(seen: Tensor, text: Tensor) -> Tensor:
    """How much the text's pieces (m, E) are about the patches (n, E): (n,), 0 (and 1e-6) to 1."""
    r = -(F.normalize(seen, dim=-1) @ F.normalize(text, dim=-1).T).mean(1)
    span = r.max() - r.min()
    return (r - r.min() + 1e-6) / span if span > 0 else torch.ones_like(r)


def greedy(kernel: Tensor, k: int) -> Tensor:
    """Rows (k,) in the order in which they are chosen from a kernel (n, n), by Cholesky's steps."""
    n = len(kernel)
    left = kernel.diagonal().clone()  # d^2
    columns = kernel.new_zeros((k, n))
    chosen = torch.empty(k, dtype=torch.int64, device=kernel.device)
    for step in range(k):
        j = left.argmax()
        chosen[step] = j
        column = kernel[j] - columns[:step, j] @ columns[:step]
        column = torch.where(left[j] > 0, column / left[j].sqrt(), 0.0)
        columns[step] = column
        left = (left - column.square()).clamp(min=0.0)
        left[chosen[: step + 1]] = -torch.inf
    return chosen


@dataclass(frozen=True)
class CDPruner(Budget):
    clip: str = field(default=OPENAI, metadata={"help": "the CLIP with the text tower"})

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "CDPruner, NeurIPS 2025, arXiv 2506.10967"
    source: ClassVar[str] = "Theia-4869/CDPruner 9541616, llava_arch.py, clip_encoder.py"
    acts: ClassVar[str] = "after the projector, before layer 0"
    checked: ClassVar[str] = RELEASED_TOO
    stage: ClassVar[Stage] = "embed"

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if self.amount(n_tokens) < n_tokens:
            load_clip(self.clip, torch.device("cpu"))

    def choose(self, c: Context) -> Keep:
        n, k = len(c.patches), self.amount(c.total)
        if k >= n:
            return Keep(torch.arange(n, device=c.patches.device))
        here, x = patches(c), F.normalize(c.features().float(), dim=-1)  # (n, D)
        clip = load_clip(self.clip, x.device)
        seen = c.vision()
        read = seen.hidden[seen.feature_layer][:, 1:].flatten(0, 1)[here]  # (n, C)
        r = relevance(clip.patches(read), clip.segments(question(c.focus_text(), BRIEF)))
        kernel = r[:, None] * (x @ x.T) * r
        if kernel.isnan().any():
            raise ValueError(f"NaN in the kernel of {c.what}: the weights or the input are broken")
        return Keep(greedy(kernel, k))
