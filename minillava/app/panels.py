"""The panels of an overlay: how long patches live, why they stay, what they went into.

Nothing is said by hue alone: what is left has an outline, what is gone is washed out and struck
through, targets and picks have numbers, and ramps go from light to dark.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..report import Kept
from .canvas import Box, Color, Line, Shape, Text, move, text_width, wrap_text
from .fate import Fate
from .frame import INK, PALE, Frame, hatch

EDGE: Color = (255, 165, 0)
WHITE: Color = (255, 255, 255)
FAINT: Color = (90, 90, 90)
SMALL, NORMAL, LINE = 12, 15, 18  # sizes of letters, and of a line of small ones
WASH = 0.82  # how much of a dropped patch is covered
BINS, BARS = 28, 64  # of a histogram: bars, and their height in pixels
MOST_SWATCHES = 8
# from dark to light, even in steps of lightness: cividis (Nunez et al. 2018), and of one blue
HEAT: Sequence[Color] = (
    (0, 34, 78),
    (53, 69, 108),
    (102, 105, 112),
    (148, 142, 119),
    (200, 184, 102),
    (254, 232, 56),
)
LIVES: Sequence[Color] = ((205, 224, 242), (120, 170, 215), (50, 115, 180), (10, 50, 110))
# of eight targets in turn (Okabe and Ito 2008, without black and the orange of outlines)
HUES: Sequence[Color] = (
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
    (213, 94, 0),
    (148, 103, 189),
    (140, 190, 90),
)


Entry = tuple[Sequence[Shape], str]  # of a legend: a swatch of 16 x 14 pixels, and its words


@dataclass(frozen=True)
class Panel:
    """A picture with patches, and what explains it: the lines above, and shapes from 0, 0 on."""

    width: int
    height: int
    title: list[str]
    shapes: list[Shape]
    picture: int = 0  # height of the picture, which comes first
    legend: Sequence[Entry] = ()  # what is below it, if that is swatches with words


def make_panel(
    title: str,
    frame: Frame,
    marks: Iterable[Shape],
    below: tuple[Sequence[Shape], int] = ((), 0),
    legend: Sequence[Entry] = (),
) -> Panel:
    """A frame with the marks on it, and below it a legend, or some shapes and their height."""
    shapes, height = flow(frame.width, legend) if legend else below
    under = [move(shape, 0, frame.height + 8) for shape in shapes]
    lines = wrap_text(title, frame.width, NORMAL, 3)
    height += frame.height + 8
    return Panel(frame.width, height, lines, [*marks, *under], frame.height, legend)


# ---------------------------------------------------------------- marks on patches


def wash_out(frame: Frame, patches: Iterable[int], kind: str, **more: object) -> list[Shape]:
    """Patches that are gone: pale, with a stroke."""
    shapes: list[Shape] = []
    for p in sorted(patches):
        x, y = frame.place(p)
        shapes.append(frame.box(p, fill=PALE, alpha=WASH, tags=tag(kind, p, **more)))
        shapes.append(Line(x, y + frame.cell, x + frame.cell, y, FAINT, 1, 0.55))
    return shapes


def outline(frame: Frame, patches: set[int]) -> list[Shape]:
    """The border of a set of patches, light on dark, so that it is seen on any picture."""
    edges: list[tuple[float, float, float, float]] = []
    g, c = frame.grid, frame.cell
    for p in range(g * g):
        x, y = frame.place(p)
        inside = p in patches
        left = p - 1 in patches if p % g else False
        above = p - g in patches if p >= g else False
        if inside != left:
            edges.append((x, y, x, y + c))
        if inside != above:
            edges.append((x, y, x + c, y))
        if inside and p % g == g - 1:
            edges.append((x + c, y, x + c, y + c))
        if inside and p >= g * (g - 1):
            edges.append((x, y + c, x + c, y + c))
    return [*(Line(*e, INK, 5, 0.85) for e in edges), *(Line(*e, EDGE, 2) for e in edges)]


def lines_of_grid(frame: Frame) -> list[Shape]:
    end, shapes = frame.grid * frame.cell, list[Shape]()
    for n in range(frame.grid + 1):
        at = n * frame.cell
        shapes.append(Line(frame.x + at, frame.y, frame.x + at, frame.y + end, (128,) * 3, 1, 0.4))
        shapes.append(Line(frame.x, frame.y + at, frame.x + end, frame.y + at, (128,) * 3, 1, 0.4))
    return shapes


def number(frame: Frame, patch: int, text: str, color: Color = INK, halo: Color = WHITE) -> Text:
    """A number in the middle of a patch, in letters that fit into it."""
    size = min(15, frame.cell // 2)
    while size > 8 and text_width(text, size) > frame.cell - 4:
        size -= 1
    x, y = frame.place(patch)
    return Text(
        x + frame.cell / 2, y + (frame.cell - size) / 2 - 1, text, size, color, "middle", halo
    )


def tag(kind: str, patch: int, **more: object) -> dict[str, object]:
    return {"class": kind, "data-patch": patch, **{f"data-{k}": v for k, v in more.items()}}


def shade(ramp: Sequence[Color], share: float) -> Color:
    """The colour at 0..1 of a ramp."""
    at = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    low = min(int(at), len(ramp) - 2)
    pairs = zip(ramp[low], ramp[low + 1], strict=True)
    return tuple(round(a + (b - a) * (at - low)) for a, b in pairs)  # type: ignore[return-value]


# ---------------------------------------------------------------- what lives how long


def draw_lives(frame: Frame, title: str, lives: Sequence[int], n_layers: int) -> Panel:
    """How many of the decoder's layers each patch lives through."""
    return _draw_levels(frame, title, lives, n_layers, "layers")


