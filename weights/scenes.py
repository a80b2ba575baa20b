"""Images with questions and known answers: coloured shapes and handwritten digits.

A scene is a 168 x 168 image of two to five things on a noisy canvas of one of four tones, at most
one in each cell of a 3 x 3 grid. Big things cover about ten patches of 14 x 14 pixels; small ones,
six of ten shapes, cover one or two, so that a question about them needs detail. A question about
the background needs none. A question is text with exactly one right answer for its scene. The
digits are real handwriting from scikit-learn's `load_digits`; the "train" split never contains an
image of the "held-out" split. Everything is a pure function of the random generator passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Split = Literal["train", "held-out"]
T = TypeVar("T")

SIZE = 168
SMALL = 0.6  # probability that a shape is small
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (40, 175, 50),
    "blue": (50, 80, 235),
    "yellow": (240, 225, 40),
    "orange": (245, 135, 15),
    "purple": (150, 45, 190),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (50, 50, 50),
    "brown": (85, 48, 18),
    "navy": (18, 26, 88),
    "teal": (8, 74, 68),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
DIGITS = tuple("0123456789")
PLACES = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)  # row by row
LETTERS = "ABCD"
CHOICE_TAIL = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    name: str  # a digit or a shape
    colour: str
    place: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    ground: str  # the background of its scene
    digit_index: int = -1  # index in load_digits, -1 for a shape

    @property
    def is_digit(self) -> bool:
        return self.name in DIGITS

    @property
    def is_small(self) -> bool:
        return self.box[2] - self.box[0] < 28


@dataclass(frozen=True)
class Scene:
    """An image and its things, in reading order."""

    image: Image.Image
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Example:
    """A question about a scene, without a prompt template, and its only right answer."""

    kind: str
    question: str
    answer: str
    about: tuple[str, ...]  # names of the things that the answer depends on


def make_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Make a random scene with digits of the split."""
    things = make_things(rng, split)
    return Scene(draw(things, rng), things)


def make_things(rng: np.random.Generator, split: Split) -> tuple[Thing, ...]:
    """Choose 2 to 5 things with different names, in reading order; nothing is drawn."""
    count = int(rng.integers(2, 6))
    n_digits = int(rng.integers(0, count + 1))
    names = [*rng.choice(DIGITS, n_digits, replace=False)]
    names += [*rng.choice(SHAPES, count - n_digits, replace=False)]
    small = [name not in DIGITS and rng.random() < SMALL for name in names]
    boxes = _boxes(rng, small)
    ground = str(rng.choice(list(GROUNDS)))
    colours: list[str] = []
    for _ in names:  # colours are sometimes repeated, so that counting them is not trivial
        again = colours and rng.random() < 0.3
        colours.append(str(rng.choice(colours if again else list(COLOURS))))
    things = []
    for name, colour, (cell, box) in zip(names, colours, boxes.items(), strict=True):
        index = int(rng.choice(_digit_rows(split)[str(name)])) if name in DIGITS else -1
        things.append(Thing(str(name), colour, PLACES[cell], box, ground, index))
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def draw(things: Sequence[Thing], rng: np.random.Generator) -> Image.Image:
    """Draw things on a dim, uneven, noisy canvas: a 168 x 168 RGB image."""
    y, x = _grid()
    tint = np.asarray(GROUNDS[things[0].ground]) * rng.uniform(0.6, 1.1) + rng.uniform(-6, 6, 3)
    slope = rng.uniform(-25, 25, 2).astype(np.float32)
    canvas = tint.astype(np.float32) + (slope[0] * x + slope[1] * y)[..., None]  # (S, S, 3)
    for thing in things:
        left, top, right, bottom = (round(edge) for edge in thing.box)
        side = max(right - left, bottom - top)
        mask = _digit_mask(thing, side, rng) if thing.is_digit else _shape_mask(thing, side, rng)
        alpha = mask[: bottom - top, : right - left, None]
        ink = np.asarray(COLOURS[thing.colour]) + rng.uniform(-15, 15, 3)
        region = canvas[top:bottom, left:right]
        region += alpha * (ink.astype(np.float32) - region)
    canvas += rng.uniform(3, 10) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def questions(
    things: Sequence[Thing], rng: np.random.Generator, kinds: Sequence[str]
) -> list[Example]:
    """One example of each kind in `kinds`, without those that are ambiguous in this scene."""
    found = (KINDS[kind](things, rng) for kind in kinds)
    return [example for example in found if example]


