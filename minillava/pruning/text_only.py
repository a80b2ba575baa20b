"""Text-only: keep no image token, the baseline that shows what the question alone gives.

It acts after the projector, before layer 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep, Method, Stages


@dataclass(frozen=True)
class TextOnly(Method):
    name, numbering = "text-only", "compact"

    def stages(self) -> Stages:
        return (("embed", 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (0,)

    def choose(self, c: Context) -> Keep:
        return Keep(c.candidates[:0])
