"""Where a picture lies in a panel: in its own aspect, with the square and the patches on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from PIL import Image

from ..config import VisionConfig
from ..processing.image import ImageConfig, check_aspect
from ..processing.resize import to_rgb
from .canvas import Box, Color, Line, Picture, Shape

PANEL = 336  # pixels of the square's side, at least
CELL = 24  # pixels of a patch's side, at least: it has to hold a number
OUTSIDE = 0.5  # see make_frame
HATCH = 8  # pixels between two strokes
INK: Color = (20, 20, 20)
PALE: Color = (226, 229, 233)


@dataclass(frozen=True)
class Frame:
    """A picture and the grid of patches over it. Coordinates are those of the panel."""

    width: int
    height: int
    x: int  # of the upper left corner of patch 0
    y: int
    cell: int  # side of a patch
    grid: int  # patches in a row
    shapes: list[Shape]  # the picture, with the letterbox hatched or the crop outlined
    grey: list[Shape]  # the same without colours and strokes, to lie under others

    def place(self, patch: int) -> tuple[int, int]:
        """The upper left corner of a patch."""
        return self.x + patch % self.grid * self.cell, self.y + patch // self.grid * self.cell

    def box(self, patch: int, **look: object) -> Box:
        x, y = self.place(patch)
        return Box(x, y, self.cell, self.cell, **look)  # type: ignore[arg-type]


def make_frame(
    image: Image.Image,
    vision: VisionConfig,
    config: ImageConfig,
    aspect: str,
    outside: float = OUTSIDE,
    least: int = CELL,
) -> Frame:
    """Lay out a picture as the processor makes it square, with aspect "crop" or "pad".

    outside: how much of what a crop leaves out is shown on either side, in sides of the square.
    least: pixels of a patch's side, at least. Raises ValueError for another aspect and for a
    picture without pixels.
    """
    check_aspect(aspect)
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} x {image.height} pixels; it is empty")
    cell = max(least, round(PANEL / vision.grid))
    zoom = cell / vision.patch_size  # pixels of the panel to one of the model's input
    square = round(config.crop * zoom)
    scale = config.size / (min if aspect == "crop" else max)(image.size) * zoom
    # on each axis: the square is at 0, the picture around its middle, and the panel shows both
    spans = [_Span.around(square, n * scale, outside) for n in image.size]
    across, down = spans
    x, y = across.square, down.square
    letterbox = Box(x, y, square, square, config.fill)
    picture = _resize(image, scale, across, down, over_white=aspect == "crop")
    grey = replace(picture, image=picture.image.convert("L"))
    over = _outline(across, down, square) if max(x, y) else []
    shapes = [letterbox, *hatch(x, y, square, square), picture, *over]
    greys = [letterbox, grey, *over]
    return Frame(across.length, down.length, x, y, cell, vision.grid, shapes, greys)


@dataclass(frozen=True)
class _Span:
    """One axis of a panel."""

    length: int  # of the panel
    square: int  # where the square begins
    start: int  # of the picture's part that is shown
    stop: int
    first: float  # pixels of the picture, in the panel's size, before that part

    @classmethod
    def around(cls, square: int, picture: float, outside: float) -> _Span:
        """For a picture of this length in the panel's pixels, centred on the square."""
        over = (picture - square) / 2  # beyond the square on either side; negative: a letterbox
        shown = round(min(max(over, 0.0), outside * square))
        start = max(0, round(-over))
        return cls(
            square + 2 * shown, shown, start, square + 2 * shown - start, max(over, 0.0) - shown
        )


def _resize(
    image: Image.Image, scale: float, across: _Span, down: _Span, over_white: bool
) -> Picture:
    """The part of a picture that is shown."""
    sides = []
    for span, n in ((across, image.width), (down, image.height)):
        first = max(0.0, span.first) / scale
        sides.append((first, min(n, first + (span.stop - span.start) / scale)))
    (left, right), (top, bottom) = sides
    whole = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    part = to_rgb(image.crop(whole), over_white)  # the rest of a large picture is not converted
    inside = (left - whole[0], top - whole[1], right - whole[0], bottom - whole[1])
    size = (max(1, across.stop - across.start), max(1, down.stop - down.start))
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return Picture(across.start, down.start, part.resize(size, method, inside))


def _outline(across: _Span, down: _Span, square: int) -> list[Shape]:
    """What a crop leaves out is washed out, and the square has an edge."""
    x, y, right, bottom = across.square, down.square, across.square + square, down.square + square
    outside = (
        (0, 0, x, down.length),
        (right, 0, across.length - right, down.length),
        (x, 0, square, y),
        (x, bottom, square, down.length - bottom),
    )
    washed = [Box(*place, PALE, 0.72) for place in outside if place[2] > 0 and place[3] > 0]
    return [*washed, Box(x - 2, y - 2, square + 4, square + 4, edge=INK, width=2)]


def hatch(
    x: float,
    y: float,
    w: float,
    h: float,
    step: int = HATCH,
    color: Color = INK,
    alpha: float = 0.3,
) -> list[Line]:
    """Strokes from the lower left to the upper right, as far as they are inside of a rectangle."""
    strokes = []
    for total in range(step, int(w + h), step):  # along a stroke, x + y is the same
        x1, x2 = max(0.0, total - h), min(w, total)
        strokes.append(Line(x + x1, y + total - x1, x + x2, y + total - x2, color, 1, alpha))
    return strokes
