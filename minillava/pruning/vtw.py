"""VTW: withdraw all image tokens from a layer on.

Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal", AAAI 2025,
arXiv 2405.05803. Released code (lzhxmu/VTW 34a4199): VTW.py. What enters layer K is the text alone;
positions stay as they were (its `pe_type="keep"`; the other one is `positions=compact`).

Deviations: none in what is computed. The released search for K (the divergence between the answer's
first logits with and without withdrawal, over some samples) is a calibration:
`python -m eval.fit vtw`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from .base import Budgeted, Context, Keep, Stage


@dataclass(frozen=True)
class VTW(Budgeted):
    layer: int = field(default=15, metadata={"help": "the first layer without image tokens"})

    name: ClassVar[str] = "vtw"
    paper: ClassVar[str] = "VTW, AAAI 2025, arXiv 2405.05803"
    source: ClassVar[str] = "lzhxmu/VTW 34a4199, VTW.py"
    acts: ClassVar[str] = "input of decoder layer K"
    checked: ClassVar[str] = (
        "the released function, transcribed, on 210 random draws; a reference in the tests"
    )
    either: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("layer", "average")),)

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return (("decoder", self.layer),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (0,)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[tuple[str, VTW]]:
        for layer in range(n_layers):
            yield f"layer={layer}", replace(self, average=None, layer=layer)

    def choose(self, c: Context) -> Keep:
        return Keep(c.patches.new_empty(0))
