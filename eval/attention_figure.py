"""Draw attention: heat maps over pictures, and the kinds of tokens that get it, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from minillava.app.canvas import Box, Color, Drawing, Line, Shape, Text, move, text_width, wrap_text
from minillava.app.frame import INK, Frame, hatch, make_frame
from minillava.app.layout import fill_rows, stack, write_lines
from minillava.app.overlay import MARGIN, PAGE, draw_page
from minillava.app.panels import (
    FAINT,
    HEAT,
    LINE,
    NORMAL,
    SMALL,
    WHITE,
    Panel,
    flow,
    lines_of_grid,
    make_panel,
    shade,
    tag,
    wash_out,
)
from minillava.config import Config
from minillava.processing.image import ImageConfig

from .watch import BOS, IMAGE, KINDS, SINK, Seen

HEAT_ALPHA = 0.72  # of a map over the grey picture
STEPS = 32  # of a ramp
SMALLEST = 12  # pixels of a patch's side, at least; none holds a number
BAR = 200  # pixels of a chart's height
CHART, COLUMN, WIDEST = 760, 22, 80  # of its width, and of a column's: at least, at most
SHADES: Sequence[Color] = (  # of KINDS, from dark to light
    (20, 20, 20),
    (0, 90, 150),
    (213, 120, 0),
    (120, 190, 235),
    (250, 240, 190),
)
NOT_CAUSE = (
    "attention, not cause: a weight says where a row reads in one layer, not what the answer "
    "depends on; eval.smallest removes patches and asks again"
)


@dataclass(frozen=True)
class View:
    """What a group of rows sees in one layer."""

    seen: Seen
    weights: Tensor  # (tokens,) of one head or the mean of all
    bos: bool = True  # False: without BOS

    def share(self, kind: int) -> float:
        return float(self.weights[self.seen.kind == kind].sum())

    @property
    def even(self) -> float:
        """The weight of each token if all that are visible had the same."""
        counted = self.seen.visible & (self.bos | (self.seen.kind != BOS))
        return float(self.weights.sum()) / max(1, int(counted.sum()))


@dataclass(frozen=True)
class Shown:
    """The pictures of a prompt, and how the processor made them square."""

    config: Config
    images: Sequence[Image.Image]
    aspect: str | None = None  # None: the checkpoint's
    image_config: ImageConfig | None = None  # None: that of the model's image size

    def frame(self, image: int, outside: float) -> Frame:
        vision = self.config.vision
        config = self.image_config or ImageConfig(vision.image_size, vision.image_size)
        aspect = self.aspect or self.config.image_aspect
        return make_frame(self.images[image], vision, config, aspect, outside, SMALLEST)


def draw_attention(
    shown: Shown,
    groups: Mapping[str, Sequence[View]],
    layers: Sequence[int],
    caption: Sequence[str],
    about: Mapping[str, str],
) -> Drawing:
    """The pictures with a chart for each group, and then a row of maps for each group and picture.

    groups: name -> views of all layers. layers: those to be drawn as maps.
    """
    pages: list[list[Panel]] = [[]]
    for image in range(len(shown.images)):
        which = f" {image + 1}" if len(shown.images) > 1 else ""
        whole, square = shown.frame(image, 0.5), shown.frame(image, 0.0)
        pages[0].append(
            make_panel(f"picture{which}", whole, [*whole.shapes, *lines_of_grid(whole)])
        )
        for name, views in groups.items():
            title = f"{name}, picture{which}" if which else name
            pages.append([draw_map(square, views[k], image, title) for k in layers])
    pages[0] += [draw_kinds(name, views) for name, views in groups.items()]
    lines = [*caption, describe_sinks(shown.config), NOT_CAUSE]
    rows = [fill_rows(page, PAGE - 2 * MARGIN) for page in pages]
    page = stack([*rows, write_lines(lines, max(row.width for row in rows))])
    title = "Attention to the picture and to kinds of tokens"
    words = [describe(name, views, layers) for name, views in groups.items()]
    return draw_page(page, title, "\n".join([*words, *lines]), about)


def draw_one_map(
    shown: Shown, view: View, image: int, name: str, caption: Sequence[str]
) -> Drawing:
    """The map of one image of a prompt, which is the only one in `shown`."""
    panel = draw_map(shown.frame(0, 0.0), view, image, name)
    lines = [*caption, NOT_CAUSE]
    page = stack([fill_rows([panel], panel.width), write_lines(lines, panel.width)])
    title = f"Attention to the picture in layer {view.seen.layer}"
    return draw_page(page, title, " ".join([*panel.title, *lines]), {})


def draw_map(frame: Frame, view: View, image: int, name: str) -> Panel:
    """The weights of a picture's patches, from 0 to the highest of a patch that is no sink."""
    seen = view.seen
    weights, sinks = (
        seen.of_image(image, view.weights, -1.0),
        seen.of_image(image, seen.sinks, False),
    )
    there = weights >= 0  # (N,)
    usual = weights[there & ~sinks] if (there & ~sinks).any() else weights[there]
    top = max(usual.tolist(), default=0.0)
    marks = wash_out(frame, (~there).nonzero()[:, 0].tolist(), "absent")
    for p in there.nonzero()[:, 0].tolist():
        weight = float(weights[p])
        fill = shade(HEAT, weight / top if top else 0.0)
        look = tag("sink" if sinks[p] else "seen", p, weight=f"{weight:.6g}")
        marks.append(
            frame.box(p, fill=fill, alpha=HEAT_ALPHA, tags=look, hint=f"patch {p}: {weight:.3g}")
        )
    marks += lines_of_grid(frame)
    thick = 5 if frame.cell > 20 else 3
    for p in sinks.nonzero()[:, 0].tolist():
        marks += [frame.box(p, edge=INK, width=thick), frame.box(p, edge=WHITE, width=2)]
    total = float(weights[there].sum())
    title = f"{name}, layer {seen.layer}: {percent(total)} on the {int(there.sum())} patches"
    if not seen.n_rows:
        title = f"{name}, layer {seen.layer}: dropped before it"
    below = _explain_map(frame.width, view, top, weights[sinks], not there.all())
    return make_panel(title, frame, [*frame.grey, *marks], below)


