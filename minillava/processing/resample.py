"""Resize part of an image, bit for bit as Pillow would resize all of it.

Pillow's resize of one axis makes each output pixel from a few neighbouring input pixels: their
weights come from a filter, are rounded to 22 binary places, and the sum is rounded to a byte. From
1 x 30000 pixels enlarged to 336 x 10,080,000 only the middle 336 x 336 is wanted. Here only the
wanted output pixels are computed, with the same weights. All products and sums are whole numbers
below 2^53, so float64 holds them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

_PLACES = 22  # binary places of a weight
_HAMMING = torch.tensor([0.54, 0.46]).tolist()  # Pillow has these as float32


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _triangle(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _hamming(x: float) -> float:
    x = abs(x)
    if x >= 1:
        return 0.0
    return _sinc(x) * (_HAMMING[0] + _HAMMING[1] * math.cos(x * math.pi))


def _cubic(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


# resample number -> filter and its radius in input pixels
_FILTERS: dict[int, tuple[Callable[[float], float], float]] = {
    Image.Resampling.BOX: (_box, 0.5),
    Image.Resampling.BILINEAR: (_triangle, 1.0),
    Image.Resampling.HAMMING: (_hamming, 1.0),
    Image.Resampling.BICUBIC: (_cubic, 2.0),
    Image.Resampling.LANCZOS: (_lanczos, 3.0),
}


@dataclass(frozen=True)
class Window:
    """An axis of a frame resized from `before` to `after` pixels, of which `count` from `first` on
    are wanted. An image covers `covered` (a, b) of the frame's pixels; the others are filled."""

    before: int
    after: int
    first: int
    count: int
    covered: tuple[int, int]
    resample: int

    def touched(self) -> tuple[int, int]:
        """The part of `covered` that the wanted pixels are made from."""
        low, high = self._neighbours(0)[0], self._neighbours(self.count - 1)[1]
        a, b = self.covered
        return min(max(a, low), b), max(min(b, high), a)

    def cost(self) -> int:
        """Multiplications for each row and colour."""
        a, b = self.touched()
        ranges = [self._neighbours(i) for i in range(self.count)]
        return sum(low < b and high > a for low, high in ranges) * (b - a)

    def weights(self) -> tuple[Tensor, Tensor]:
        """For each wanted pixel the weights of the pixels `touched`, (count, n), and the sum of the
        other weights, (count,); both float64, times 2^22."""
        a, b = self.touched()
        weigh, sharpness = _FILTERS[self.resample][0], 1.0 / max(self._scale, 1.0)
        inside = torch.zeros(self.count, b - a, dtype=torch.float64)
        outside = torch.zeros(self.count, dtype=torch.float64)
        for i in range(self.count):
            low, high = self._neighbours(i)
            found = [weigh((x - self._centre(i) + 0.5) * sharpness) for x in range(low, high)]
            total = 0.0
            for weight in found:  # sum() compensates rounding errors since Python 3.12
                total += weight
            shares = [weight / total if total else weight for weight in found]
            whole = [int(math.copysign(0.5, s) + s * (1 << _PLACES)) for s in shares]
            left, right = min(max(a, low), high), max(min(b, high), low)
            if left < right:
                part = whole[left - low : right - low]
                inside[i, left - a : right - a] = torch.tensor(part, dtype=torch.float64)
            outside[i] = sum(whole) - int(inside[i].sum())
        return inside, outside

    @property
    def _scale(self) -> float:
        return self.before / self.after

    def _centre(self, i: int) -> float:
        return (self.first + i + 0.5) * self._scale

    def _neighbours(self, i: int) -> tuple[int, int]:
        """The range of the frame's pixels that the i-th wanted pixel is made from."""
        radius = _FILTERS[self.resample][1] * max(self._scale, 1.0)
        low, high = int(self._centre(i) - radius + 0.5), int(self._centre(i) + radius + 0.5)
        return max(low, 0), min(high, self.before)


def resize_rows(levels: Tensor, weights: tuple[Tensor, Tensor], fill: Tensor) -> Tensor:
    """The wanted pixels of each row, (rows, count, 3) uint8.

    levels (rows, n, 3) uint8: the n pixels that the window touches. weights: the window's. fill
    (3,): the colour around the image.
    """
    inside, outside = weights  # (count, n), (count,)
    filled = outside[:, None] * fill.double()  # (count, 3)
    total = filled.repeat(len(levels), 1, 1)  # (rows, count, 3)
    hit = inside.any(1)  # (count,)
    total[:, hit] += torch.einsum("cn,rnd->rcd", inside[hit], levels.double())
    return ((total + (1 << _PLACES - 1)) / (1 << _PLACES)).floor().clamp(0, 255).byte()
