"""A drawing of boxes, lines, texts and pictures, as a PIL image and as SVG.

Both come from one list of shapes, so what one shows the other shows too. Coordinates are pixels of
the PNG, from the upper left corner. Text is measured in Pillow's own font, which has little besides
ASCII: a PNG shows other characters as escapes, an SVG shows them as they are.
"""

from __future__ import annotations

import base64
import io
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PAPER: Color = (255, 255, 255)
FAMILY = "Helvetica, Arial, sans-serif"  # near to Pillow's own font
COMPRESSION = 3  # of PNG: at 6, the default, a page takes three times as long and is little smaller
QUALITY = 92  # of pictures in SVG, as JPEG


@dataclass(frozen=True)
class Box:
    """A rectangle with its upper left corner at x, y."""

    x: float
    y: float
    w: float
    h: float
    fill: Color | None = None
    alpha: float = 1.0  # of the fill
    edge: Color | None = None
    width: float = 1.0  # of the edge, which lies inside
    tags: Mapping[str, object] = field(default_factory=dict)  # attributes in SVG, for programs
    hint: str = ""  # shown in SVG when the mouse is over it


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    color: Color
    width: float = 1.0
    alpha: float = 1.0


@dataclass(frozen=True)
class Text:
    x: float  # of its left end, middle or right end
    y: float  # of the upper end of its line
    text: str
    size: int = 15
    color: Color = (20, 20, 20)
    at: Literal["start", "middle", "end"] = "start"
    halo: Color | None = None  # around the letters, where they stand on a picture


@dataclass(frozen=True)
class Picture:
    x: float
    y: float
    image: Image.Image  # RGB or L, in the size in which it is drawn


Shape = Box | Line | Text | Picture


def move(shape: Shape, dx: float, dy: float) -> Shape:
    if isinstance(shape, Line):
        x1, x2 = shape.x1 + dx, shape.x2 + dx
        return replace(shape, x1=x1, x2=x2, y1=shape.y1 + dy, y2=shape.y2 + dy)
    return replace(shape, x=shape.x + dx, y=shape.y + dy)


@dataclass(frozen=True)
class Drawing:
    """Shapes on paper, with what a reader who does not see it has to know."""

    width: int
    height: int
    shapes: list[Shape]
    title: str
    description: str  # the alternative text
    about: Mapping[str, str]  # where it comes from: command, seed, digest

    def image(self) -> Image.Image:
        """The drawing in RGB. Its texts are in `image.info`, and save(path) writes them."""
        page = Image.new("RGB", (self.width, self.height), PAPER)
        pen = ImageDraw.Draw(page, "RGBA")
        for shape in self.shapes:
            _paint(page, pen, shape)
        page.info.update(self.texts())
        return page

    def texts(self) -> dict[str, str]:
        return {"Title": self.title, "Description": self.description, **self.about}

    def svg(self) -> str:
        """The drawing as a complete SVG file, with title, desc and metadata."""
        unique = sha256(repr(self.texts()).encode("utf-8", "backslashreplace")).hexdigest()[:8]
        size: dict[str, object] = {"width": self.width, "height": self.height}
        view = {"viewBox": f"0 0 {self.width} {self.height}", "role": "img"}
        names = {"aria-labelledby": f"t{unique} d{unique}", "font-family": FAMILY}
        ids, pictures = embed_pictures(self.shapes, f"p{unique}")
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {_attributes(size | view | names)}>',
            f'<title id="t{unique}">{escape_text(self.title)}</title>',
            f'<desc id="d{unique}">{escape_text(self.description)}</desc>',
            f"<metadata>{escape_text(json.dumps(dict(self.about), ensure_ascii=False))}</metadata>",
            f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>',
            *("<defs>", *pictures, "</defs>"),
            *write_shapes(self.shapes, ids),
            "</svg>\n",
        ]
        return "\n".join(lines)

    def png(self) -> bytes:
        """The drawing as a complete PNG file, with title, description and metadata."""
        texts, file = PngImagePlugin.PngInfo(), io.BytesIO()
        for name, text in self.texts().items():
            texts.add_text(name, _xml_characters(text))  # as UTF-8 if it is not Latin-1
        self.image().save(file, "PNG", pnginfo=texts, compress_level=COMPRESSION)
        return file.getvalue()

    def save(self, path: Path, kind: str) -> None:
        """Write a file of kind "png" or "svg"."""
        if kind == "svg":
            path.write_text(self.svg(), "utf-8")
        else:
            path.write_bytes(self.png())


# ---------------------------------------------------------------- text


@cache
def font(size: int) -> Font:
    return ImageFont.load_default(size)


def text_width(text: str, size: int = 15) -> float:
    return font(size).getlength(to_ascii(text))


