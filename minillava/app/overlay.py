"""Draw what a plan did to the pictures of a prompt, and why, from one run's report.

For each picture there is one map of how many decoder layers each patch lives through. Each step of
the plan adds the method's own scores with their cut, the order of its picks, and what the others
were merged into, as far as it says so. A step that chooses again for every token adds how often it
left each patch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from PIL import Image

from ..processing.image import ImageConfig
from ..pruning.parsing import name_plan
from ..report import Result
from .canvas import Drawing, Shape, Text, move, wrap_text
from .fate import Fate, count_layers, count_tokens, list_fates
from .frame import INK, PANEL, Frame, make_frame
from .panels import (
    LINE,
    NORMAL,
    Panel,
    draw_choice,
    draw_lives,
    draw_scores,
    draw_tokens,
)

PAGE = 1900  # pixels that a page may be wide, unless one panel is wider
MARGIN, GAP = 16, 20
MOST_STEPS = 4  # that are drawn by themselves, unless all are asked for
DIGITS = 12  # of a digest in the caption


def overlay(
    result: Result,
    images: Image.Image | Sequence[Image.Image],
    *,
    sample: int = 0,
    text: str | None = None,
    aspect: str | None = None,
    config: ImageConfig | None = None,
    question: str | None = None,
    about: Mapping[str, str] | None = None,
    every_step: bool = False,
) -> Image.Image:
    """Draw one prompt of a batch, as a PIL image; see draw_overlay, which also gives an SVG."""
    given = (images, sample, text, aspect, config, question, about, every_step)
    return draw_overlay(result, *given).image()


def draw_overlay(
    result: Result,
    images: Image.Image | Sequence[Image.Image],
    sample: int = 0,
    text: str | None = None,
    aspect: str | None = None,
    config: ImageConfig | None = None,
    question: str | None = None,
    about: Mapping[str, str] | None = None,
    every_step: bool = False,
) -> Drawing:
    """Draw the images of one prompt with what became of their patches.

    sample: which prompt of the batch. images: the images of that prompt, in order. text: the answer
    to write below; default: the result's. aspect, config: how the processor made the images square;
    default: the checkpoint's aspect and the model's image size. question, about: words for the
    caption, and for the file's metadata. every_step: draw more than the first MOST_STEPS steps.
    Raises ValueError for a prompt without images and for a wrong number of images.
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
    aspect = aspect or result.config.image_aspect
    pages = []
    for i, image in enumerate(given):
        frame = make_frame(image, vision, config, aspect)
        square = make_frame(image, vision, config, aspect, outside=0.0)
        pages.append(_draw_image(result, sample, i, (frame, square), every_step))
    answer = result.texts[sample] if text is None and result.texts else text
    caption = _make_caption(result, sample, question, answer)
    facts = dict(about or {}) | {
        "Question": question or "",
        "Answer": answer or "",
        "Plan": name_plan(result.plan),
        "Digest": ", ".join(f"{k.rule} {k.digest[sample]}" for k in result.report.kept),
    }
    told = {name: value for name, value in facts.items() if value}
    width, height, shapes = lay_out(pages, caption)
    title = f"Patches left by the plan {facts['Plan']}"
    return Drawing(width, height, shapes, title, _describe(result, sample, caption), told)


# ---------------------------------------------------------------- the page


def _draw_image(
    result: Result, sample: int, image: int, frames: tuple[Frame, Frame], every_step: bool
) -> list[Panel]:
    """The panels of one image: the map on the whole picture, the others on its square."""
    whole, frame = frames
    which = f"image {image + 1}: " if len(result.starts[sample]) > 1 else ""
    last = image == len(result.starts[sample]) - 1
    n_layers = result.config.text.num_hidden_layers
    lives = count_layers(result, sample, image)
    title = f"{which}decoder layers that each patch lives in, of {n_layers}"
    panels = [draw_lives(whole, title, lives, n_layers)]
    fates = list_fates(result, sample, image)
    for fate in fates if every_step else fates[:MOST_STEPS]:
        unmerged = fate.step.extra[sample] - len(fate.added)
        chips = [f"rows without a patch: {unmerged}"] if last and unmerged > 0 else []
        if fate.into or chips or (fate.picks and not fate.scores):
            panels.append(draw_choice(frame, fate, chips))
        if fate.scores:
            panels.append(draw_scores(frame, fate, _note_margin(fate, sample)))
    for step, tokens in count_tokens(result, sample, image):
        panels.append(draw_tokens(frame, step, tokens))
    return panels


