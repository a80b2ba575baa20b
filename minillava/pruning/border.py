"""Border: a baseline that drops the patches that show nothing of the image.

It acts after the projector, before layer 0, and has no paper. Aspect "pad" centres an image on a
square, so that a photo of 4 to 3 leaves a quarter of the rows of patches to the border. Those that
lie in it wholly are dropped; the others stay, and keep their positions. How many these are depends
on the image. Where the size of the image is not known (Batch.sizes), or with aspect "crop", all
patches stay. MMTok takes such patches last.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, Keep, Method, Stages
from .shared import border_patches


@dataclass(frozen=True)
class Border(Method):
    name, adaptive = "border", True

    def stages(self) -> Stages:
        return (("embed", 0),)

    def choose(self, c: Context) -> Keep:
        shown = ~border_patches(c)
        return Keep(shown.nonzero()[:, 0], scores=shown.float())
