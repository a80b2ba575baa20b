"""Draw which patches a run kept: one panel for each pruning step, with dropped patches dimmed.

Everything is taken from the run's report. With one image the steps are side by side; with several
images each step is a row.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..processing.image import ImageConfig, preprocess

if TYPE_CHECKING:
    from ..config import VisionConfig
    from ..generate import Result

PANEL = 336  # approximate width of a panel in pixels
STEPS_PER_ROW = 4  # with a single image
MARGIN, GAP, LINE, FONT_SIZE = 16, 12, 21, 15
PAPER, INK, FAINT, EDGE = (255, 255, 255), (20, 20, 20), (100, 100, 100), (255, 140, 0)
MAX_LINES = 12  # in one paragraph of the caption


def overlay(
    result: Result,
    images: Image.Image | Sequence[Image.Image],
    *,
    sample: int = 0,
    text: str | None = None,
    aspect: str | None = None,
    config: ImageConfig | None = None,
) -> Image.Image:
    """Draw the images of one prompt as the model saw them, with the patches each step kept.

    sample: which prompt of the batch. images: the images of that prompt, in order. text: the answer
    to write below; default: the result's. aspect, config: how the processor made the images square;
    default: the checkpoint's aspect and the model's image size. Raises ValueError for a prompt
    without images and for a wrong number of images.
    """
    if not 0 <= sample < len(result.tokens):
        raise ValueError(f"sample={sample} must be from 0 to {len(result.tokens) - 1}")
    given = [images] if isinstance(images, Image.Image) else list(images)
    vision, starts = result.config.vision, result.starts[sample]
    if not starts:
        raise ValueError(f"prompt {sample} has no image; an overlay needs one")
    if len(given) != len(starts):
        raise ValueError(
            f"prompt {sample} has {len(starts)} images, not {len(given)}; give all of them"
        )
    config = config or ImageConfig(vision.image_size, vision.image_size)
    seen = [
        model_input_image(image, config, aspect or result.config.image_aspect) for image in given
    ]

    patches, panels = vision.grid**2, []
    for number, step in enumerate(result.report.kept, 1):
        kept = [_kept_patches(step.positions[sample], start, patches) for start in starts]
        extra = f" + {step.extra[sample]} extra tokens" if step.extra[sample] else ""
        title = f"{number}. {step.rule}, layer {step.layer}: "
        for i, (image, left) in enumerate(zip(seen, kept, strict=True)):
            which = f"image {i + 1}: " if len(seen) > 1 else ""
            count = f"{which}{len(left)} of {patches}{extra if i == len(seen) - 1 else ''}"
            panels.append((title + count, _draw_panel(image, vision, left)))
    if not panels:
        everything = set(range(patches))
        panels = [
            (f"{patches} of {patches}", _draw_panel(image, vision, everything)) for image in seen
        ]
    columns = len(seen) if len(seen) > 1 else min(len(panels), STEPS_PER_ROW)
    answer = result.texts[sample] if text is None and result.texts else text
    return _draw_page(panels, columns, _make_caption(result, sample, answer))


def model_input_image(image: Image.Image, config: ImageConfig, aspect: str) -> Image.Image:
    """The square that the vision tower receives, converted back from pixels to an image."""
    pixels = preprocess(image, config, aspect).permute(1, 2, 0)  # (S, S, 3)
    levels = (pixels * pixels.new_tensor(config.std) + pixels.new_tensor(config.mean)) * 255
    levels = levels.round().clamp(0, 255).byte().flatten()
    return Image.frombytes("RGB", (config.crop, config.crop), bytes(levels.tolist()))


# ---------------------------------------------------------------- panels


def _kept_patches(positions: Sequence[int], start: int, patches: int) -> set[int]:
    """The kept patches of one image, counted from 0 row by row."""
    return {p - start for p in positions if start <= p < start + patches}


def _draw_panel(image: Image.Image, vision: VisionConfig, kept: set[int]) -> Image.Image:
    """An image with its patches: kept ones unchanged, dropped ones dark and crossed out."""
    scale, grid = max(1, PANEL // vision.image_size), vision.grid
    side = vision.image_size // vision.grid * scale  # width of a patch in pixels of the panel
    size = (vision.image_size * scale, vision.image_size * scale)
    bright = image.resize(size, Image.Resampling.NEAREST)
    dim = bright.convert("L").point(lambda level: level * 0.3).convert("RGB")
    patches = Image.new("L", (grid, grid))
    patches.putdata([255 * (n in kept) for n in range(grid * grid)])
    mask = Image.new("L", size)
    mask.paste(patches.resize((grid * side, grid * side), Image.Resampling.NEAREST))
    panel = Image.composite(bright, dim, mask)

    lines = ImageDraw.Draw(panel, "RGBA")
    for n in range(1, grid + 1):  # the grid; below, the outline of the kept patches
        lines.line([(n * side, 0), (n * side, grid * side)], (128, 128, 128, 90))
        lines.line([(0, n * side), (grid * side, n * side)], (128, 128, 128, 90))
    for n in range(grid * grid):
        x, y = n % grid * side, n // grid * side
        if n not in kept:  # dimming alone is hard to see in a dark image
            lines.line([(x, y + side), (x + side, y)], (170, 170, 170, 110))
        if n % grid and (n in kept) != (n - 1 in kept):
            lines.line([(x, y), (x, y + side)], EDGE, 2)
        if n >= grid and (n in kept) != (n - grid in kept):
            lines.line([(x, y), (x + side, y)], EDGE, 2)
    return panel


# ---------------------------------------------------------------- the page


def _draw_page(
    panels: Sequence[tuple[str, Image.Image]], columns: int, caption: Sequence[str]
) -> Image.Image:
    """Arrange the panels with their titles in `columns` columns, with the caption below."""
    font = ImageFont.load_default(FONT_SIZE)
    width, height = panels[0][1].size
    column = max([width, *(int(font.getlength(title)) for title, _ in panels)])
    rows = -(-len(panels) // columns)
    inner = max(columns * (column + GAP) - GAP, PANEL)
    lines = [line for paragraph in caption for line in _wrap_text(paragraph, font, inner)]
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


def _make_caption(result: Result, sample: int, text: str | None) -> list[str]:
    """Three paragraphs: the plan, the tokens that enter each layer, and the answer."""
    report = result.report
    entering = zip(report.tokens_entering, report.image_tokens_entering, strict=True)
    counts = [(rows[sample], image[sample]) for rows, image in entering]
    layers, first = [], 0
    for (rows, image), same in groupby(counts):
        last = first + len(list(same)) - 1
        which = f"layer {first}" if first == last else f"layers {first}-{last}"
        layers.append(f"{which}: {rows} ({image} of images)")
        first = last + 1
    answer = f"tokens {result.tokens[sample]}" if text is None else text
    return [
        f"plan: {result.plan.text or 'none'}",
        f"tokens: {report.prompt_tokens[sample]} in the prompt; {', '.join(layers)}",
        f"answer: {answer}",
    ]


def _wrap_text(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Break text into lines of at most `width` pixels; words longer than a line are split."""
    lines = [""]
    for word in _to_ascii(text).split():
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
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."]


def _to_ascii(text: str) -> str:
    """Remove accents and escape other characters: Pillow's own font has little besides ASCII."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    return plain.encode("ascii", "backslashreplace").decode()
