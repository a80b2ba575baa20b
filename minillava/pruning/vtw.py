"""VTW: remove all image tokens at one layer.

Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal", AAAI 2025,
arXiv 2405.05803. Released code (lzhxmu/VTW 34a4199): VTW.py. Layers 0..K-1 see everything; only the
text enters layer K. Text tokens keep their positions, which is the released `pe_type="keep"`; the
other `pe_type` is `positions=compact`.

Deviations: none in what is computed. The released code searches for K: it compares the first logits
of the answer with and without withdrawal, over some samples, by their divergence. That is a
calibration and not part of the method: `python -m eval.fit vtw`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .base import Context, Keep, Method, Stages, option


@dataclass(frozen=True)
class VTW(Method):
    layer: int = option(15, help="first layer without image tokens")

    name, strength = "vtw", "layer"

    def stages(self) -> Stages:
        return (("decoder", self.layer),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (0,)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[VTW]:
        return (replace(self, layer=layer) for layer in range(n_layers))

    def choose(self, c: Context) -> Keep:
        return Keep(c.candidates[:0])