def held_out(
    seed: int, n: int, kinds: Sequence[str] | None = None
) -> Iterator[tuple[Scene, Example]]:
    """Yield n questions, each about a new scene with held-out digits, cycling through `kinds`."""
    kinds = tuple(kinds or KINDS)
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        found: list[Example] = []
        while not found:
            things = make_things(rng, "held-out")
            found = questions(things, rng, [kinds[i % len(kinds)]])
        yield Scene(draw(things, rng), things), found[0]


# The questions. Each function returns None if every question of its kind is ambiguous.


def _which(things: Sequence[Thing], rng: np.random.Generator, digits: bool) -> Example | None:
    candidates = [t for t in things if t.is_digit == digits]
    unique = [t for t in candidates if sum(t.colour == u.colour for u in candidates) == 1]
    if not unique:
        return None
    thing, word = _pick(rng, unique), _pick(rng, ("Which", "What"))
    what = "digit" if digits else "shape"
    return Example(what, f"{word} {what} is {thing.colour}?", thing.name, (thing.name,))


def _digit(things: Sequence[Thing], rng: np.random.Generator) -> Example | None:
    return _which(things, rng, digits=True)


def _shape(things: Sequence[Thing], rng: np.random.Generator) -> Example | None:
    return _which(things, rng, digits=False)


def _colour(things: Sequence[Thing], rng: np.random.Generator) -> Example:
    thing, word = _pick(rng, things), _pick(rng, ("colour", "color"))
    return Example("colour", f"What {word} is the {thing.name}?", thing.colour, (thing.name,))


def _what(things: Sequence[Thing], rng: np.random.Generator) -> Example:
    if rng.random() < 0.12:
        place = _pick(rng, [p for p in PLACES if all(t.place != p for t in things)])
        return Example("what", f"What is at the {place}?", "nothing", ())
    thing = _pick(rng, things)
    answer = f"{thing.colour} {thing.name}"
    return Example("what", f"What is at the {thing.place}?", answer, (thing.name,))


def _where(things: Sequence[Thing], rng: np.random.Generator) -> Example:
    thing = _pick(rng, things)
    by_colour = sum(t.colour == thing.colour for t in things) == 1 and rng.random() < 0.5
    what = f"{thing.colour} one" if by_colour else thing.name
    return Example("where", f"Where is the {what}?", thing.place, (thing.name,))


def _count(things: Sequence[Thing], rng: np.random.Generator) -> Example:
    what = _pick(rng, ("objects", "digits", "shapes", "colour"))
    if what == "colour":
        groups = [[t for t in things if t.colour == colour] for colour in COLOURS]
        number = _pick(rng, sorted({len(g) for g in groups}))  # or zero would be the usual answer
        colour = _pick(rng, [c for c, g in zip(COLOURS, groups, strict=True) if len(g) == number])
        counted, what = [t for t in things if t.colour == colour], f"{colour} things"
    else:
        counted = [t for t in things if what == "objects" or t.is_digit == (what == "digits")]
    about = tuple(t.name for t in counted)
    return Example("count", f"How many {what} are there?", str(len(counted)), about)


