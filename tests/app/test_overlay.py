"""Overlays: patches at the report's positions are unchanged, all others are dimmed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image, ImageChops, ImageFont

from minillava import Batch
from minillava.app.overlay import (
    EDGE,
    GAP,
    LINE,
    MARGIN,
    MAX_LINES,
    PANEL,
    PAPER,
    _draw_panel,
    _make_caption,
    _to_ascii,
    _wrap_text,
    model_input_image,
    overlay,
)
from minillava.config import VisionConfig
from minillava.generate import Result, generate
from minillava.llava import LLaVA
from minillava.processing.image import ImageConfig, preprocess
from minillava.pruning import parse_plan

SIZE, GRID = 56, 4  # image size and patches per side of the model in conftest
N = GRID**2
SIDE = PANEL // GRID  # width of a patch in a panel


def make_image(n: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """A random image that is bright everywhere, so that dimmed patches can be found."""
    noise = torch.randint(170, 256, (*size[::-1], 3), generator=torch.manual_seed(n))
    return Image.frombytes("RGB", size, bytes(noise.flatten().tolist()))


def run(model: LLaVA, images: Sequence[Image.Image], plan: str, aspect: str = "crop") -> Result:
    ids = [1, 4] + [tiny.IMAGE] * N * len(images) + [5, 6]
    pixels = [preprocess(p, ImageConfig(SIZE, SIZE), aspect) for p in images]
    batch = Batch(
        torch.tensor([ids]),
        torch.ones(1, len(ids), dtype=torch.bool),
        torch.stack(pixels) if pixels else None,
    )
    return generate(model, batch, parse_plan(plan), max_new_tokens=2)


def find_bright(page: Image.Image, row: int = 0, column: int = 0) -> set[int]:
    """Patches of a panel that are not dimmed, by their median level without the outline."""
    left = MARGIN + column * (PANEL + GAP)
    top = MARGIN + row * (LINE + PANEL + GAP) + LINE
    panel = page.convert("L").crop((left, top, left + PANEL, top + PANEL))
    found = set()
    for n in range(N):
        x, y = n % GRID * SIDE, n // GRID * SIDE
        levels = sorted(panel.crop((x + 4, y + 4, x + SIDE - 4, y + SIDE - 4)).tobytes())
        if levels[len(levels) // 2] > 120:
            found.add(n)
    return found


def test_patches_in_the_report_stay_bright_and_all_others_are_dimmed(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "fastv:k=2,r=0.5")
    kept = {p - 2 for p in result.report.kept[0].positions[0]}
    assert len(kept) == N // 2
    assert find_bright(overlay(result, make_image(0))) == kept


def test_each_step_of_a_plan_has_its_panel(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "uniform:keep=9+fastv:layer=1,keep=3")
    page = overlay(result, [make_image(0)])
    assert len(find_bright(page, column=0)) == 9
    assert len(find_bright(page, column=1)) == 3
    for column, step in enumerate(result.report.kept):
        assert find_bright(page, column=column) == {p - 2 for p in step.positions[0]}


def test_several_images_are_columns_and_steps_are_rows(model: LLaVA) -> None:
    images = [make_image(0), make_image(1), make_image(2)]
    result = run(model, images, "random:keep=5+fastv:layer=1,keep=3,scope=all")
    page = overlay(result, images)
    for row, step in enumerate(result.report.kept):
        for column in range(3):
            start = 2 + column * N
            kept = {p - start for p in step.positions[0] if start <= p < start + N}
            assert find_bright(page, row, column) == kept


def test_without_a_plan_there_is_one_panel_with_everything(model: LLaVA) -> None:
    page = overlay(run(model, [make_image(0)], ""), make_image(0))
    assert find_bright(page) == set(range(N))
    assert page.width == PANEL + 2 * MARGIN


def test_the_image_is_the_one_the_model_received(model: LLaVA) -> None:
    wide = Image.new("RGB", (3 * SIZE, SIZE), "red")
    wide.paste("blue", (SIZE, 0, 2 * SIZE, SIZE))
    config = ImageConfig(SIZE, SIZE)
    assert model_input_image(wide, config, "crop").getcolors() == [(SIZE * SIZE, (0, 0, 255))]
    padded = model_input_image(wide, config, "pad")
    assert padded.getpixel((2, SIZE // 2)) == (255, 0, 0)
    assert padded.getpixel((2, 2)) == config.fill

    pad = run(model, [wide], "", "pad")
    centre = (MARGIN + 5, MARGIN + LINE + PANEL // 2 + 5)
    assert overlay(pad, wide).getpixel(centre) == (0, 0, 255)
    assert overlay(pad, wide, aspect="pad").getpixel(centre) == (255, 0, 0)
    made_for = replace(pad, config=replace(pad.config, image_aspect="pad"))
    assert overlay(made_for, wide).getpixel(centre) == (255, 0, 0)


def test_preprocessing_can_be_inverted() -> None:
    original = make_image(3)
    seen = model_input_image(original, ImageConfig(SIZE, SIZE), "crop")
    assert ImageChops.difference(seen, original).getbbox() is None


PLANS = [
    "visionzip:dominant=5,contextual=2",  # keeps a class token and means besides patches
    "simignore:keep=6,mode=mask",
    "pyramiddrop:layers=1/2/3,ratios=0.5/0.25/0.125",
    "fastv:layer=1,keep=0",
]


@pytest.mark.parametrize("plan", PLANS)
def test_steps_of_every_kind_can_be_drawn(model: LLaVA, plan: str) -> None:
    result = run(model, [make_image(0)], plan)
    page = overlay(result, make_image(0))
    for column, step in enumerate(result.report.kept):
        assert find_bright(page, column=column) == {p - 2 for p in step.positions[0]}


def test_any_text_can_be_drawn_below(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "")
    plain = overlay(result, make_image(0), text="a")
    odd = ["", "Füße 中文 \N{GRINNING FACE}", "\ud83d \x00 \x1b[31m", "w" * 500, "word " * 5000]
    for text in odd:
        page = overlay(result, make_image(0), text=text)
        assert page.width == plain.width
        assert plain.height <= page.height < plain.height + 15 * LINE


def test_the_grid_the_outline_and_the_strokes_are_drawn() -> None:
    """Patch 5 of 4 x 4 is kept, in the second row and the second column."""
    grey = Image.new("RGB", (SIZE, SIZE), (200, 200, 200))
    panel = _draw_panel(grey, VisionConfig(image_size=SIZE, patch_size=SIZE // GRID), {5})
    dim, half = panel.getpixel((5, 5)), SIDE // 2
    assert panel.getpixel((SIDE + half, SIDE + half)) == (200, 200, 200)
    for x, y in ((SIDE, SIDE + half), (2 * SIDE, SIDE + half)):
        assert panel.getpixel((x, y)) == panel.getpixel((y, x)) == EDGE[:3]
    for n in (1, 2, 3):
        assert panel.getpixel((n * SIDE, 9)) == panel.getpixel((9, n * SIDE)) != dim
    for x, y in ((0, 0), (2, 1), (3, 3)):  # from the lower left to the upper right corner
        assert panel.getpixel((x * SIDE + half, y * SIDE + half)) not in (dim, (200, 200, 200))


def test_the_caption_names_layers_by_what_enters_them(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "uniform:keep=9+fastv:layer=1,keep=3")
    assert _make_caption(result, 0, "red") == [
        "plan: uniform:keep=9+fastv:layer=1,keep=3",
        "tokens: 20 in the prompt; layer 0: 13 (9 of images), layers 1-3: 7 (3 of images)",
        "answer: red",
    ]
    assert _make_caption(result, 0, None)[2] == f"answer: tokens {result.tokens[0]}"


def test_every_line_of_the_caption_is_below_the_panels(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "")
    page = overlay(result, make_image(0), text="word " * 60)
    top = MARGIN + LINE + PANEL + GAP
    lines = (page.height - MARGIN - top) // LINE
    assert lines > 4
    for i in range(lines):
        line = page.crop((0, top + i * LINE, page.width, top + (i + 1) * LINE))
        assert len(line.getcolors()) > 1, f"line {i} is empty"
    gap = page.crop((0, top - GAP, page.width, top))
    assert gap.getcolors() == [(gap.width * gap.height, PAPER)]


def test_text_is_wrapped_and_what_is_too_long_is_cut() -> None:
    font = ImageFont.load_default(14)
    width = int(font.getlength("aaaa bbbb "))
    assert _wrap_text("aaaa bbbb cc", font, width) == ["aaaa bbbb", "cc"]
    lines = _wrap_text("aaaa " * 999, font, width)
    assert (len(lines), lines[-1]) == (MAX_LINES, "...")
    assert len(_wrap_text("bbbb aaaa " * MAX_LINES, font, width)) == MAX_LINES
    assert "..." not in _wrap_text("bbbb aaaa " * MAX_LINES, font, width)


def test_accents_go_and_other_characters_are_escaped() -> None:
    assert _to_ascii("Füße é 中") == "Fu\\xdfe e \\u4e2d"


def test_impossible_overlays_are_refused(model: LLaVA) -> None:
    with pytest.raises(ValueError, match="no image"):
        overlay(run(model, [], "fastv:k=2,r=0.5"), make_image(0))
    result = run(model, [make_image(0), make_image(1)], "")
    with pytest.raises(ValueError, match="2 images, not 1"):
        overlay(result, make_image(0))
    with pytest.raises(ValueError, match="sample=1"):
        overlay(result, [make_image(0), make_image(1)], sample=1)