def draw_tokens(frame: Frame, step: Kept, tokens: Sequence[set[int]]) -> Panel:
    """For how many new tokens a step that chooses again for each of them left each patch."""
    times = [sum(p in left for left in tokens) for p in range(frame.grid**2)]
    title = f"{step.rule}, layer {step.layer}, chooses again: for how many tokens a patch is left"
    return _draw_levels(frame, title, times, len(tokens), "tokens")


def _draw_levels(frame: Frame, title: str, levels: Sequence[int], most: int, unit: str) -> Panel:
    """Patches with a number 0..most each: at `most` the picture itself with an outline, at 0 washed
    out, between them a shade."""
    marks = wash_out(frame, (p for p, n in enumerate(levels) if not n), "level", level=0)
    for p, n in enumerate(levels):
        if 0 < n < most:
            fill, look = shade(LIVES, n / most), tag("level", p, level=n)
            marks.append(frame.box(p, fill=fill, alpha=0.8, tags=look, hint=f"{n} {unit}"))
        elif n:
            marks.append(frame.box(p, tags=tag("level", p, level=n)))
    marks += lines_of_grid(frame) + outline(frame, {p for p, n in enumerate(levels) if n == most})
    counts = Counter(levels)
    if len(counts) > MOST_SWATCHES:
        ramp = _draw_ramp(frame.width, most, unit)
        return make_panel(title, frame, [*frame.shapes, *marks], ramp)
    legend = [
        (_swatch(n, most), f"{name_level(n, most, unit)}: {counts[n]}")
        for n in sorted(counts, reverse=True)
    ]
    return make_panel(title, frame, [*frame.shapes, *marks], legend=legend)


def name_level(n: int, most: int, unit: str) -> str:
    return f"all {most} {unit}" if n == most else f"{n} of {most} {unit}" if n else "none"


def _swatch(n: int, most: int) -> list[Shape]:
    if n == most:
        return [Box(0, 0, 16, 14, edge=INK, width=1), Box(1, 1, 14, 12, edge=EDGE, width=2)]
    if n:
        return [Box(0, 0, 16, 14, shade(LIVES, n / most), edge=INK)]
    return [Box(0, 0, 16, 14, PALE, edge=FAINT), *hatch(0, 0, 16, 14, 7, FAINT, 0.7)]