def _note_margin(fate: Fate, sample: int) -> list[str]:
    """How near the choice was to another one."""
    margin, closest = fate.step.margin[sample], fate.step.closest[sample]
    notes = []
    if margin is not None:
        notes.append(f"margin, last kept to first dropped: {margin:.3g}")
    if closest is not None:
        notes.append(f"closest decision: between numbers that are {100 * closest:.2g} % apart")
    if fate.step.within_rounding[sample]:
        notes.append("within rounding: another machine or batch size may choose otherwise")
    return notes


def lay_out(
    pages: Sequence[Sequence[Panel]], caption: Sequence[str]
) -> tuple[int, int, list[Shape]]:
    """Panels in rows, a new row for each page, and the caption below: width, height, shapes."""
    shapes: list[Shape] = []
    y, widest = MARGIN, PANEL
    for panels in pages:
        for row in _fill_rows(panels):
            x = MARGIN
            head = max(len(panel.title) for panel in row) * LINE
            for panel in row:
                for n, line in enumerate(reversed(panel.title), 1):  # directly above the picture
                    shapes.append(Text(x, y + head - n * LINE - 3, line, NORMAL, INK))
                shapes += [move(shape, x, y + head) for shape in panel.shapes]
                x += panel.width + GAP
            y += head
            widest = max(widest, x - GAP - MARGIN)
            y += max(panel.height for panel in row) + GAP
    for line in (line for text in caption for line in wrap_text(text, widest, NORMAL)):
        shapes.append(Text(MARGIN, y, line, NORMAL, INK))
        y += LINE + 3
    return widest + 2 * MARGIN, y + MARGIN, shapes


def _fill_rows(panels: Sequence[Panel]) -> list[list[Panel]]:
    """As many panels next to each other as a page is wide, at least one."""
    rows: list[list[Panel]] = [[]]
    for panel in panels:
        width = sum(p.width + GAP for p in rows[-1]) + panel.width
        if rows[-1] and width > PAGE - 2 * MARGIN:
            rows.append([])
        rows[-1].append(panel)
    return rows


# ---------------------------------------------------------------- words


def _make_caption(
    result: Result, sample: int, question: str | None, answer: str | None
) -> list[str]:
    """Paragraphs: question, answer, plan, the tokens that enter each layer, times, digests."""
    report = result.report
    entering = zip(report.tokens_entering, report.image_tokens_entering, strict=True)
    layers, first = [], 0
    for (rows, image), same in groupby((all_[sample], image[sample]) for all_, image in entering):
        last = first + len(list(same)) - 1
        which = f"layer {first}" if first == last else f"layers {first}-{last}"
        layers.append(f"{which}: {rows} ({image} of images)")
        first = last + 1
    times = [f"vision tower {report.vision:.3g} s", f"prompt {report.prefill:.3g} s"]
    times.append(f"first token after {report.first_token:.3g} s")
    if report.per_token:
        times.append(f"{1000 * report.per_token:.3g} ms for each later one")
    steps = [f"{k.rule} {k.digest[sample][:DIGITS]}" for k in report.kept[:MOST_STEPS]]
    more = len(report.kept) - MOST_STEPS
    steps += [f"and {more} more steps, in the file's metadata"] if more > 0 else []
    return [
        *([f"question: {question}"] if question else []),
        f"answer: {f'tokens {result.tokens[sample]}' if answer is None else answer}",
        f"plan: {name_plan(result.plan)}",
        f"tokens: {report.prompt_tokens[sample]} in the prompt; {', '.join(layers)}",
        f"times: {', '.join(times)}",
        *([f"kept sets (SHA-256): {', '.join(steps)}"] if steps else []),
    ]


def _describe(result: Result, sample: int, caption: Sequence[str]) -> str:
    """The drawing in words, for those who do not see it."""
    n_layers, N = result.config.text.num_hidden_layers, result.config.vision.num_patches
    words = []
    for image in range(len(result.starts[sample])):
        counts = Counter(count_layers(result, sample, image))
        parts = (
            f"{counts[n]} live {'all' if n == n_layers else n or 'none'} of {n_layers} layers"
            for n in sorted(counts, reverse=True)
        )
        words.append(f"Image {image + 1}: of {N} patches, {', '.join(parts)}.")
    for number, kept in enumerate(result.report.kept, 1):
        left = len(kept.positions[sample])
        words.append(f"Step {number}, {kept.rule} at layer {kept.layer}, leaves {left} patches.")
    return " ".join(words) + "\n" + "\n".join(caption)