def _yes_no(things: Sequence[Thing], rng: np.random.Generator) -> Example:
    thing, yes = _pick(rng, things), rng.random() < 0.5
    form = _pick(rng, ("there", "colour", "place"))
    colour, name, place = thing.colour, thing.name, thing.place
    if not yes and form == "place":
        place = _other(rng, place, [t.place for t in things], PLACES)
    elif not yes and (form == "colour" or rng.random() < 0.5):
        colour = _other(rng, colour, [t.colour for t in things], tuple(COLOURS))
    elif not yes:
        names = DIGITS if thing.is_digit else SHAPES
        # another name makes the answer "no", unless a thing of that name has this colour
        taken = [t.name for t in things if t.colour == colour]
        name = _pick(rng, [n for n in names if n not in taken])
    if form == "there":
        article = "an" if colour == "orange" else "a"
        question = f"Is there {article} {colour} {name}?"
    elif form == "colour":
        question = f"Is the {name} {colour}?"
    else:
        question = f"Is the {name} at the {place}?"
    about = tuple(t.name for t in things if t.name == name)
    return Example("yes-no", question, "yes" if yes else "no", about)


def _choice(things: Sequence[Thing], rng: np.random.Generator) -> Example | None:
    form = _pick(rng, ("digit", "shape", "colour", "where", "what"))
    base = KINDS[form](things, rng)
    if base is None or base.answer == "nothing":
        return None
    pools: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "digit": ([t.name for t in things if t.is_digit], DIGITS),
        "shape": ([t.name for t in things if not t.is_digit], SHAPES),
        "colour": ([t.colour for t in things], tuple(COLOURS)),
        "where": ([t.place for t in things], PLACES),
        "what": ([f"{t.colour} {t.name}" for t in things], _ALL_THINGS),
    }
    here, everywhere = pools[form]
    options = [base.answer]
    for _ in range(int(rng.integers(1, 4))):
        options.append(_other(rng, base.answer, here, everywhere, without=options))
    options = [options[i] for i in rng.permutation(len(options))]
    lines = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))
    question = f"{base.question}\nOptions: {lines}\n{CHOICE_TAIL}"
    return Example("choice", question, LETTERS[options.index(base.answer)], base.about)


def _caption(things: Sequence[Thing], rng: np.random.Generator) -> Example:
    question = _pick(rng, ("Describe the picture.", "What is in the picture?"))
    return Example("caption", question, describe(things), tuple(t.name for t in things))


def _ground(things: Sequence[Thing], rng: np.random.Generator) -> Example:
    word = _pick(rng, ("colour", "color"))
    return Example("ground", f"What {word} is the background?", things[0].ground, ())


def describe(things: Sequence[Thing]) -> str:
    """Every thing with its colour and place, in reading order."""
    return ", ".join(f"{t.colour} {t.name} at {t.place}" for t in things)


KINDS: dict[str, Callable[[Sequence[Thing], np.random.Generator], Example | None]] = {
    "digit": _digit,
    "shape": _shape,
    "colour": _colour,
    "what": _what,
    "where": _where,
    "count": _count,
    "yes-no": _yes_no,
    "ground": _ground,
    "choice": _choice,
    "caption": _caption,
}

_ALL_THINGS = tuple(f"{colour} {name}" for colour in COLOURS for name in (*DIGITS, *SHAPES))


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _other(
    rng: np.random.Generator,
    right: str,
    here: Sequence[str],
    everywhere: Sequence[str],
    without: Sequence[str] = (),
) -> str:
    """A wrong answer; with probability 1/2 one that is right for another thing in the image."""
    near = [text for text in here if text != right and text not in without]
    if near and rng.random() < 0.5:
        return _pick(rng, near)
    return _pick(rng, [text for text in everywhere if text != right and text not in without])


# Drawing.


