"""IVC-Prune: keep what the question's values resemble, and the positions that RoPE singles out.

Sun et al., ICLR 2026, arXiv 2602.03060. Released code: FireRedTeam/IVC-Prune 03afd9c, transformers/
models/llama/modeling_llama.py, IVCP_forward_flashattention. Two rows are compared by softmax(v_i .
v_j / sqrt(Dh)) over all rows j, later ones too, where v are their values in the layer before, mean
over heads. At the input of layer 16 these image tokens stay:
1. the `seeds` that the question's rows resemble most (mean over these rows),
2. the `foreground` that the question's rows and the seeds resemble most (mean over all of them),
3. the `axes` positions with the largest mean cosine of their RoPE angles, and as many with the
   largest mean sine: there the rotation is closest to none and to a quarter turn.
How many these are depends on how far they overlap. The question is the text after the image
without its first two rows, which are the line break. Positions stay, and the positions of new
tokens follow the unpruned prompt. After the prefill the dropped rows also leave the caches of all
earlier layers but the first, whose length the released code counts by. With cache=drop nothing is
cut, with cache=all every layer.

Deviations: any number of images; rows of other images do not count. The mean cosine and sine are
float32. The released evaluation of LLaVA-1.5 names row 5 as the image's first, but puts a system
prompt before it: its window is about 30 rows too early, so that text can be dropped, and the
image's last rows stay and count as the question. Here it is the image; `released=1` is that window.
The paper says that the dropped tokens leave all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import attention_received
from ..rows import TEXT, take_rows
from .base import Context, Keep, Method, Stages, amount, count, option, top
from .margins import lead, least
from .order import need_layer_before

LINE_BREAK = 2  # rows of text between the image and the question
RELEASED_START = 5  # that of the image in the prompt template of llava-hf


@dataclass(frozen=True)
class IVCPrune(Method):
    layer: int = option(16, low=1, help="layer whose input is pruned; it needs one before it")
    foreground: float = amount(0.2, help="number or share kept by likeness to question and seeds")
    seeds: float = amount(0.01, help="number or share that is most like the question")
    axes: float = amount(0.05, help="number or share kept by mean cosine, and by mean sine")
    cache: str | None = option(
        None, choices=("drop", "all"), help="unset: the released cut, from layer 1 on"
    )
    released: bool = option(False, help="the released evaluation's window, from row 5 on")

    name, identity, adaptive = "ivcprune", "layer=2,foreground=1.0", True
    strength = "foreground"
    check_order = need_layer_before

    def shift(self, start: int) -> int:
        return RELEASED_START - start if self.released else 0

    def stages(self) -> Stages:
        return (("decoder", self.layer),)

    @property
    def cut_from(self) -> int | None:
        return 1 if self.cache is None and self.mode == "drop" else super().cut_from

    def counts(self, n_tokens: int) -> list[int]:
        """Tokens that the question, question and seeds, the cosines and the sines choose."""
        amounts = (self.seeds, self.foreground, self.axes, self.axes)
        return [count(amount, n_tokens) for amount in amounts]

    def left(self, n_tokens: int) -> tuple[int, ...]:
        # the released window can end before the image, whose last rows then stay
        return (n_tokens if self.released else min(n_tokens, sum(self.counts(n_tokens))),)

    def values(self, c: Context) -> tuple[Tensor, Tensor]:
        """Values in the layer before, (Hkv, Dh) each, of the n candidates followed by the t text
        rows, and of the q rows of the question."""
        text, question = c.rows.of_image(TEXT), c.text_rows
        if self.released:  # whatever is not in the window counts as text
            rows = torch.arange(len(c.rows.position))
            text = rows[~torch.isin(rows, c.candidates)]
            question = text[text > c.candidates[-1]]
        question = question[LINE_BREAK:] if len(question) > LINE_BREAK else question
        block = c.model.block(self.layer - 1)
        x = block.norm1(c.before(torch.cat((c.candidates, text))))
        values = c.model.llama.whole_heads(block.attn.heads(block.attn.v_proj, x))
        return values, take_rows(values, len(c.candidates) + torch.searchsorted(text, question))

    def choose(self, c: Context) -> Keep:
        counts, n = self.counts(c.n_tokens), len(c.candidates)
        values, question = self.values(c)  # (n + t, Hkv, Dh), (q, Hkv, Dh)
        asked = attention_received(question, values).mean(0)[:n]  # (n,)
        # not top(), for which a GPU would wait: NaN is refused with that of the next score
        seeds = asked.sort(descending=True, stable=True).indices[: counts[0]]
        both = torch.cat((question, values[seeds]))
        nearest = attention_received(both, values).mean(0)[:n]
        position = c.rows.position[c.candidates]
        halves = [x[:, 0].chunk(2, -1)[1] for x in c.model.llama.rope(position)]  # (n, Dh / 2)
        angles = [half.float().mean(1) for half in halves]
        scores = torch.stack((asked, nearest, *angles)).cpu()  # (4, n)
        stays = torch.zeros(n, dtype=torch.bool)
        for score, k in zip(scores, counts, strict=True):
            stays[top(score, k, c.where)] = True
        closest = least(*(lead(*pair) for pair in zip(scores, counts, strict=True)))
        return Keep(stays.nonzero()[:, 0], scores=scores[1], closest=closest)