def _explain_map(
    width: int, view: View, top: float, sinks: Tensor, absent: bool
) -> tuple[list[Shape], int]:
    """The ramp with its numbers, and what else gets attention."""
    step = width / STEPS
    shapes: list[Shape] = [
        Box(
            round(n * step),
            0,
            round((n + 1) * step) - round(n * step),
            12,
            shade(HEAT, n / (STEPS - 1)),
        )
        for n in range(STEPS)
    ]
    shapes.append(Box(0, 0, width, 12, edge=INK))
    if 0 < view.even < top:
        at = view.even / top * width
        shapes += [Line(at, -2, at, 14, WHITE, 4), Line(at, -2, at, 14, INK, 2)]
    shapes.append(Text(0, 15, "0", SMALL, FAINT))
    shapes.append(Text(width, 15, f"{top:.3g}", SMALL, FAINT, "end"))
    words = f"{'line: ' if view.even < top else ''}all tokens alike, {view.even:.2g}"
    shapes.append(Text(width / 2, 15, words, SMALL, FAINT, "middle"))
    kinds = [(name, view.share(k)) for k, name in enumerate(KINDS) if k != IMAGE]
    notes = [", ".join(f"{name} {percent(share)}" for name, share in kinds if share)]
    if len(sinks):
        total, most = float(sinks.sum()), float(sinks.max())
        notes.append(f"{len(sinks)} sinks (white frame): {percent(total)}, up to {most:.3g}")
    if absent:
        notes.append("struck out: not there for these rows (dropped, hidden, or after them)")
    y = 15 + LINE
    for line in (line for note in notes for line in wrap_text(note, width, SMALL, 3)):
        shapes.append(Text(0, y, line, SMALL, FAINT))
        y += LINE
    return shapes, y


