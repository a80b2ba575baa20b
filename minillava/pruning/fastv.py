"""FastV: keep the image tokens that the newest token attends to.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. Released
code (pkunlp-icler/FastV): modeling_llama.py (mask and in-place form) and fastv_forward of the
llava-hf form. Layers 0..K-1 see everything; what enters layer K is chosen by the attention of layer
K-1.

Deviations: every sample and image is ranked by its own attention (the released code ranks a whole
batch by its first sample); padding keeps being masked. The paper describes the mean attention over
all rows, the code reads the last row only: so do we. `released=1` moves the window one row on, as
the released scripts do (system length 36 for an image that starts at 35): the image's first token
always stays and the first text row behind the image competes with the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import Budgeted, Context, Keep, Stage, check_amount, check_keep, count, top


def fastv_score(attention: Tensor) -> Tensor:
    """Attention (H, S) of the newest row -> one score per row (S,): the mean over heads."""
    return attention.mean(0)


@dataclass(frozen=True)
class FastV(Budgeted):
    layer: int = field(
        default=2, metadata={"help": "the layer whose input is pruned; 0: at random"}
    )
    r: float = field(default=0.5, metadata={"help": "share dropped, as in the paper"})
    keep: float | None = field(
        default=None, metadata={"help": "number or share kept, instead of r"}
    )
    released: bool = field(default=False, metadata={"help": "the released window, one row late"})
    window: tuple[int, int] | None = field(default=None, metadata={"option": False})

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, ECCV 2024, arXiv 2403.06764"
    source: ClassVar[str] = "pkunlp-icler/FastV, modeling_llama.py"
    acts: ClassVar[str] = "input of decoder layer K"
    checked: ClassVar[str] = "outputs of the released code in six modes (tests/goldens/fastv)"
    identity: ClassVar[str | None] = "keep=1.0"
    newest_row: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, str]] = {"k": "layer"}
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("r", "keep", "average")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.r <= 1:
            raise ValueError(f"fastv: r={self.r} is the share dropped; it must be from 0 to 1")
        if self.keep is not None:
            check_amount("fastv", self.keep)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("decoder", self.layer),)

    def amount(self, total: int) -> float:
        if self.keep is not None:
            return self.keep
        return max(1, round(total * (1 - self.r)))

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count(self.amount(n_tokens), n_tokens),)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[tuple[str, FastV]]:
        for k in range(1, n_tokens + 1):
            yield f"keep={k}", replace(self, average=None, keep=k)

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        check_keep("fastv", self.amount(n_tokens), n_tokens)
        if self.released and len(starts) > 1:
            raise ValueError(
                f"fastv: released=1 knows one image, the prompt has {len(starts)}; leave it out"
            )
        if self.window is not None and [self.window] != [(s, n_tokens) for s in starts]:
            found = ", ".join(f"{s}..{s + n_tokens - 1}" for s in starts)
            start, length = self.window
            raise ValueError(
                f"fastv_config: image_token_start_index={start}, image_token_length={length} is "
                f"{start}..{start + length - 1}, but the prompt's image tokens are {found}"
            )

    @property
    def shift(self) -> int:
        return int(self.released)

    def choose(self, c: Context) -> Keep:
        assert c.decoder is not None
        n, (k,) = len(c.decoder.rows), self.left(c.total)
        if self.layer == 0:
            return Keep(torch.randperm(n, generator=c.generator)[:k].to(c.decoder.rows.device))
        score = fastv_score(c.decoder.attention(c.decoder.newest))  # (S,)
        return Keep(top(score[c.decoder.rows], k, c.what))
