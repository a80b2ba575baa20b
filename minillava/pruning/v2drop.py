"""V2Drop: drop the image tokens that change least from one decoder layer to the next.

CVPR 2026, arXiv 2509.01552. Released code: xuyang-liu16/V2Drop 219e03e, llava/model/language_model/
V2Drop.py. At the input of the layers 3, 17 and 22 a token's score is the L2 distance between the
row that enters this layer and the same row as it entered the layer before. max(1, int(n * ratio))
of the n image tokens that are LEFT stay, those with the largest scores; the last ratio of 0 leaves
one. Order and positions stay, and the positions of new tokens follow the unpruned prompt. No
attention is read. average= sets all ratios but the last to one number, and the last to 0
(a single one is not the last).

Deviations: any number of images and samples, anywhere in the prompt. The released code takes rows
35 to 610 of any prompt of more than 576 rows for the image, uses the first sample's choice for all,
and does not run with the transformers version that it pins (its rotary tables are too short).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .base import Context, Keep, option, top
from .order import need_layer_before
from .shared import AtLayers


@dataclass(frozen=True)
class V2Drop(AtLayers):
    layers: tuple[int, ...] = option(
        (3, 17, 22), low=1, help="layers whose input is pruned; each needs one before it"
    )
    ratios: tuple[float, ...] = option(
        (0.5, 0.5, 0.0), low=0, high=1, help="share of the tokens left that stays at each"
    )

    name, identity, strength = "v2drop", "layers=1/2,ratios=1.0/1.0", "ratios"
    check_order = need_layer_before

    def left(self, n_tokens: int) -> tuple[int, ...]:
        left = []
        for ratio in self.ratios:
            n_tokens = max(1, int(n_tokens * ratio))
            left.append(n_tokens)
        return tuple(left)

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[V2Drop]:
        steps, last = 4 * n_tokens, (0.0,) * (len(self.layers) > 1)
        for q in ((i + 0.5) / steps for i in range(steps)):
            yield replace(self, ratios=(q,) * (len(self.layers) - len(last)) + last)

    def choose(self, c: Context) -> Keep:
        change = (c.features() - c.before()).float().norm(dim=1)  # (n,)
        keep = max(1, int(len(change) * self.ratios[c.stage_index]))
        return Keep(top(change, keep, c.where), scores=change)
