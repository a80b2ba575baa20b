"""CDPruner: keep image tokens that differ from each other, and matter to the question.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", NeurIPS 2025, arXiv 2506.10967. Released code (Theia-4869/CDPruner 9541616): llava_arch.py,
encode_images, and clip_encoder.py. After the projector, before layer 0, a determinantal point
process has the kernel K_ij = r_i cos_ij r_j, where cos compares projected features, and r is a
patch's relevance: the negated cosine of CLIP's patch and text vectors, mean over pieces of the
text, scaled to 0..1. The set grows greedily by the token with the largest d^2, which is what
remains of its diagonal entry of K once the chosen tokens have explained what they can.

Deviations: relevance is scaled to 0..1 within each image (released: within the batch). Everything
is float32 (released: rows are normalised in float16). The question is the focus, or the text after
the image without the template's role and without the released instruction to answer in a word.
Where rounding leaves a d^2 of 0 or less, whose root the released code takes, the token explains
nothing. Where all patches are equally relevant, relevance is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..llava import LLaVA
from ..rows import take_rows
from .base import Context, Keep, option
from .clip_text import OPENAI, check_clip, load_clip, question
from .margins import Picks
from .order import need_patches
from .shared import BeforeDecoder

BRIEF = "Answer the question using a single word or phrase."


def relevance(patches: Tensor, text: Tensor) -> Tensor:
    """Relevance (n,) of patches (n, E) to pieces of the text (m, E), 0..1 (plus 1e-6 / span)."""
    r = -(F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).T).mean(1)
    span = r.max() - r.min()
    return torch.where(span == 0, 1.0, (r - r.min() + 1e-6) / span)


def choose_greedily(kernel: Tensor, k: int) -> Picks:
    """Choose k rows of a kernel (n, n) by steps of Cholesky's method."""
    n = len(kernel)
    left = kernel.diagonal().clone()  # d^2
    columns = kernel.new_zeros((k, n))
    picks = Picks(n, k, kernel.device)
    for step in range(k):
        j = picks.take(step, left)  # (1,)
        column = kernel[j][0] - columns[:step, j][:, 0] @ columns[:step]
        column = torch.where(left[j] > 0, column / left[j].sqrt(), 0.0)
        columns[step] = column
        left = (left - column.square()).clamp(min=0.0)
        left[picks.order[: step + 1]] = -torch.inf
    return picks


@dataclass(frozen=True)
class CDPruner(BeforeDecoder):
    clip: str = option(OPENAI, help="the CLIP with the text tower")

    name = "cdpruner"
    stage = "embed"
    check_order = need_patches

    def check_model(self, model: LLaVA) -> None:
        n_tokens = model.config.vision.num_patches
        if self.scope == "all" or self.left(n_tokens)[0] < n_tokens:
            check_clip(model, self.name, self.clip)

    def choose(self, c: Context) -> Keep:
        n, (keep,) = len(c.candidates), self.left(c.n_tokens)
        if keep >= n:
            return Keep(torch.arange(n))
        x = F.normalize(c.features().float(), dim=-1)  # (n, D)
        patches = take_rows(c.vision_state()[:, 1:].flatten(0, 1), c.whole_patches())  # (n, C)
        clip = load_clip(self.clip, x.device)
        text = clip.segments(question(c.focus_text(), BRIEF))  # (m, E)
        r = relevance(clip.patches(patches), text)  # (n,)
        kernel = r[:, None] * (x @ x.T) * r
        if kernel.isnan().any():
            raise ValueError(f"NaN in the kernel of {c.where}: the weights or the input are broken")
        return choose_greedily(kernel, keep).keep(scale=kernel.diagonal().amax())
