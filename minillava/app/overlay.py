"""A picture of what a run kept: dropped patches dimmed, one panel for each step of its plan.

Drawn from the run's own report, with Pillow alone. The steps on one picture stand side by side; of
several pictures each step has a row.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..image import ImageConfig, preprocess

if TYPE_CHECKING:
    from ..generate import Layout, Result

PANEL = 336  # pixels along a panel's side, about
ACROSS = 4  # steps on one picture in a row
MARGIN, GAP, LINE, LETTERS = 16, 12, 21, 15
PAPER, INK, FAINT, EDGE = (255, 255, 255), (20, 20, 20), (100, 100, 100), (255, 140, 0)
MOST_LINES = 12  # of one paragraph of the caption


def overlay(
    result: Result,
    images: Image.Image | Sequence[Image.Image],
    *,
    sample: int = 0,
    text: str | None = None,
    aspect: str | None = None,
    config: ImageConfig | None = None,
) -> Image.Image:
    """The pictures of one prompt as the model saw them, with what each step of the plan left.

    images: that prompt's, in order. text: the answer to write below, else the result's. aspect and
    config: how the processor made them square, else the checkpoint's way and the model's size.
    Raises ValueError for a prompt without pictures, or with another number of them.
    """
    if not 0 <= sample < len(result.tokens):
        raise ValueError(f"sample={sample}: must be from 0 to {len(result.tokens) - 1}")
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    layout, starts = result.layout, result.layout.starts[sample]
    if not starts:
        raise ValueError(f"prompt {sample} has no picture; an overlay needs one")
    if len(pictures) != len(starts):
        raise ValueError(f"prompt {sample} has {len(starts)} pictures, not {len(pictures)}")
    config = config or ImageConfig(layout.size, layout.size)
    seen = [as_seen(picture, config, aspect or layout.aspect) for picture in pictures]

    patches, panels = layout.grid**2, []
    for number, step in enumerate(result.report.kept, 1):
        kept = [_patches(step.positions[sample], start, patches) for start in starts]
        extra = f" + {step.extra[sample]} without a patch" if step.extra[sample] else ""
        title = f"{number}. {step.rule}, layer {step.layer}: "
        for i, (picture, left) in enumerate(zip(seen, kept, strict=True)):
            which = f"picture {i + 1}: " if len(seen) > 1 else ""
            count = f"{which}{len(left)} of {patches}{extra if i == len(seen) - 1 else ''}"
            panels.append((title + count, _panel(picture, layout, left)))
    if not panels:
        everything = set(range(patches))
        panels = [(f"{patches} of {patches}", _panel(p, layout, everything)) for p in seen]
    columns = len(seen) if len(seen) > 1 else min(len(panels), ACROSS)
    answer = result.texts[sample] if text is None and result.texts else text
    return _page(panels, columns, _caption(result, sample, answer))


def as_seen(picture: Image.Image, config: ImageConfig, aspect: str) -> Image.Image:
    """The square that the vision tower is shown, as a picture again."""
    pixels = preprocess(picture, config, aspect).permute(1, 2, 0)  # (S, S, 3)
    levels = (pixels * pixels.new_tensor(config.std) + pixels.new_tensor(config.mean)) * 255
    levels = levels.round().clamp(0, 255).byte().flatten()
    return Image.frombytes("RGB", (config.crop, config.crop), bytes(levels.tolist()))


# ---------------------------------------------------------------- panels


def _patches(positions: Sequence[int], start: int, patches: int) -> set[int]:
    """Those of one picture, counted from 0 in reading order."""
    return {p - start for p in positions if start <= p < start + patches}


def _panel(picture: Image.Image, layout: Layout, kept: set[int]) -> Image.Image:
    """A picture with its patches: the kept ones as they are, the others dark and struck out."""
    scale, grid = max(1, PANEL // layout.size), layout.grid
    side = layout.size // layout.grid * scale  # of a patch, in pixels of the panel
    size = (layout.size * scale, layout.size * scale)
    bright = picture.resize(size, Image.Resampling.NEAREST)
    dim = bright.convert("L").point(lambda level: level * 0.3).convert("RGB")
    patches = Image.new("L", (grid, grid))
    patches.putdata([255 * (n in kept) for n in range(grid * grid)])
    mask = Image.new("L", size)
    mask.paste(patches.resize((grid * side, grid * side), Image.Resampling.NEAREST))
    panel = Image.composite(bright, dim, mask)

    lines = ImageDraw.Draw(panel, "RGBA")
    for n in range(1, grid + 1):  # the grid, then the border of what is kept
        lines.line([(n * side, 0), (n * side, grid * side)], (128, 128, 128, 90))
        lines.line([(0, n * side), (grid * side, n * side)], (128, 128, 128, 90))
    for n in range(grid * grid):
        x, y = n % grid * side, n // grid * side
        if n not in kept:  # on a dark picture being dark says little
            lines.line([(x, y + side), (x + side, y)], (170, 170, 170, 110))
        if n % grid and (n in kept) != (n - 1 in kept):
            lines.line([(x, y), (x, y + side)], EDGE, 2)
        if n >= grid and (n in kept) != (n - grid in kept):
            lines.line([(x, y), (x + side, y)], EDGE, 2)
    return panel


# ---------------------------------------------------------------- the page


def _page(
    panels: Sequence[tuple[str, Image.Image]], columns: int, caption: Sequence[str]
) -> Image.Image:
    """Panels with their titles in rows of so many columns, the caption below."""
    font = ImageFont.load_default(LETTERS)
    width, height = panels[0][1].size
    column = max([width, *(int(font.getlength(title)) for title, _ in panels)])
    rows = -(-len(panels) // columns)
    inner = max(columns * (column + GAP) - GAP, PANEL)
    lines = [line for paragraph in caption for line in _wrapped(paragraph, font, inner)]
    below = MARGIN + rows * (LINE + height + GAP)
    page = Image.new("RGB", (inner + 2 * MARGIN, below + len(lines) * LINE + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (title, panel) in enumerate(panels):
        x = MARGIN + i % columns * (column + GAP)
        y = MARGIN + i // columns * (LINE + height + GAP)
        pen.text((x, y), title, FAINT, font)
        page.paste(panel, (x, y + LINE))
    for i, line in enumerate(lines):
        pen.text((MARGIN, below + i * LINE), line, INK, font)
    return page


def _caption(result: Result, sample: int, text: str | None) -> list[str]:
    """The plan, the tokens that enter the layers, and the answer; a paragraph each."""
    report = result.report
    entering = zip(report.tokens_entering, report.image_tokens_entering, strict=True)
    counts = [(rows[sample], image[sample]) for rows, image in entering]
    layers, first = [], 0
    for (rows, image), same in groupby(counts):
        last = first + len(list(same)) - 1
        which = f"layer {first}" if first == last else f"layers {first}-{last}"
        layers.append(f"{which}: {rows} ({image} of pictures)")
        first = last + 1
    answer = f"tokens {result.tokens[sample]}" if text is None else text
    return [
        f"plan: {result.plan.text or 'none'}",
        f"tokens: {report.prompt_tokens[sample]} in the prompt; {', '.join(layers)}",
        f"answer: {answer}",
    ]


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Lines that fit; words that do not are broken."""
    lines = [""]
    for word in _printable(text).split():
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]


def _printable(text: str) -> str:
    """Pillow's own font has little more than ASCII: accents go, other letters become escapes."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    return plain.encode("ascii", "backslashreplace").decode()
