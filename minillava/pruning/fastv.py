"""FastV: keep the image tokens that the newest token attends to.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. Released
code (pkunlp-icler/FastV): modeling_llama.py (mask and in-place form) and fastv_forward of the
llava-hf form. Layers 0..K-1 see everything. The rows that enter layer K are ranked by the attention
that layer K-1 computed: from the newest row to each image token, mean over heads. The paper
describes the mean over all rows; the code, as here, reads the last one. K = 0: a random choice.

Deviations: every sample and image is ranked by its own attention (the released code ranks a whole
batch by its first sample), and padding stays masked. `released=1` moves the window by one row, as
the released scripts do (system length 36 for an image that starts at 35): the image's first token
always stays, and the first text token after the image competes with the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep, Method, Stages, amount, count, option, top


@dataclass(frozen=True)
class FastV(Method):
    layer: int = option(2, low=0, alias="k", help="layer whose input is pruned; 0: at random")
    r: float = option(0.5, low=0, high=1, help="share dropped, as in the paper")
    keep: float | None = amount(None, instead_of=("r",))
    released: bool = option(False, help="the released window, one row late")

    name, identity, newest_row = "fastv", "keep=1.0", True

    def stages(self) -> Stages:
        return (("decoder", self.layer),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        keep = max(1, round(n_tokens * (1 - self.r))) if self.keep is None else self.keep
        return (count(keep, n_tokens),)

    def shift(self, start: int) -> int:
        return int(self.released)

    def choose(self, c: Context) -> Keep:
        (k,) = self.left(c.n_tokens)
        if self.layer == 0:
            return Keep(c.shuffled()[:k])
        score = c.attention(c.newest).mean(0)  # (H, n) -> (n,)
        return Keep(top(score, k, c.where), scores=score)
