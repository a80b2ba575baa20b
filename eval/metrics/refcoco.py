"""RefCOCO, RefCOCO+ and RefCOCOg: the box in an answer, and its IoU with the right box.

LLaVA's repository has no script for them. Sources: for llava, that of ConvLLaVA, which reads boxes
in LLaVA-1.5's padded square (github.com/alibaba/conv-llava at ba805b0,
llava/eval/evaluate_grounding.py); for lmms, lmms-eval 0.7.3's tasks/refcoco/utils_rec.py. An answer
is right if its IoU is at least 0.5. Without a box the answer is the box 0, 0, 0, 0. Boxes are not
clipped to the image, and one with reversed corners overlaps nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]  # left, top, right, bottom

ENOUGH = 0.5
_NOTHING: Box = (0.0, 0.0, 0.0, 0.0)
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_LIST = re.compile(r"\[\s*" + r",\s*".join([_NUMBER] * 4) + r"\s*\]")


def llava_box(text: str) -> Box | None:
    """The first list of at least four entries in a line, or None if its first four are no numbers.

    The list begins at the line's first bracket and ends at the first "]" after its third comma;
    what stands between must be whatever Python reads as a float, also ".5" and "1e-1". So
    "[1] is at [0, 0, 1, 1]" has no box.
    """
    for line in text.split("\n"):
        parts = line.partition("[")[2].lstrip("[").split(",", 3)
        if len(parts) == 4 and "]" in parts[3]:
            left, top, right, rest = parts
            try:
                return float(left), float(top), float(right), float(rest.partition("]")[0])
            except ValueError:
                return None
    return None


def lmms_box(text: str) -> Box | None:
    """The first four plain decimal numbers in brackets, anywhere, or None."""
    found = _LIST.search(text)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


def llava_iou(text: str, box: Sequence[float], size: tuple[int, int]) -> float:
    """The IoU in pixels, in float32, of an answer whose coordinates are those of the padded square.

    box: the right one, in pixels. size: width and height of the image. Coordinates with a sum of at
    least 4 are taken as thousandths. NaN if the answer has NaN or infinity.
    """
    width, height = size
    with np.errstate(all="ignore"):
        said = np.array(llava_box(text) or _NOTHING).astype(np.float32)  # (4,)
        if said.sum() >= 4:
            said = said / np.float32(1000)
        said = said * np.float32(max(size))
        x, y = max(height - width, 0) // 2, max(width - height, 0) // 2  # of the padding
        said = (said.astype(np.float64) - [x, y, x, y]).astype(np.float32)
        return _iou(said, np.array(box).astype(np.float32))


def lmms_iou(text: str, box: Sequence[float], size: tuple[int, int]) -> float:
    """The IoU of an answer whose coordinates are those of the image as it is, 0..1.

    box: the right one, in pixels. size: width and height of the image. NaN if both areas add up to
    0, for which the original divides by zero.
    """
    width, height = size
    with np.errstate(all="ignore"):
        gold = np.array(box, dtype=np.float64) / [width, height, width, height]
        return _iou(gold, np.array(lmms_box(text) or _NOTHING))


def _iou(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The IoU of two boxes (4,) of one type, which is also that of the arithmetic."""
    overlap = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap
    return float(overlap / union)