def _draw_ramp(width: int, most: int, unit: str) -> tuple[list[Shape], int]:
    step = width / (most + 1)
    shapes: list[Shape] = []
    for n in range(most + 1):
        fill = PALE if not n else shade(LIVES, n / most) if n < most else WHITE
        shapes.append(Box(round(n * step), 0, round((n + 1) * step) - round(n * step), 12, fill))
    shapes.append(Box(0, 0, width, 12, edge=INK))
    shapes.append(Text(0, 15, f"0 {unit}", SMALL, FAINT))
    shapes.append(Text(width / 2, 15, f"{most // 2}", SMALL, FAINT, "middle"))
    shapes.append(Text(width, 15, f"{most} {unit} (the picture itself)", SMALL, FAINT, "end"))
    return shapes, 32


def flow(width: int, entries: Sequence[Entry]) -> tuple[list[Shape], int]:
    """A legend in as many lines as it needs; and their height."""
    shapes: list[Shape] = []
    x = y = 0.0
    for swatch, words in entries:
        line = wrap_text(words, width - 22, SMALL, 1)[0]
        room = 22 + text_width(line, SMALL)
        if x and x + room > width:
            x, y = 0.0, y + LINE
        shapes += [move(shape, x, y) for shape in swatch]
        shapes.append(Text(x + 22, y, line, SMALL, INK))
        x += room + 14
    return shapes, round(y) + LINE


# ---------------------------------------------------------------- why they stay


def draw_scores(frame: Frame, fate: Fate, notes: Sequence[str]) -> Panel:
    """The method's own score of each candidate, with the cut in a histogram below."""
    ordered = sorted(fate.scores, key=lambda p: fate.scores[p])
    rank = {p: n / max(1, len(ordered) - 1) for n, p in enumerate(ordered)}
    marks = wash_out(frame, set(range(fate.patches)) - fate.among, "absent")
    for p, share in rank.items():
        look = tag("kept" if p in fate.kept else "dropped", p, score=f"{fate.scores[p]:.6g}")
        hint = f"patch {p}: {fate.scores[p]:.4g}"
        marks.append(frame.box(p, fill=shade(HEAT, share), alpha=0.78, tags=look, hint=hint))
    marks += lines_of_grid(frame) + outline(frame, fate.kept)
    marks += [number(frame, p, str(n)) for p, n in fate.picks.items()]
    shapes, height = _draw_histogram(frame.width, fate, rank)
    for note in (line for text in notes for line in wrap_text(text, frame.width, SMALL, 3)):
        shapes.append(Text(0, height, note, SMALL, FAINT))
        height += LINE
    words = "order of the picks, over scores" if fate.picks else "by score"
    title = f"{fate.title}: {len(fate.kept)} of {fate.patches} left, {words}"
    return make_panel(title, frame, [*frame.grey, *marks], (shapes, height))


