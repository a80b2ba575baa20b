"""Plain downsampling of the picture, the baseline and the filter of VTC-Bench (arXiv 2510.07143).

`downsample:keep=T` is a plan of eval.run only: nothing is pruned, but the picture is shrunk before
preprocessing, so that the square which the tower sees has T patches' worth of pixels: for T = 64,
112 pixels along a side. Preprocessing enlarges it again to the tower's size, so that the detail is
that of T tokens, while the number of tokens, and the cost, are the unpruned model's.
"""

from __future__ import annotations

import re

from PIL import Image

from minillava.pruning.base import Plan

from .plans import TypedPlan

NAME = "downsample"
_PLAN = re.compile(rf"{NAME}:keep=([1-9][0-9]*)")


def read_downsampling(text: str) -> TypedPlan | None:
    """The plan of `downsample:keep=T`; None for the plan of another method.

    Raises ValueError for a downsampling with other options.
    """
    if text.partition(":")[0] != NAME:
        return None
    if budget_of(text) is None:
        raise ValueError(
            f"{text}: {NAME} has one option, the number of tokens, for example {NAME}:keep=64"
        )
    return TypedPlan(text, Plan())


def budget_of(plan: str) -> int | None:
    """T of `downsample:keep=T`; None for other plans."""
    found = _PLAN.fullmatch(plan)
    return int(found[1]) if found else None


def shrink(image: Image.Image, side: int, aspect: str) -> Image.Image:
    """The picture with at most side x side pixels in the square that the tower sees of it.

    That is the square over its longer side (aspect "pad") or its shorter side ("crop"). A picture
    that is smaller already is returned as it is.
    """
    now = max(image.size) if aspect == "pad" else min(image.size)
    if now <= side:
        return image
    width, height = (max(1, round(n * side / now)) for n in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
