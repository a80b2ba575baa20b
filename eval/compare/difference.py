"""Draw which patches two plans keep: both, only the one, only the other, neither.

The four differ without colour, too: an outline around those of both, strokes in two directions, and
a pale cover.
"""

from __future__ import annotations

from collections.abc import Sequence

from minillava.app.canvas import Box, Color, Line, Shape
from minillava.app.frame import INK, PALE, Frame, hatch
from minillava.app.panels import (
    EDGE,
    FAINT,
    WASH,
    WHITE,
    Panel,
    lines_of_grid,
    make_panel,
    outline,
    tag,
)

from .sets import Difference

# Okabe and Ito 2008
ONLY_A: Color = (0, 114, 178)
ONLY_B: Color = (213, 94, 0)
VEIL, TINT = 0.65, 0.55  # how much of a patch that one plan keeps is covered, by white and colour


def draw_difference(
    difference: Difference, frame: Frame, image: int, names: tuple[str, str]
) -> Panel:
    """The patches of one image, by which of two plans with these short names keep them."""
    a, b = names
    both, only_a, only_b = (
        sets[image] for sets in (difference.both, difference.only_a, difference.only_b)
    )
    neither = set(range(frame.grid**2)) - both - only_a - only_b
    shapes: list[Shape] = [
        frame.box(p, fill=PALE, alpha=WASH, tags=tag("neither", p)) for p in sorted(neither)
    ]
    for patches, kind, color in ((only_a, "only-a", ONLY_A), (only_b, "only-b", ONLY_B)):
        for p in sorted(patches):
            shapes.append(frame.box(p, fill=WHITE, alpha=VEIL))
            shapes.append(frame.box(p, fill=color, alpha=TINT, tags=tag(kind, p)))
            shapes += _strokes(*frame.place(p), frame.cell, frame.cell, mirrored=kind == "only-b")
    shapes += lines_of_grid(frame) + outline(frame, both)
    shapes += [frame.box(p, tags=tag("both", p)) for p in sorted(both)]
    entries = [
        (_swatch(None), f"{a} and {b}: {len(both)}"),
        (_swatch(ONLY_A), f"only {a}: {len(only_a)}"),
        (_swatch(ONLY_B), f"only {b}: {len(only_b)}"),
        ([Box(0, 0, 16, 14, PALE, edge=FAINT)], f"neither: {len(neither)}"),
    ]
    title = f"{a} and {b}"
    if len(difference.both) > 1:
        title += f", image {image + 1}"
    return make_panel(title, frame, [*frame.shapes, *shapes], legend=entries)


def _strokes(x: float, y: float, w: float, h: float, mirrored: bool) -> list[Line]:
    """Strokes that rise to the right, or mirrored ones that fall."""
    lines = hatch(x, y, w, h, 6, INK, 0.55)
    if not mirrored:
        return lines
    turn = 2 * x + w
    return [Line(turn - s.x1, s.y1, turn - s.x2, s.y2, s.color, s.width, s.alpha) for s in lines]


def _swatch(color: Color | None) -> Sequence[Shape]:
    if color is None:
        return [Box(0, 0, 16, 14, edge=INK), Box(1, 1, 14, 12, edge=EDGE, width=2)]
    box = Box(0, 0, 16, 14, color, TINT, INK)
    return [box, *_strokes(0, 0, 16, 14, mirrored=color == ONLY_B)]