def _boxes(
    rng: np.random.Generator, small: Sequence[bool]
) -> dict[int, tuple[float, float, float, float]]:
    """Cell number -> box, in the order of `small`. Centres stay well inside their cell; boxes do
    not overlap."""
    cell = SIZE / 3
    while True:
        boxes: dict[int, tuple[float, float, float, float]] = {}
        for i, is_small in zip(rng.choice(9, len(small), replace=False), small, strict=True):
            half = rng.uniform(7.5, 9.5) if is_small else rng.uniform(19.0, 25.0)
            x, y = (cell * (k + 0.5) + rng.uniform(-15, 15) for k in (i % 3, i // 3))
            x, y = (min(max(v, half + 1), SIZE - half - 1) for v in (x, y))
            boxes[int(i)] = (x - half, y - half, x + half, y + half)
        if not any(_overlap(a, b) for i, a in boxes.items() for j, b in boxes.items() if i < j):
            return boxes


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@lru_cache
def _grid() -> NDArray[np.float32]:
    """(2, S, S): y and x of each pixel, from -0.5 to 0.5."""
    return (np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5).astype(np.float32)


def _digit_mask(thing: Thing, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(side, side) in 0..1: the 8 x 8 digit, slightly rotated, sheared, scaled and sharpened."""
    turn, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    scale = np.exp(rng.uniform(-0.1, 0.1, 2)) * 9.5 / side  # the 8 pixels and a margin
    cos, sin = math.cos(turn), math.sin(turn)
    a, b = scale[0] * cos, scale[0] * (shear * cos - sin)
    d, e = scale[1] * sin, scale[1] * (shear * sin + cos)
    middle, half = 6.0, side / 2
    affine = (a, b, middle - (a + b) * half, d, e, middle - (d + e) * half)
    small = _digit_images()[thing.digit_index]
    mask = small.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    contrast = rng.uniform(1.2, 2.0)
    values = np.asarray(mask, np.float32) / 255
    inked = ((values - 0.35) * contrast + 0.4).clip(0, 1) * (values > 0.02)
    return inked.astype(np.float32)


def _shape_mask(thing: Thing, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(side, side) in 0..1: a filled shape with smooth edges."""
    big = side * 4
    centre, radius = big / 2, big / 2 * rng.uniform(0.82, 0.98)
    turn = rng.uniform(-0.15, 0.15)
    image = Image.new("L", (big, big))
    pen = ImageDraw.Draw(image)
    if thing.name == "circle":
        pen.ellipse([centre - radius, centre - radius, centre + radius, centre + radius], fill=255)
    else:
        pen.polygon(
            [
                (
                    centre + radius * r * math.sin(angle + turn),
                    centre - radius * r * math.cos(angle + turn),
                )
                for r, angle in _outline(thing.name)
            ],
            fill=255,
        )
    return (np.asarray(image.reduce(4)) / 255).astype(np.float32)


@lru_cache
def _outline(name: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape: (radius, 1 is the shape's size; angle from the top, clockwise)."""
    tau = 2 * math.pi
    if name == "square":
        return tuple((1.1, tau * (k + 0.5) / 4) for k in range(4))
    if name == "diamond":
        return tuple((1.0 if k % 2 == 0 else 0.62, tau * k / 4) for k in range(4))
    if name == "triangle":
        return tuple((1.0, tau * k / 3) for k in range(3))
    if name == "star":
        return tuple((1.0 if k % 2 == 0 else 0.42, tau * k / 10) for k in range(10))
    arm = math.atan2(0.28, 1.0)  # cross: three corners for each arm
    per_arm = ((1.04, -arm), (1.04, arm), (0.28 * math.sqrt(2), tau / 8))
    return tuple((r, tau * k / 4 + angle) for k in range(4) for r, angle in per_arm)


@lru_cache
def _load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    return digits.images, digits.target


@lru_cache
def _digit_images() -> list[Image.Image]:
    """Every handwritten digit as a 12 x 12 grey image, with two empty pixels on each side."""
    padded = np.pad(_load_digits()[0], ((0, 0), (2, 2), (2, 2)))
    return [Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in padded]


@lru_cache
def _digit_rows(split: Split) -> dict[str, list[int]]:
    """Digit -> indices in load_digits of a split; a random fifth of the images is held out."""
    targets = _load_digits()[1]
    held = np.random.default_rng(20).permutation(len(targets)) % 5 == 0
    return {
        digit: [
            int(i)
            for i in np.flatnonzero((targets == int(digit)) & (held == (split == "held-out")))
        ]
        for digit in DIGITS
    }
