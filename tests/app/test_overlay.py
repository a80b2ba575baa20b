"""Overlays: what is drawn is what the report says, at its place, and every word can be read."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from drawings import SVG, check_layout, panels_of
from PIL import Image, ImageChops

from minillava import Batch
from minillava.app import panels
from minillava.app.canvas import Box, Drawing, Line, Picture, Text, font, to_ascii, wrap_text
from minillava.app.fate import count_layers, count_tokens, list_fates
from minillava.app.frame import CELL, OUTSIDE, PALE, hatch, make_frame
from minillava.app.overlay import MARGIN, PAGE, draw_overlay, overlay
from minillava.app.panels import EDGE, HUES, find_cut, find_edges
from minillava.config import VisionConfig
from minillava.generate import Result, generate
from minillava.llava import LLaVA
from minillava.processing.image import ImageConfig, preprocess
from minillava.pruning import METHODS, Plan, parse_plan
from minillava.pruning.base import Context, Keep, Method
from minillava.pruning.fastv import FastV

SIZE, GRID = 56, 4  # image size and patches per side of the model in conftest
N = GRID**2
START = 2  # of the first image in the prompt


def make_image(n: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """A random image that is dark everywhere, so that what is washed out can be found."""
    noise = torch.randint(0, 90, (*size[::-1], 3), generator=torch.manual_seed(n))
    return Image.frombytes("RGB", size, bytes(noise.flatten().tolist()))


def run(
    model: LLaVA,
    images: Sequence[Image.Image],
    plan: str | Plan,
    aspect: str = "crop",
    n: int = 2,
    **options: Any,
) -> Result:
    ids = [1, 4] + [tiny.IMAGE] * N * len(images) + [5, 6]
    pixels = [preprocess(p, ImageConfig(SIZE, SIZE), aspect) for p in images]
    batch = Batch(
        torch.tensor([ids]),
        torch.ones(1, len(ids), dtype=torch.bool),
        torch.stack(pixels) if pixels else None,
    )
    parsed = parse_plan(plan) if isinstance(plan, str) else plan
    return generate(model, batch, parsed, max_new_tokens=n, **options)


def patches(positions: Sequence[int], image: int = 0) -> set[int]:
    start = START + image * N
    return {p - start for p in positions if start <= p < start + N}


# ---------------------------------------------------------------- what the report says


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_lives_add_up_to_the_tokens_that_enter_layers(model: LLaVA, name: str, mode: str) -> None:
    if mode == "mask" and not METHODS[name].drops_only:
        return
    more = ["mode=mask", "until=4"] if mode == "mask" else []
    if name in tiny.GRIDS:
        pytest.skip("needs another grid")
    result = run(model, [make_image(0), make_image(1)], tiny.example(name, *more))
    lives = [count_layers(result, 0, image) for image in (0, 1)]
    for layer, (entering,) in enumerate(result.report.image_tokens_entering):
        before = [kept for kept in result.report.kept if kept.layer <= layer]
        extra = before[-1].extra[0] if before else 0
        assert sum(n > layer for part in lives for n in part) == entering - extra


def test_a_mask_that_ends_gives_patches_back(model: LLaVA) -> None:
    """Hidden in layer 0 and 1 of 4; and never in the second half."""
    result = run(model, [make_image(0)], "uniform:keep=4,mode=mask,until=2")
    lives = count_layers(result, 0, 0)
    kept = patches(result.report.kept[0].positions[0])
    assert lives == [4 if p in kept else 2 for p in range(N)]


PLANS = [
    "fastv:k=2,r=0.5",
    "uniform:keep=9+fastv:layer=1,keep=3",
    "pyramiddrop:layers=1/2/3,ratios=0.5/0.25/0.125",
    "visionzip:dominant=5,contextual=3",
    "sparsevlm:layers=1/2,keep=8/4",
    "divprune:keep=5",
    "tome:keep=6",
    "simignore:keep=6,mode=mask",
    "fastv:layer=1,keep=0",
    "hand:patches=0/5-7",
    "text-only",
]


@pytest.mark.parametrize("plan", PLANS)
def test_the_svg_shows_the_sets_of_the_report(model: LLaVA, plan: str) -> None:
    result = run(model, [make_image(0)], plan)
    shown = panels_of(draw_overlay(result, make_image(0)))
    lives = count_layers(result, 0, 0)
    assert {p: int(d["level"]) for p, d in shown[0]["level"].items()} == dict(enumerate(lives))
    left = set(range(N))
    rest = iter(shown[1:])
    for step in result.report.kept:
        kept, among = patches(step.positions[0]), left
        if step.merged_into[0] or step.extra[0]:
            choice = next(rest)
            assert choice.get("kept", {}).keys() == kept
            into = dict(zip(step.candidates[0], step.merged_into[0], strict=False))
            merged = {p: d["into"] for p, d in choice.get("merged", {}).items()}
            expected = {i - START: to for i, to in into.items() if to >= 0 and i - START in among}
            assert merged == {
                p: str(to - START if to < START + N else to) for p, to in expected.items()
            }
        if step.scores[0]:
            scores = next(rest)
            assert scores.get("kept", {}).keys() == kept
            assert scores.get("dropped", {}).keys() == among - kept
            assert scores.get("absent", {}).keys() == set(range(N)) - among
        left = kept
    assert not list(rest)


@pytest.mark.parametrize("plan", ["fastv:k=2,r=0.5", "divprune:keep=5"])
def test_the_png_shows_kept_patches_as_they_are_and_washes_out_others(
    model: LLaVA, plan: str
) -> None:
    image = make_image(0)
    result = run(model, [image], plan)
    kept = patches(result.report.kept[0].positions[0])
    drawing = draw_overlay(result, image)
    page, frame = drawing.image(), frame_of(image, "crop")
    first = next(shape for shape in drawing.shapes if isinstance(shape, Picture))
    assert first.x == MARGIN
    for p in range(N):
        x, y = (v + 20 for v in frame.place(p))
        seen = page.getpixel((int(first.x) + x, int(first.y) + y))
        assert (seen == first.image.getpixel((x, y))) == (p in kept)


def test_several_images_have_rows_of_their_own(model: LLaVA) -> None:
    images = [make_image(0), make_image(1), make_image(2)]
    result = run(model, images, "fastv:layer=1,keep=7,scope=all")
    shown = panels_of(draw_overlay(result, images))
    for image in range(3):
        kept = patches(result.report.kept[0].positions[0], image)
        levels, scores = shown[2 * image], shown[2 * image + 1]
        assert {p for p, d in levels["level"].items() if d["level"] == "4"} == kept
        assert scores.get("kept", {}).keys() == kept
    assert sum(len(patches(result.report.kept[0].positions[0], i)) for i in range(3)) == 7


def test_a_sample_of_a_batch(model: LLaVA) -> None:
    batch = tiny.make_batch(model, "tttt", "ttItt", "tItt")
    result = generate(model, batch, parse_plan("fastv:k=2,keep=3"), 2)
    for sample, start in ((1, 2), (2, 1)):
        shown = panels_of(draw_overlay(result, make_image(0), sample=sample))
        kept = {p - start for p in result.report.kept[0].positions[sample]}
        assert shown[1]["kept"].keys() == kept
    with pytest.raises(ValueError, match="prompt 0 has no image"):
        overlay(result, make_image(0), sample=0)


@pytest.mark.parametrize("options", [{"use_cache": True}, {"use_cache": False}])
def test_choices_made_again_are_counted(model: LLaVA, options: dict[str, Any]) -> None:
    mode = ",mode=mask" if options["use_cache"] else ""
    result = run(model, [make_image(0)], f"uniform:keep=12+fastv:k=2,keep=4{mode}", n=6, **options)
    found = count_tokens(result, 0, 0)
    step, tokens = found[-1]
    assert (step.rule, len(tokens)) == ("fastv", 6)
    again = [token[-1].positions[0] for token in result.report.chosen_again]
    assert tokens == [patches(positions) for positions in again]
    assert tokens[0] == patches(result.report.kept[1].positions[0])
    shown = panels_of(draw_overlay(result, make_image(0)))[-1]
    times = Counter(p for token in tokens for p in token)
    assert {p: int(d["level"]) for p, d in shown["level"].items()} == {
        p: times[p] for p in range(N)
    }


# ---------------------------------------------------------------- order, merges, scores


def numbers_in(drawing: Drawing, panel: int, frame: Any) -> dict[int, str]:
    """The text in the middle of each patch of a panel."""
    shapes = drawing.shapes
    starts = [i for i, shape in enumerate(shapes) if isinstance(shape, Picture)]
    part = shapes[starts[panel] : [*starts, len(shapes)][panel + 1]]
    picture = part[0]
    assert isinstance(picture, Picture)
    found = {}
    for shape in part:
        if isinstance(shape, Text) and shape.at == "middle" and shape.halo:
            x, y = shape.x - picture.x - frame.x, shape.y - picture.y - frame.y
            found[int(y // frame.cell) * GRID + int(x // frame.cell)] = shape.text
    return found


def test_picks_are_numbered_in_their_order(model: LLaVA) -> None:
    image = make_image(0)
    result = run(model, [image], "divprune:keep=6")
    frame = frame_of(image, "crop")
    found = numbers_in(draw_overlay(result, image), 1, frame)
    order = [i - START for i in result.report.kept[0].order[0]]
    assert found == {p: str(n) for n, p in enumerate(order, 1)}


def test_a_target_that_was_picked_has_one_number(model: LLaVA) -> None:
    image = make_image(0)
    result = run(model, [image], "vlmpruner:layer=2,keep=6")
    (fate,) = list_fates(result, 0, 0)
    assert set(fate.into.values()) & set(fate.picks)
    drawing = draw_overlay(result, image)
    check_layout(drawing)
    found = numbers_in(drawing, 1, frame_of(image, "crop"))
    merged = {p: str(fate.picks[row]) for p, row in fate.into.items()}
    assert found == {p: str(n) for p, n in fate.picks.items()} | merged


def test_a_choice_of_unknown_margin_says_so(model: LLaVA) -> None:
    image, said = make_image(0), []
    for plan in ("flowcut:keep=6", "fastv:k=2,keep=6", "fastv:k=2,keep=16"):
        shapes = draw_overlay(run(model, [image], plan), image).shapes
        said.append(" ".join(shape.text for shape in shapes if isinstance(shape, Text)))
    assert ["closest decision: not known" in words for words in said] == [True, False, False]


def test_picks_and_margin_of_two_images(model: LLaVA) -> None:
    """Each image has its own, unless the choice was one of both."""
    images = [make_image(0), make_image(1)]
    result = run(model, images, "divprune:keep=6")
    fates = [list_fates(result, 0, i)[0] for i in range(2)]
    assert [sorted(fate.picks.values()) for fate in fates] == [[*range(1, 7)]] * 2
    shapes = draw_overlay(result, images).shapes
    said = " ".join(shape.text for shape in shapes if isinstance(shape, Text))
    margins = [low - high for high, low in (find_edges(fate) or (0, 0) for fate in fates)]
    assert min(margins) == pytest.approx(result.report.kept[0].margin[0])
    assert margins[0] != margins[1]
    assert said.count("closest decision of all") == 2
    for margin in margins:
        assert f"first dropped: {margin:.3g}" in said
    together = run(model, images, "divprune:keep=6,scope=all")
    picks = [list_fates(together, 0, i)[0].picks.values() for i in range(2)]
    assert sorted([*picks[0], *picks[1]]) == [*range(1, 7)]


def test_merged_patches_have_number_and_hue_of_their_target(model: LLaVA) -> None:
    image = make_image(0)
    result = run(model, [image], "visionzip:dominant=5,contextual=3")
    (fate,) = list_fates(result, 0, 0)
    drawing = draw_overlay(result, image)
    frame = frame_of(image, "crop")
    found = numbers_in(drawing, 1, frame)
    targets = sorted(set(fate.into.values()))
    assert len(targets) > 1
    assert found == {p: str(1 + targets.index(fate.into.get(p, p))) for p in (*fate.into, *targets)}
    fills = {
        int(str(s.tags["data-patch"])): s.fill
        for s in drawing.shapes
        if isinstance(s, Box) and s.tags.get("class") == "merged"
    }
    assert fills == {p: HUES[targets.index(row)] for p, row in fate.into.items()}


def test_rows_without_a_patch_are_chips(model: LLaVA) -> None:
    words = texts_of(run(model, [make_image(0)], "visionzip:dominant=5,contextual=3"))
    assert "rows without a patch: 1" in words
    result = run(model, [make_image(0)], "sparsevlm:layers=1,keep=4")
    (step,) = result.report.kept
    into = Counter(to for to in step.merged_into[0] if to >= START + N)
    assert sum(into.values()) == 4  # int(0.3 * 12) + 1
    for n, (_, count) in enumerate(sorted(into.items()), 1):
        assert f"{n}: added row, {count} patches" in texts_of(result)


def test_the_cut_is_between_the_last_kept_and_the_first_dropped(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "fastervlm:keep=5")
    (fate,), (step,) = list_fates(result, 0, 0), result.report.kept
    kept = min(s for p, s in fate.scores.items() if p in fate.kept)
    dropped = max(s for p, s in fate.scores.items() if p not in fate.kept)
    assert dropped < find_cut(fate) < kept
    assert step.margin[0] == pytest.approx(kept - dropped)
    everything = run(model, [make_image(0)], "fastervlm:keep=1.0")
    assert find_cut(list_fates(everything, 0, 0)[0]) is None
    draw_overlay(everything, make_image(0))


def test_bars_count_the_candidates_and_those_that_were_kept(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "fastervlm:keep=5")
    shapes = draw_overlay(result, make_image(0)).shapes
    bars = [s for s in shapes if isinstance(s, Box) and s.edge == panels.FAINT and not s.tags]
    solid = [s for s in shapes if isinstance(s, Box) and s.fill == panels.INK]
    unit = panels.BARS / max(round(16 * s.h) for s in bars) * 16
    highest = max(s.h for s in bars)
    counts = [s.h / highest for s in bars if s.fill == panels.WHITE]
    assert unit
    most = round(16 / sum(counts))  # patches of the highest bar
    assert sum(round(c * most) for c in counts) == N
    assert sum(round(s.h / highest * most) for s in solid) == 5


def test_equal_scores_and_scores_over_many_magnitudes_are_drawn(model: LLaVA) -> None:
    @dataclass(frozen=True)
    class Given(Method):
        power: int = 0
        drops_only = True

        def stages(self) -> Any:
            return (("embed", 0),)

        def choose(self, c: Context) -> Keep:
            scores = 10.0 ** (self.power * torch.arange(16.0))
            return Keep(torch.tensor([15, 14, 3]), scores=scores)

    for power in (0, 2, -2):
        result = run(model, [make_image(0)], Plan((Given(power=power),)))
        drawing = draw_overlay(result, make_image(0))
        assert panels_of(drawing)[1]["kept"].keys() == {3, 14, 15}
        check_layout(drawing)


# ---------------------------------------------------------------- geometry


def frame_of(image: Image.Image, aspect: str, outside: float = OUTSIDE) -> Any:
    vision = VisionConfig(image_size=SIZE, patch_size=SIZE // GRID)
    return make_frame(image, vision, ImageConfig(SIZE, SIZE), aspect, outside)


def test_a_padded_picture_keeps_its_aspect_and_its_letterbox_is_hatched() -> None:
    frame = frame_of(make_image(0, (96, 48)), "pad")
    side = GRID * frame.cell
    assert (frame.width, frame.height, frame.x, frame.y) == (side, side, 0, 0)
    (picture,) = (s for s in frame.shapes if isinstance(s, Picture))
    assert (picture.x, picture.y, *picture.image.size) == (0, side // 4, side, side // 2)
    strokes = [s for s in frame.shapes if isinstance(s, Line)]
    assert strokes == hatch(0, 0, side, side)
    assert frame.shapes.index(picture) > frame.shapes.index(strokes[-1])


def test_a_cropped_picture_goes_on_outside_of_the_square() -> None:
    frame = frame_of(make_image(0, (72, 48)), "crop")
    side = GRID * frame.cell
    assert (frame.width, frame.height, frame.x, frame.y) == (side * 1.5, side, side / 4, 0)
    washed = [s for s in frame.shapes if isinstance(s, Box) and s.fill == PALE]
    assert {(s.x, s.w) for s in washed} == {(0, side / 4), (side * 1.25, side / 4)}
    outline = next(s for s in frame.shapes if isinstance(s, Box) and s.edge and not s.fill)
    assert (outline.x + 2, outline.w - 4) == (frame.x, side)
    square = frame_of(make_image(0, (72, 48)), "crop", outside=0.0)
    assert (square.width, square.x) == (side, 0)


def test_what_lies_in_a_patch_is_what_the_model_received() -> None:
    """Each patch has its own colour, at three sizes, cropped and padded."""
    for width, height in ((56, 56), (140, 56), (56, 112)):
        for aspect in ("crop", "pad"):
            image = Image.new("RGB", (width, height))
            for x in range(0, width, 14):
                for y in range(0, height, 14):
                    image.paste((x * 255 // width, y * 255 // height, 99), (x, y, x + 14, y + 14))
            pixels = preprocess(image, ImageConfig(SIZE, SIZE), aspect)
            c = ImageConfig(SIZE, SIZE)
            mean, std = (torch.tensor(v)[:, None, None] for v in (c.mean, c.std))
            levels = (pixels * std + mean) * 255  # (3, S, S)
            frame = frame_of(image, aspect)
            page = Drawing(frame.width, frame.height, frame.shapes, "", "", {}).image()
            for p in range(N):
                x, y = frame.place(p)
                seen = page.getpixel((x + frame.cell // 2, y + frame.cell // 2))
                at = levels[:, p // GRID * 14 + 7, p % GRID * 14 + 7]
                if aspect == "pad" and seen[2] != 99:
                    continue  # a stroke in the letterbox
                assert max(abs(a - b) for a, b in zip(seen, at.tolist(), strict=True)) < 40


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (3, 2), (700, 900)])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_pictures_of_any_shape_give_panels_of_bounded_size(
    size: tuple[int, int], aspect: str
) -> None:
    frame = frame_of(make_image(0, size), aspect)
    side = GRID * frame.cell
    assert side <= frame.width <= 2 * side
    assert side <= frame.height <= 2 * side
    assert 0 <= frame.x <= frame.width - side
    assert 0 <= frame.y <= frame.height - side


def test_transparent_and_grey_pictures(model: LLaVA) -> None:
    for mode in ("L", "LA", "P", "RGBA", "1", "CMYK"):
        image = make_image(0).convert(mode)
        result = run(model, [image], "uniform:keep=4")
        assert overlay(result, image).mode == "RGB"


def test_patches_are_large_enough_for_a_number() -> None:
    for grid in (1, 4, 8, 24, 37):
        vision = VisionConfig(image_size=grid * 14)
        frame = make_frame(make_image(0), vision, ImageConfig(grid * 14, grid * 14), "crop")
        assert frame.cell >= CELL
        for text in ("1", "99", str(grid * grid)):
            shape = panels.number(frame, grid * grid - 1, text)
            assert font(shape.size).getlength(text) <= frame.cell
            assert shape.size >= 8


# ---------------------------------------------------------------- words


def texts_of(result: Result, **options: Any) -> list[str]:
    drawing = draw_overlay(result, make_image(0), **options)
    return [shape.text for shape in drawing.shapes if isinstance(shape, Text)]


@pytest.mark.parametrize("plan", [*PLANS, ""])
@pytest.mark.parametrize("size", [(56, 56), (200, 60), (60, 200)])
def test_no_text_overlaps_or_leaves_the_page(
    model: LLaVA, plan: str, size: tuple[int, int]
) -> None:
    image = make_image(0, size)
    result = run(model, [image], plan)
    drawing = draw_overlay(result, image, question="Where is it? " * 40, text="w" * 900)
    check_layout(drawing)
    assert drawing.width <= max(PAGE, 2 * 336 + 2 * MARGIN)


def test_the_caption_names_all_that_the_run_was(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "uniform:keep=9+fastv:layer=1,keep=3")
    words = texts_of(result, question="What is it?", text="red")
    report = result.report
    assert "question: What is it?" in words
    assert "answer: red" in words
    assert "plan: uniform:keep=9+fastv:layer=1,keep=3" in words
    entering = "tokens: 20 in the prompt; layer 0: 13 (9 of images), layers 1-3: 7 (3 of images)"
    assert entering in " ".join(words)
    assert f"first token after {report.first_token:.3g} s" in " ".join(words)
    assert f"uniform {report.kept[0].digest[0][:12]}" in " ".join(words)
    bare = texts_of(replace(result, texts=["blue"]))
    assert not any(word.startswith("question") for word in bare)
    assert "answer: blue" in bare
    assert f"answer: tokens {result.tokens[0]}" in texts_of(replace(result, texts=None))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("", "plan: none"),
        ("fastv:k=2,average=12", "plan: fastv:k=2,average=12 = fastv:layer=2,keep=8"),
        (Plan((FastV(layer=1, keep=5),)), "plan: fastv:layer=1,keep=5"),
        (Plan((FastV(layer=1, keep=0.25, mode="mask"),)), "fastv:layer=1,keep=0.25,mode=mask"),
    ],
)
def test_the_plan_is_written_as_it_was_solved(model: LLaVA, plan: Any, said: str) -> None:
    assert any(said in line for line in texts_of(run(model, [make_image(0)], plan)))


def test_steps_beyond_the_first_few_are_drawn_on_request(model: LLaVA) -> None:
    plan = "+".join(
        f"fastv:layer={layer},keep={20 - n}" for n, layer in enumerate((1, 1, 2, 2, 3, 3), 6)
    )
    result = run(model, [make_image(0)], plan)
    few, every = (panels_of(draw_overlay(result, make_image(0), every_step=e)) for e in (0, 1))
    assert (len(few), len(every)) == (1 + 4, 1 + 6)
    assert few[0] == every[0]
    assert any("and 2 more steps" in line for line in texts_of(result))


def test_any_text_can_be_drawn(model: LLaVA, tmp_path: Path) -> None:
    result = run(model, [make_image(0)], "uniform:keep=4")
    odd = ["", "Füße 中文 \N{GRINNING FACE}", "\ud83d \x00 \x1b[31m", "<b>&amp;\"'</b>", "w" * 5000]
    for text in odd:
        drawing = draw_overlay(result, make_image(0), text=text, question=text, about={"x": text})
        check_layout(drawing)
        assert ElementTree.fromstring(drawing.svg()).tag == f"{SVG}svg"
        for kind in ("png", "svg"):
            drawing.save(tmp_path / f"a.{kind}", kind)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.size == (drawing.width, drawing.height)


def test_text_is_wrapped_and_what_is_too_long_is_cut_visibly() -> None:
    width = font(15).getlength("aaaa bbbb ")
    assert wrap_text("aaaa bbbb cc", width) == ["aaaa bbbb", "cc"]
    lines = wrap_text("aaaa " * 999, width, most=3)
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert all(font(15).getlength(line) <= width for line in lines)
    assert wrap_text("aaaa bbbb " * 3, width, most=3) == ["aaaa bbbb"] * 3
    assert "".join(wrap_text("w" * 50, width)) == "w" * 50


def test_accents_go_and_other_characters_are_escaped() -> None:
    assert to_ascii("Füße é 中") == "Fu\\xdfe e \\u4e2d"


# ---------------------------------------------------------------- files


def test_files_say_what_they_show_and_where_it_comes_from(model: LLaVA, tmp_path: Path) -> None:
    result = run(model, [make_image(0)], "fastv:k=2,keep=5")
    about = {"Command": "python -m x --prompt 'Füße?'", "Seed": "7"}
    drawing = draw_overlay(result, make_image(0), question="Füße?", text="yes", about=about)
    drawing.save(tmp_path / "a.png", "png")
    drawing.save(tmp_path / "a.svg", "svg")
    with Image.open(tmp_path / "a.png") as image:
        texts = image.text
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    told = json.loads(root.findtext(f"{SVG}metadata") or "")
    digest = f"fastv {result.report.kept[0].digest[0]}"
    for found in (texts, told):
        expected = {**about, "Question": "Füße?", "Answer": "yes", "Digest": digest}
        assert expected.items() <= found.items()
        assert found["Plan"] == "fastv:k=2,keep=5"
    said = "Image 1: of 16 patches, 5 live all of 4 layers, 11 live 2 of 4 layers."
    for description in (texts["Description"], root.findtext(f"{SVG}desc") or ""):
        assert said in description
        assert "leaves 5 patches" in description
        assert "Füße?" in description
    assert (
        texts["Title"]
        == root.findtext(f"{SVG}title")
        == "Patches left by the plan fastv:k=2,keep=5"
    )
    assert root.get("role") == "img"
    names = (root.get("aria-labelledby") or "").split()
    assert names == [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")]


def test_one_run_gives_one_file(model: LLaVA) -> None:
    result = run(model, [make_image(0)], "fastv:k=2,keep=5")
    first, second = (draw_overlay(result, make_image(0)) for _ in range(2))
    assert first.svg() == second.svg()
    assert ImageChops.difference(first.image(), second.image()).getbbox() is None


def test_an_svg_holds_each_picture_once_and_nothing_from_elsewhere(model: LLaVA) -> None:
    plan = "pyramiddrop:layers=1/2/3,ratios=0.5/0.25/0.125"
    text = draw_overlay(run(model, [make_image(0)], plan), make_image(0)).svg()
    assert text.count("<image ") == 2  # with colours and without
    assert text.count("<use ") == 4
    sources = re.findall(r'href="([^"]{5})', text)
    assert {s for s in sources if not s.startswith("#")} == {"data:"}


def test_png_and_svg_are_drawn_from_the_same_shapes() -> None:
    """One of each shape: every pixel of the PNG that is not paper lies in a shape of the SVG."""
    shapes = [
        Box(2, 3, 10, 8, (255, 0, 0), 0.5, (0, 0, 0), 2, {"class": "a"}, "hint"),
        Line(20, 5, 30, 5, (0, 0, 255), 3, 0.5),
        Text(40, 2, "ab", 15, (1, 2, 3), "middle", (255, 255, 255)),
        Picture(60, 1, Image.new("RGB", (8, 9), (9, 99, 9))),
    ]
    drawing = Drawing(80, 20, shapes, "t", "d", {})
    page = drawing.image()
    assert page.getpixel((6, 6)) == (255, 127, 127)
    assert page.getpixel((2, 3)) == page.getpixel((11, 10)) == (0, 0, 0)
    assert page.getpixel((25, 5)) == (127, 127, 255)
    assert page.getpixel((63, 4)) == (9, 99, 9)
    root = ElementTree.fromstring(drawing.svg())
    box = root.find(f"{SVG}rect[@class='a']")
    assert (box.get("x"), box.get("width"), box.get("stroke-width")) == ("3", "8", "2")
    assert (box.get("fill"), box.get("fill-opacity")) == ("#ff0000", "0.5")
    assert box.findtext(f"{SVG}title") == "hint"
    text = root.find(f"{SVG}text")
    assert (text.text, text.get("text-anchor")) == ("ab", "middle")
    assert float(text.get("textLength")) == pytest.approx(font(15).getlength("ab"), rel=1e-3)
    assert root.find(f"{SVG}use").get("x") == "60"


def test_ramps_go_from_dark_to_light_and_no_two_hues_in_turn_are_alike() -> None:
    def grey(color: Sequence[int]) -> float:
        r, g, b = color
        return 0.299 * r + 0.587 * g + 0.114 * b

    heat = [grey(panels.shade(panels.HEAT, x / 20)) for x in range(21)]
    lives = [grey(panels.shade(panels.LIVES, x / 20)) for x in range(21)]
    assert heat == sorted(heat)
    assert lives == sorted(lives, reverse=True)
    assert heat[-1] - heat[0] > 150
    for a, b in zip(HUES, [*HUES[1:], HUES[0]], strict=True):
        assert math.dist(a, b) > 100
    assert grey(EDGE) - grey(panels.INK) > 120  # an outline is light on dark


def test_impossible_overlays_are_refused(model: LLaVA) -> None:
    with pytest.raises(ValueError, match="no image"):
        overlay(run(model, [], "fastv:k=2,r=0.5"), make_image(0))
    result = run(model, [make_image(0), make_image(1)], "")
    with pytest.raises(ValueError, match="2 images, not 1"):
        overlay(result, make_image(0))
    with pytest.raises(ValueError, match="sample=1"):
        overlay(result, [make_image(0), make_image(1)], sample=1)
    with pytest.raises(ValueError, match="image_aspect='stretch'"):
        overlay(result, [make_image(0), make_image(1)], aspect="stretch")
    with pytest.raises(ValueError, match="0 x 5"):
        overlay(result, [Image.new("RGB", (0, 5)), make_image(1)])


def test_the_aspect_is_the_checkpoints_unless_it_is_given(model: LLaVA) -> None:
    wide = make_image(0, (3 * SIZE, SIZE))
    result = run(model, [wide], "")
    whole, padded = (draw_overlay(result, wide, aspect=a) for a in (None, "pad"))
    assert whole.width > padded.width
    made_for = replace(result, config=replace(result.config, image_aspect="pad"))
    assert draw_overlay(made_for, wide).width == padded.width


def test_the_image_has_its_texts_with_it(model: LLaVA) -> None:
    page = overlay(run(model, [make_image(0)], "uniform:keep=4"), make_image(0), question="Q?")
    assert page.info["Question"] == "Q?"
    assert "4 live all of 4 layers" in page.info["Description"]
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
