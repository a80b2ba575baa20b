"""A comparison on one page: a column for each plan, differences of the kept sets, answers over
budgets, and why each patch stayed. As a PIL image, PNG or SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from minillava.app.canvas import Box, Color, Drawing, Shape, Text, move, wrap_text
from minillava.app.frame import INK, PALE, PANEL
from minillava.app.layout import GAP, Block, align_pictures, beside, fill_rows, stack, write_lines
from minillava.app.overlay import draw_page
from minillava.app.panels import FAINT, LINE, NORMAL, SMALL, WHITE, Panel

from .pictures import Pictures, draw_pictures
from .record import record
from .runs import Cell, Comparison, Run
from .words import LIVES, describe, describe_cell, describe_costs, describe_overlap, title_of

PAGE = 4000  # pixels that a page may be wide, unless one column is wider
LEAST = 1200  # pixels that the texts of a page may be wide, however few columns there are
HEADING = 20  # size of letters
SAME: Color = (120, 170, 215)  # of answers that equal the unpruned one
NAMES, CELL, INSET = (
    260,
    300,
    8,
)  # pixels of a strip: names of its rows, a cell at most, room around text


def draw(comparison: Comparison) -> Image.Image:
    """The whole sheet as a PIL image in RGB."""
    return draw_sheet(comparison).image()


def draw_sheet(comparison: Comparison) -> Drawing:
    """The whole sheet. Its metadata hold the comparison as JSON, under "Comparison"."""
    pictures = draw_pictures(comparison)
    columns = _draw_columns(pictures)
    page = max(LEAST, columns.width)
    strip = _draw_strip(pictures, page)
    blocks = [
        write_lines([f"question: {comparison.question}"], page),
        *_under(LIVES, columns),
        *_under("Patches that two plans keep", _draw_differences(pictures, page)),
        *_under("Answers over budgets of image tokens", strip),
        *_under("Why each patch stayed", _draw_reasons(pictures, page)),
    ]
    facts = dict(comparison.about) | {
        "Question": comparison.question,
        "Plans": ", ".join(run.plan for run in comparison.runs[1:]),
        "Comparison": json.dumps(record(comparison, reports=False)),
    }
    return draw_page(stack(blocks, 2 * GAP), title_of(comparison), describe(comparison), facts)


def _under(title: str, block: Block) -> list[Block]:
    """A block with its heading, if there is anything in it."""
    head = Block(0, HEADING + 8, [Text(0, 0, title, HEADING, INK)])
    return [stack([head, block], 8)] if block.shapes else []


# ---------------------------------------------------------------- a column for each plan


def _draw_columns(pictures: Pictures) -> Block:
    """The runs next to each other, in as many bands as a page needs."""
    runs = list(zip(pictures.comparison.runs, pictures.overlays, strict=True))
    width = max(PANEL, *(image[0].width for _, images in runs for image in images))
    each = max(1, (PAGE + GAP) // (width + GAP))
    return stack(
        _draw_band(pictures, runs[first : first + each], width)
        for first in range(0, len(runs), each)
    )


def _draw_band(
    pictures: Pictures, runs: Sequence[tuple[Run, Sequence[Sequence[Panel]]]], width: int
) -> Block:
    """Some runs: a row for each image, and the answers and costs below."""
    rows = [
        align_pictures([_draw_image(pictures, run, found, i, width) for run, found in runs])
        for i in range(len(pictures.comparison.images))
    ]
    costs = [stack(_describe_run(pictures, run, width), 4) for run, _ in runs]
    return stack([*rows, beside([replace(block, width=width) for block in costs])], 8)


def _draw_image(
    pictures: Pictures, run: Run, images: Sequence[Sequence[Panel]], i: int, width: int
) -> Panel:
    """One image of a run, the first with the name; or a sentence if it could not run."""
    title = wrap_text(pictures.name(run), width, NORMAL) if i == 0 else []
    if images:
        title += [f"image {i + 1}"] if pictures.several else []
        return replace(images[i][0], width=width, title=title)
    text = write_lines([f"cannot run: {run.error}"] if i == 0 else [], width - 2 * INSET)
    frame = [Box(0, 0, width, text.height + 2 * INSET, PALE, edge=FAINT)] if i == 0 else []
    return Panel(width, text.height + 2 * INSET, title, [*frame, *_inset(text)])


def _inset(block: Block) -> list[Shape]:
    return [move(shape, INSET, INSET) for shape in block.shapes]


def _describe_run(pictures: Pictures, run: Run, width: int) -> list[Block]:
    """What a run answered, on colour if it is the unpruned answer, and what it cost."""
    if run.result is None:
        return []
    answer = write_lines([f"answer: {run.answer}{' ...' if run.cut else ''}"], width - 2 * INSET)
    first = pictures.comparison.runs[0]
    same = first.result is not None and first.result.tokens == run.result.tokens
    fill, edge = (SAME, INK) if same else (WHITE, FAINT)
    box = Box(0, 0, width, answer.height + 2 * INSET, fill, edge=edge)
    costs = write_lines(describe_costs(run), width, SMALL)
    return [Block(width, answer.height + 2 * INSET, [box, *_inset(answer)]), costs]


# ---------------------------------------------------------------- below the columns


def _draw_differences(pictures: Pictures, width: int) -> Block:
    """A panel for each pair of plans, and the Jaccard index below."""
    panels = []
    for difference, images in pictures.differences:
        last = images[-1]
        words = write_lines([describe_overlap(difference)], last.width, SMALL)
        below = [move(shape, 0, last.height + 4) for shape in words.shapes]
        tall = last.height + 4 + words.height
        panels += [*images[:-1], replace(last, height=tall, shapes=[*last.shapes, *below])]
    return fill_rows(panels, width)


def _draw_reasons(pictures: Pictures, width: int) -> Block:
    """The panels of an overlay but the first, with the names of the plans above."""
    panels = []
    for run, images in zip(pictures.comparison.runs, pictures.overlays, strict=True):
        for i, found in enumerate(images):
            name = pictures.name(run) + (f", image {i + 1}" if pictures.several else "")
            for panel in found[1:]:
                title = [*wrap_text(name, panel.width, NORMAL), *panel.title]
                panels.append(replace(panel, title=title))
    return fill_rows(panels, width)


def _draw_strip(pictures: Pictures, width: int) -> Block:
    """A row for each plan, a column for each budget, on colour where the answer is the unpruned
    one."""
    comparison = pictures.comparison
    if not comparison.drifts or not comparison.budgets:
        return Block(0, 0, [])
    across = min(CELL, (width - NAMES) // max(1, len(comparison.budgets)) - 4)
    across = max(across, CELL // 2)
    head = [Block(NAMES, LINE, [])]
    for budget in comparison.budgets:
        head.append(Block(across, LINE, [Text(INSET, 0, f"{budget} left", SMALL, FAINT)]))
    rows = [beside(head, 4)]
    names = {run.plan: pictures.name(run) for run in comparison.runs}
    for drift in comparison.drifts:
        cells = [_draw_answer(cell, across) for cell in drift.cells]
        name = write_lines([names[drift.plan]], NAMES - INSET, SMALL)
        reason = write_lines([drift.reason] if drift.reason else [], width - NAMES, SMALL, FAINT)
        tall = max(block.height for block in (name, reason, *cells))
        boxes = [_color(cell, block, tall) for cell, block in zip(drift.cells, cells, strict=True)]
        rows.append(
            beside([replace(name, width=NAMES), *boxes, *([reason] if drift.reason else [])], 4)
        )
    key = "on colour: the tokens of the unpruned answer; answers are cut to its length"
    return stack([*rows, write_lines([key], width, SMALL, FAINT)], 4)


def _draw_answer(cell: Cell, width: int) -> Block:
    """The answer at one budget and its KL, or why there is none."""
    inside = width - 2 * INSET
    if cell.error:
        words = [write_lines([cell.error], inside, SMALL, FAINT, 4)]
    else:
        answer = f"{cell.text}{' ...' if cell.cut else ''}"
        words = [write_lines([answer], inside, NORMAL, INK, 3)]
        words.append(write_lines([describe_cell(cell)], inside, SMALL, INK, 2))
    block = stack(words, 2)
    return Block(width, block.height + 2 * INSET, _inset(block))


def _color(cell: Cell, block: Block, height: int) -> Block:
    fill, edge = (SAME, INK) if cell.same else (WHITE, FAINT)
    box = Box(0, 0, block.width, height, fill, edge=edge)
    return Block(block.width, height, [box, *block.shapes])