def _draw_histogram(width: int, fate: Fate, rank: dict[int, float]) -> tuple[list[Shape], int]:
    """How many candidates have which score, those that were kept solid, and a line at the cut."""
    values = list(fate.scores.values())
    low, high = min(values), max(values)
    in_logs = low > 0 and high > 10 * sorted(values)[len(values) // 2]
    place = _Axis(low, high, in_logs, width)
    bins: list[list[int]] = [[] for _ in range(BINS)]
    for p, value in fate.scores.items():
        bins[min(BINS - 1, int(place(value) / width * BINS))].append(p)
    most, each = max(map(len, bins)), width / BINS
    shapes: list[Shape] = []
    for n, patches in enumerate(bins):
        x, w = round(n * each), round((n + 1) * each) - round(n * each)
        kept = sum(p in fate.kept for p in patches)
        all_high, kept_high = (round(BARS * k / most) for k in (len(patches), kept))
        if patches:
            shapes.append(Box(x + 1, BARS - all_high, w - 2, all_high, WHITE, edge=FAINT))
            shapes.append(Box(x + 1, BARS - kept_high, w - 2, kept_high, INK))
            shade_of = shade(HEAT, sum(rank[p] for p in patches) / len(patches))
            shapes.append(Box(x, BARS + 3, w, 8, shade_of))
    shapes.append(Line(0, BARS, width, BARS, INK, 1))
    if (cut := find_cut(fate)) is not None:
        at = place(cut)
        shapes += [Line(at, -2, at, BARS + 11, WHITE, 4), Line(at, -2, at, BARS + 11, EDGE, 2)]
    y = BARS + 14
    shapes.append(Text(0, y, f"{low:.3g}", SMALL, FAINT))
    shapes.append(Text(width, y, f"{high:.3g}", SMALL, FAINT, "end"))
    middle = "score, logarithmic" if in_logs else "score"
    shapes.append(Text(width / 2, y, middle, SMALL, FAINT, "middle"))
    return shapes, y + LINE


def find_cut(fate: Fate) -> float | None:
    """Half way from the best dropped candidate to the lowest kept one that beats it."""
    edges = find_edges(fate)
    return None if edges is None else sum(edges) / 2


def find_edges(fate: Fate) -> tuple[float, float] | None:
    """The score of the best dropped candidate, and of the lowest kept one that beats it."""
    dropped = [s for p, s in fate.scores.items() if p not in fate.kept]
    if not dropped:
        return None
    above = [s for p, s in fate.scores.items() if p in fate.kept and s >= max(dropped)]
    return (max(dropped), min(above)) if above else None


@dataclass(frozen=True)
class _Axis:
    """Where a score lies on an axis of `width` pixels."""

    low: float
    high: float
    in_logs: bool
    width: int

    def __call__(self, value: float) -> float:
        a, b, x = (math.log(v) if self.in_logs else v for v in (self.low, self.high, value))
        return (x - a) / (b - a) * self.width if b > a else self.width / 2


# ---------------------------------------------------------------- what they went into


def draw_choice(frame: Frame, fate: Fate, chips: Sequence[str]) -> Panel:
    """What is kept, with the number of its pick; and what the others went into."""
    counts = Counter(fate.into.values())
    targets = sorted(counts)  # added rows come last
    hues = {row: HUES[n % len(HUES)] for n, row in enumerate(targets)}
    # a target that was picked has one number, that of its pick
    names = {row: fate.picks.get(row, len(fate.picks) + n) for n, row in enumerate(targets, 1)}
    gone = set(range(fate.patches)) - fate.kept - set(fate.into)
    shapes = lines_of_grid(frame) + wash_out(frame, gone, "dropped")
    for p, row in sorted(fate.into.items()):
        look = tag("merged", p, into=row)
        shapes.append(
            frame.box(p, fill=hues[row], alpha=0.62, tags=look, hint=f"patch {p} into {row}")
        )
        shapes.append(number(frame, p, str(names[row])))
    shapes += outline(frame, fate.kept)
    for row in targets:
        if row < fate.patches:
            width = 3 + round(min(3.0, counts[row] ** 0.5 / 2))
            shapes.append(frame.box(row, edge=INK, width=width + 2, tags=tag("target", row)))
            shapes.append(frame.box(row, edge=hues[row], width=width))
            shapes.append(number(frame, row, str(names[row]), WHITE, INK))
    shapes += [frame.box(p, tags=tag("kept", p)) for p in sorted(fate.kept)]
    shapes += [number(frame, p, str(n)) for p, n in fate.picks.items() if p not in counts]
    entries: list[Entry] = []
    for row, count in sorted(fate.added.items()):
        chip = [Box(0, 0, 16, 14, hues[row], 0.62, INK)]
        entries.append((chip, f"{names[row]}: added row, {count} patches"))
    entries += [([Box(0, 0, 16, 14, WHITE, edge=INK)], chip) for chip in chips]
    merged = f", {len(fate.into)} merged into {len(counts)}" if fate.into else ""
    title = f"{fate.title}: {len(fate.kept)} of {fate.patches} left{merged}"
    return make_panel(title, frame, [*frame.shapes, *shapes], legend=entries)