def to_ascii(text: str) -> str:
    """Remove accents and escape other characters."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    return plain.encode("ascii", "backslashreplace").decode()


def wrap_text(text: str, width: float, size: int = 15, most: int = 12) -> list[str]:
    """Break text into lines of at most `width` pixels; words longer than a line are split. Of more
    than `most` lines the last that is shown ends in "..."."""
    lines = [""]
    for word in _xml_characters(text).split():
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if text_width(longer, size) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and text_width(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > most:
            break
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and text_width(last + " ...", size) > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last} ..."]


# ---------------------------------------------------------------- PNG


def _paint(page: Image.Image, pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    if isinstance(shape, Picture):
        page.paste(shape.image, (round(shape.x), round(shape.y)))
    elif isinstance(shape, Line):
        ends = [(shape.x1, shape.y1), (shape.x2, shape.y2)]
        pen.line(ends, (*shape.color, round(255 * shape.alpha)), max(1, round(shape.width)))
    elif isinstance(shape, Box):
        corners = (shape.x, shape.y, shape.x + shape.w - 1, shape.y + shape.h - 1)
        if shape.w < 1 or shape.h < 1:
            return
        fill = None if shape.fill is None else (*shape.fill, round(255 * shape.alpha))
        if fill:
            pen.rectangle(corners, fill)
        if shape.edge:
            pen.rectangle(corners, None, shape.edge, max(1, round(shape.width)))
    else:
        _paint_text(pen, shape)


def _paint_text(pen: ImageDraw.ImageDraw, shape: Text) -> None:
    text = to_ascii(shape.text)
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[shape.at] * text_width(text, shape.size)
    halo: dict[str, Any] = {}
    if shape.halo:
        halo = {"stroke_width": 2, "stroke_fill": shape.halo}
    pen.text((shape.x - shift, shape.y), text, shape.color, font(shape.size), **halo)


# ---------------------------------------------------------------- SVG


def embed_pictures(shapes: Iterable[Shape], prefix: str) -> tuple[dict[int, str], list[str]]:
    """Names for the pictures among shapes, by their id(), and an element that defines each, once
    however often it is drawn. The names begin with a prefix."""
    pictures = {id(s.image): s.image for s in shapes if isinstance(s, Picture)}
    ids = {key: f"{prefix}{n}" for n, key in enumerate(pictures)}
    return ids, [_embed(ids[key], image) for key, image in pictures.items()]


def write_shapes(shapes: Iterable[Shape], pictures: Mapping[int, str]) -> list[str]:
    """The elements that draw shapes; pictures: the names of those that were defined."""
    return [_write(shape, pictures) for shape in shapes]


def _write(shape: Shape, pictures: Mapping[int, str]) -> str:
    if isinstance(shape, Picture):
        place = {"href": f"#{pictures[id(shape.image)]}", "x": shape.x, "y": shape.y}
        return f"<use {_attributes(place)}/>"
    if isinstance(shape, Line):
        ends = {"x1": shape.x1, "y1": shape.y1, "x2": shape.x2, "y2": shape.y2}
        pen = {"stroke": _hex(shape.color), "stroke-width": shape.width}
        return f"<line {_attributes(ends | pen | _faint('stroke', shape.alpha))}/>"
    if isinstance(shape, Text):
        return _write_text(shape)
    inset = shape.width / 2 if shape.edge else 0.0
    place = {"x": shape.x + inset, "y": shape.y + inset}
    size = {"width": shape.w - 2 * inset, "height": shape.h - 2 * inset}
    fill = {"fill": _hex(shape.fill) if shape.fill else "none"}
    edge = {"stroke": _hex(shape.edge), "stroke-width": shape.width} if shape.edge else {}
    faint = _faint("fill", shape.alpha) if shape.fill else {}
    start = f"<rect {_attributes(place | size | fill | faint | edge | dict(shape.tags))}"
    return (
        f"{start}><title>{escape_text(shape.hint)}</title></rect>" if shape.hint else f"{start}/>"
    )


def _embed(name: str, image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    source = base64.b64encode(data.getvalue()).decode()
    size = _attributes({"width": image.width, "height": image.height})
    return f'<image id="{name}" {size} href="data:image/jpeg;base64,{source}"/>'


def _write_text(shape: Text) -> str:
    """Text that takes the room that was measured for it, whatever font a viewer has."""
    place = {"x": shape.x, "y": shape.y + 0.79 * shape.size, "font-size": shape.size}
    look = {"fill": _hex(shape.color), "text-anchor": shape.at}
    halo: dict[str, object] = {}
    if shape.halo:
        halo = {"stroke": _hex(shape.halo), "stroke-width": 3, "paint-order": "stroke"}
    room: dict[str, object] = {}
    if len(shape.text) > 1 and shape.text.isascii():
        room = {
            "textLength": text_width(shape.text, shape.size),
            "lengthAdjust": "spacingAndGlyphs",
        }
    return f"<text {_attributes(place | look | halo | room)}>{escape_text(shape.text)}</text>"


def _faint(what: str, alpha: float) -> dict[str, object]:
    return {} if alpha >= 1 else {f"{what}-opacity": round(alpha, 3)}


def _attributes(values: Mapping[str, object]) -> str:
    return " ".join(
        f'{name}="{value:g}"' if isinstance(value, float) else f'{name}="{escape_text(str(value))}"'
        for name, value in values.items()
    )


def _hex(color: Color) -> str:
    return "#" + "".join(f"{level:02x}" for level in color)


def escape_text(text: str) -> str:
    """Text for XML and HTML."""
    return escape(_xml_characters(text))


def _xml_characters(text: str) -> str:
    """Text without the characters that XML cannot hold, each replaced by an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
