"""Draw what a plan did to the pictures of a prompt, and why, from one run's report.

For each picture there is one map of how many decoder layers each patch lives through. Each step of
the plan adds the method's own scores with their cut, the order of its picks, and what the others
were merged into, as far as it says so. A step that chooses again for every token adds how often it
left each patch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from PIL import Image

from ..config import Config
from ..processing.image import ImageConfig
from ..pruning.parsing import name_plan
from ..report import Report, Result
from .canvas import Drawing, move
from .fate import Fate, count_layers, count_tokens, list_fates
from .frame import OUTSIDE, PANEL, Frame, make_frame
from .layout import Block, fill_rows, stack, write_lines
from .panels import Panel, draw_choice, draw_lives, draw_scores, draw_tokens, find_edges

PAGE = 1900  # pixels that a page may be wide, unless one panel is wider
MARGIN = 16
MOST_STEPS = 4  # that are drawn by themselves, unless all are asked for
DIGITS = 12  # of a digest in the caption


def overlay(
    result: Result, images: Image.Image | Sequence[Image.Image], **options: Any
) -> Image.Image:
    """Draw one prompt of a batch, as a PIL image. It takes the options of draw_overlay, which also
    gives an SVG."""
    return draw_overlay(result, images, **options).image()


def draw_overlay(
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
) -> Drawing:
    """Draw the images of one prompt with what became of their patches.

    sample: which prompt of the batch. images: the images of that prompt, in order. text: the answer
    to write below; default: the result's. aspect, config: how the processor made the images square;
    default: the checkpoint's aspect and the model's image size. question, about: words for the
    caption, and for the file's metadata. every_step: draw more than the first MOST_STEPS steps.
    Raises ValueError for a prompt without images and for a wrong number of images.
    """
    given = _check_images(result, sample, images)
    frames = frame_images(given, result.config, config, aspect)
    pages = [
        fill_rows(draw_panels(result, sample, i, frames[i], every_step), PAGE - 2 * MARGIN)
        for i in range(len(given))
    ]
    answer = result.texts[sample] if text is None and result.texts else text
    caption = _make_caption(result, sample, question, answer)
    facts = dict(about or {}) | {
        "Question": question or "",
        "Answer": answer or "",
        "Plan": name_plan(result.plan),
        "Digest": ", ".join(f"{k.rule} {k.digest[sample]}" for k in result.report.kept),
    }
    told = {name: value for name, value in facts.items() if value}
    widest = max(PANEL, *(page.width for page in pages))
    page = stack([*pages, write_lines(caption, widest)])
    title = f"Patches left by the plan {facts['Plan']}"
    return draw_page(page, title, _describe(result, sample, caption), told)


def _check_images(
    result: Result, sample: int, images: Image.Image | Sequence[Image.Image]
) -> list[Image.Image]:
    """The images of a prompt."""
    if not 0 <= sample < len(result.tokens):
        raise ValueError(f"sample={sample} must be from 0 to {len(result.tokens) - 1}")
    given = [images] if isinstance(images, Image.Image) else list(images)
    n_images = len(result.starts[sample])
    if not n_images:
        raise ValueError(f"prompt {sample} has no image; an overlay needs one")
    if len(given) != n_images:
        raise ValueError(
            f"prompt {sample} has {n_images} images, not {len(given)}; give all of them"
        )
    return given


# ---------------------------------------------------------------- the page


@dataclass(frozen=True)
class Frames:
    """One image in two frames: as far as a crop leaves it in sight, and its square alone."""

    whole: Frame
    square: Frame


def frame_images(
    images: Sequence[Image.Image],
    model: Config,
    config: ImageConfig | None = None,
    aspect: str | None = None,
    outside: float = OUTSIDE,
) -> list[Frames]:
    """The frames of images that a processor made square with this config and aspect; outside: see
    make_frame, for the whole images."""
    vision, aspect = model.vision, aspect or model.image_aspect
    config = config or ImageConfig(vision.image_size, vision.image_size)
    return [
        Frames(*(make_frame(image, vision, config, aspect, part) for part in (outside, 0.0)))
        for image in images
    ]


def draw_panels(
    result: Result, sample: int, image: int, frames: Frames, every_step: bool = False
) -> list[Panel]:
    """The panels of one image: first how long each patch lives, on the whole picture, then the
    reasons of each step, on the square."""
    which = f"image {image + 1}: " if len(result.starts[sample]) > 1 else ""
    last = image == len(result.starts[sample]) - 1
    n_layers = result.config.text.num_hidden_layers
    lives = count_layers(result, sample, image)
    title = f"{which}decoder layers that each patch lives in, of {n_layers}"
    panels = [draw_lives(frames.whole, title, lives, n_layers)]
    fates = list_fates(result, sample, image)
    for fate in fates if every_step else fates[:MOST_STEPS]:
        unmerged = fate.step.extra[sample] - len(fate.added)
        chips = [f"rows without a patch: {unmerged}"] if last and unmerged > 0 else []
        if fate.into or chips or (fate.picks and not fate.scores):
            panels.append(draw_choice(frames.square, fate, chips))
        if fate.scores:
            notes = _note_margin(fate, sample, len(result.starts[sample]))
            panels.append(draw_scores(frames.square, fate, notes))
    for step, tokens in count_tokens(result, sample, image):
        panels.append(draw_tokens(frames.square, step, tokens))
    return panels


def _note_margin(fate: Fate, sample: int, n_images: int) -> list[str]:
    """How near the choice was to another one. The report has the least of all images."""
    margin, closest = fate.step.margin[sample], fate.step.closest[sample]
    of_all, notes = " of all images" if n_images > 1 else "", []
    if n_images > 1 and fate.alone:
        edges = find_edges(fate)
        margin = None if edges is None else edges[1] - edges[0]
    if margin is not None:
        notes.append(f"margin, last kept to first dropped: {margin:.3g}")
    if closest is not None:
        apart = f"between numbers that are {100 * closest:.2g} % apart"
        notes.append(f"closest decision{of_all}: {apart}")
    elif fate.among - fate.kept:
        notes.append("closest decision: not known, another machine may choose otherwise")
    if fate.step.within_rounding[sample]:
        notes.append("within rounding: another machine or batch size may choose otherwise")
    return notes


def draw_page(block: Block, title: str, description: str, about: Mapping[str, str]) -> Drawing:
    """A block on paper, with a margin."""
    shapes = [move(shape, MARGIN, MARGIN) for shape in block.shapes]
    width, height = block.width + 2 * MARGIN, block.height + 2 * MARGIN
    return Drawing(width, height, shapes, title, description, about)


# ---------------------------------------------------------------- words


def _make_caption(
    result: Result, sample: int, question: str | None, answer: str | None
) -> list[str]:
    """Paragraphs: question, answer, plan, the tokens that enter each layer, times, digests."""
    report = result.report
    times = [f"vision tower {report.vision:.3g} s", f"prompt {report.prefill:.3g} s"]
    times.append(f"first token after {report.first_token:.3g} s")
    if report.per_token:
        times.append(f"{1000 * report.per_token:.3g} ms for each later one")
    return [
        *([f"question: {question}"] if question else []),
        f"answer: {f'tokens {result.tokens[sample]}' if answer is None else answer}",
        f"plan: {name_plan(result.plan)}",
        f"tokens: {describe_tokens(report, sample)}",
        f"times: {', '.join(times)}",
        *([f"kept sets (SHA-256): {describe_digests(report, sample)}"] if report.kept else []),
    ]


def describe_tokens(report: Report, sample: int) -> str:
    """How many tokens enter each layer."""
    entering = zip(report.tokens_entering, report.image_tokens_entering, strict=True)
    words, first = [f"{report.prompt_tokens[sample]} in the prompt"], 0
    for (rows, image), same in groupby((all_[sample], image[sample]) for all_, image in entering):
        last = first + len(list(same)) - 1
        which = f"layer {first}" if first == last else f"layers {first}-{last}"
        words.append(f"{which}: {rows} ({image} of images)")
        first = last + 1
    return f"{words[0]}; {', '.join(words[1:])}"


def describe_digests(report: Report, sample: int) -> str:
    """The beginning of the digest of each step's kept set, of the first MOST_STEPS steps."""
    words = [f"{k.rule} {k.digest[sample][:DIGITS]}" for k in report.kept[:MOST_STEPS]]
    more = len(report.kept) - MOST_STEPS
    return ", ".join([*words, *([f"and {more} more steps, in the metadata"] if more > 0 else [])])


def _describe(result: Result, sample: int, caption: Sequence[str]) -> str:
    """The drawing in words, for those who do not see it."""
    images = range(len(result.starts[sample]))
    words = [f"Image {i + 1}: {describe_lives(result, sample, i)}" for i in images]
    for number, kept in enumerate(result.report.kept, 1):
        left = len(kept.positions[sample])
        words.append(f"Step {number}, {kept.rule} at layer {kept.layer}, leaves {left} patches.")
    return " ".join(words) + "\n" + "\n".join(caption)


def describe_lives(result: Result, sample: int, image: int) -> str:
    """How many patches of an image live how long."""
    n_layers, N = result.config.text.num_hidden_layers, result.config.vision.num_patches
    counts = Counter(count_layers(result, sample, image))
    parts = (
        f"{counts[n]} live {'all' if n == n_layers else n or 'none'} of {n_layers} layers"
        for n in sorted(counts, reverse=True)
    )
    return f"of {N} patches, {', '.join(parts)}."