def draw_kinds(name: str, views: Sequence[View]) -> Panel:
    """A column for each layer: which part of the attention each kind of token gets."""
    left = 40
    each = max(COLUMN, min(WIDEST, CHART // len(views)))
    width = left + each * len(views)
    shapes: list[Shape] = []
    for n in range(5):
        y = BAR - n * BAR / 4
        shapes.append(Line(left - 4, y, width, y, FAINT, 1, 0.5))
        shapes.append(Text(left - 6, y - 7, f"{25 * n} %", SMALL, FAINT, "end"))
    for k, view in enumerate(views):
        shapes += _draw_column(view, left + k * each + 2, each - 4)
        if each > text_width("00", SMALL) * 1.4 or k % 2 == 0:
            shapes.append(
                Text(
                    left + k * each + each / 2,
                    BAR + 4,
                    str(view.seen.layer),
                    SMALL,
                    FAINT,
                    "middle",
                )
            )
    entries = [(_swatch(kind), text) for kind, text in enumerate(KINDS)]
    key, height = flow(width, entries)
    shapes += [move(shape, 0, BAR + 4 + LINE) for shape in key]
    title = wrap_text(f"{name}: attention by kind of token, over the layers", width, NORMAL, 3)
    moved = [move(shape, 0, 8) for shape in shapes]  # room for the highest number
    return Panel(width, BAR + 12 + LINE + height, title, moved)


def _draw_column(view: View, x: float, width: float) -> list[Shape]:
    shapes: list[Shape] = []
    y = float(BAR)
    for kind, name in enumerate(KINDS):
        share = view.share(kind)
        top = y - share * BAR
        box = Box(x, round(top), width, round(y) - round(top))
        hint = f"layer {view.seen.layer}, {name}: {percent(share)}"
        look = {"class": "kind", "data-kind": name, "data-share": f"{share:.6g}"}
        if box.h >= 1:
            shapes.append(replace(box, fill=SHADES[kind], tags=look, hint=hint))
            if kind == IMAGE:
                shapes += hatch(box.x, box.y, box.w, box.h, 7, INK, 0.6)
            shapes.append(replace(box, edge=INK))
        label = f"{100 * share:.0f}"
        if box.h >= 15 and width > text_width(label, SMALL) + 6:
            color, halo = (WHITE, None) if kind < IMAGE else (INK, WHITE if kind == IMAGE else None)
            shapes.append(
                Text(x + width / 2, box.y + box.h / 2 - 7, label, SMALL, color, "middle", halo)
            )
        y = top
    return shapes


def _swatch(kind: int) -> list[Shape]:
    strokes = hatch(0, 0, 16, 14, 7, INK, 0.6) if kind == IMAGE else []
    return [Box(0, 0, 16, 14, SHADES[kind]), *strokes, Box(0, 0, 16, 14, edge=INK)]


# ---------------------------------------------------------------- words


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or not share else "< 0.1 %"


def describe_sinks(config: Config) -> str:
    """What counts as a sink, and whether this model can have any."""
    D = config.text.hidden_size
    words = (
        f"sinks: tokens whose hidden state, over its root mean square, is beyond {SINK:g} in a "
        "dimension in which that of the first token is (Kang et al., ICLR 2025)"
    )
    return words if D > SINK**2 else f"{words}; with {D} dimensions no token can be"


def describe(name: str, views: Sequence[View], layers: Sequence[int]) -> str:
    """A group in words, for those who do not see the drawing."""
    parts = []
    for k in layers:
        kinds = ", ".join(f"{kind} {percent(views[k].share(i))}" for i, kind in enumerate(KINDS))
        parts.append(f"layer {k}: {kinds}")
    return f"{name}: {'; '.join(parts)}."


def format_table(views: Sequence[View]) -> str:
    """The chart as a Markdown table, in per cent, and how much an image token gets compared with
    all visible tokens alike."""
    lines = ["| layer | " + " | ".join(KINDS) + " | image token, of an even share |"]
    lines.append("|---:" * (len(KINDS) + 2) + "|")
    for view in views:
        tokens = int((view.seen.visible & (view.seen.kind == IMAGE)).sum())
        each = view.share(IMAGE) / tokens / view.even if tokens and view.even else 0.0
        cells = [f"{100 * view.share(kind):.1f}" for kind in range(len(KINDS))]
        lines.append(f"| {view.seen.layer} | {' | '.join(cells)} | {each:.2f} |")
    return "\n".join(lines)
