"""Arrange what is drawn: blocks beside and below each other, panels in rows, lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .canvas import Color, Shape, Text, move, wrap_text
from .frame import INK
from .panels import LINE, NORMAL, Panel

GAP = 20  # pixels between two blocks


@dataclass(frozen=True)
class Block:
    """Shapes from 0, 0 on, and the room that they take."""

    width: int
    height: int
    shapes: list[Shape]


def stack(blocks: Iterable[Block], gap: int = GAP) -> Block:
    """Blocks below each other, aligned on the left. Those without height leave no gap."""
    width, y, shapes = 0, 0, list[Shape]()
    for block in blocks:
        shapes += [move(shape, 0, y) for shape in block.shapes]
        width = max(width, block.width)
        y += block.height + (gap if block.height else 0)
    return Block(width, max(0, y - gap), shapes)


def beside(blocks: Iterable[Block], gap: int = GAP) -> Block:
    """Blocks next to each other, aligned at the top."""
    x, height, shapes = 0, 0, list[Shape]()
    for block in blocks:
        shapes += [move(shape, x, 0) for shape in block.shapes]
        height = max(height, block.height)
        x += block.width + gap
    return Block(max(0, x - gap), height, shapes)


def write_lines(
    texts: Iterable[str], width: int, size: int = NORMAL, color: Color = INK, most: int = 12
) -> Block:
    """Texts as paragraphs of at most `most` lines each."""
    lines = [line for text in texts for line in wrap_text(text, width, size, most)]
    step = LINE if size < NORMAL else LINE + 3
    shapes: list[Shape] = [Text(0, n * step, line, size, color) for n, line in enumerate(lines)]
    return Block(width, len(lines) * step, shapes)


def fill_rows(panels: Sequence[Panel], width: int) -> Block:
    """As many panels next to each other as there is room for, at least one."""
    rows: list[list[Panel]] = [[]]
    for panel in panels:
        if rows[-1] and sum(p.width + GAP for p in rows[-1]) + panel.width > width:
            rows.append([])
        rows[-1].append(panel)
    return stack(map(align_pictures, rows))


def align_pictures(panels: Sequence[Panel]) -> Block:
    """Panels next to each other, their titles directly above the pictures, which begin level."""
    head = max((len(panel.title) for panel in panels), default=0) * LINE
    blocks = []
    for panel in panels:
        top = head - len(panel.title) * LINE - 3
        title = [Text(0, top + n * LINE, line, NORMAL, INK) for n, line in enumerate(panel.title)]
        below = [move(shape, 0, head) for shape in panel.shapes]
        blocks.append(Block(panel.width, head + panel.height, [*title, *below]))
    return beside(blocks)
