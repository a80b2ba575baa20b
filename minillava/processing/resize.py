"""Convert, frame and resize images of any shape in little memory and time.

A resized image may be huge for a moment: 1 x 5000 pixels with the shorter side at 336 become
336 x 1,680,000, of which only the middle is wanted. Pillow resizes along one axis, rounds to bytes,
then resizes along the other, and treats each row and each column alone. Leaving out rows that are
not wanted, and working in strips, therefore gives the same bits; so does resample.py, which is used
where most of what Pillow would compute is not wanted. (Pillow 13 resizes columns first where that
is cheaper; it never is for an image that is enlarged, or for a square that stays one.)
"""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image

from .resample import Window, resize_rows

STRIP = 1 << 24  # pixels per strip (64 MB)
MAX_AREA = 1 << 32  # pixels of a frame, or of a resized image before its middle is cut out


def to_rgb(image: Image.Image, over_white: bool) -> Image.Image:
    """Convert to RGB, with transparent pixels laid over white, or with transparency ignored.

    Raises ValueError for a mode that Pillow cannot convert.
    """
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode == "RGB" and not transparent:
        return image
    rgb = Image.new("RGB", image.size)
    for a, b in split_rows(image.height, image.width):
        strip = image.crop((0, a, image.width, b))
        if transparent and over_white:
            white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
            strip = Image.alpha_composite(white, _convert(strip, "RGBA"))
        strip.info.pop("transparency", None)  # changes no pixel, but Pillow would warn about it
        rgb.paste(_convert(strip, "RGB"), (0, a))
    return rgb


def check_area(image: Image.Image, area: tuple[int, int], verb: str) -> None:
    """Raises ValueError if the image when "padded" or "enlarged" has more than MAX_AREA pixels."""
    width, height = area
    if width * height > MAX_AREA:
        raise ValueError(
            f"an image of {image.width} x {image.height} pixels would have {width} x {height} when "
            f"{verb}, more than the {MAX_AREA} allowed; cut it or make it smaller"
        )


def resize_and_cut(
    image: Image.Image,
    frame: tuple[int, int],
    size: tuple[int, int],
    cut: int,
    resample: int,
    fill: tuple[int, ...] = (0, 0, 0),
) -> Image.Image:
    """Centre an RGB image in a filled frame, resize that to `size`, cut the middle cut x cut."""
    across = _middle(image.width, frame[0], size[0], cut, resample)
    down = _middle(image.height, frame[1], size[1], cut, resample)
    top, bottom = down.touched()
    start = down.covered[0]
    if (top, bottom) != down.covered:
        image = image.crop((0, top - start, image.width, bottom - start))
    rows = _resize_rows(image, across, fill)
    # the rows that were left out are only replaced by fill where they have no influence
    columns = rows.transpose(Image.Transpose.TRANSPOSE)
    whole = dataclasses.replace(down, covered=(top, bottom))
    return _resize_rows(columns, whole, fill).transpose(Image.Transpose.TRANSPOSE)


def _middle(length: int, frame: int, size: int, cut: int, resample: int) -> Window:
    """The middle `cut` of an axis on which an image is centred in a frame and resized to `size`."""
    start = (frame - length) // 2
    return Window(frame, size, (size - cut) // 2, cut, (start, start + length), resample)


def _resize_rows(image: Image.Image, window: Window, fill: tuple[int, ...]) -> Image.Image:
    """Resize each row; the image is what `window.covered` says, `window.count` pixels remain."""
    width = max(window.before, window.after)
    if image.height * width > STRIP and window.cost() < 4 * width:
        return _resize_wanted(image, window, fill)
    result = Image.new("RGB", (window.count, image.height))
    for a, b in split_rows(image.height, width):
        strip = _frame_rows(image.crop((0, a, image.width, b)), window, fill)
        strip = strip.resize((window.after, b - a), window.resample)
        left, right = window.first, window.first + window.count
        result.paste(strip.crop((left, 0, right, b - a)), (0, a))
    return result


def _frame_rows(image: Image.Image, window: Window, fill: tuple[int, ...]) -> Image.Image:
    """Rows between the two ends of their frame; the image itself if it is as wide as the frame."""
    if image.width == window.before:
        return image
    framed = Image.new("RGB", (window.before, image.height), fill)
    framed.paste(image, (window.covered[0], 0))
    return framed


def _resize_wanted(image: Image.Image, window: Window, fill: tuple[int, ...]) -> Image.Image:
    """`_resize_rows` without computing what is not wanted."""
    left, right = (x - window.covered[0] for x in window.touched())
    weights = window.weights()
    result = Image.new("RGB", (window.count, image.height))
    for a, b in split_rows(image.height, 16 * max(right - left, window.count)):
        part = image.crop((left, a, right, b))
        levels = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8)
        resized = resize_rows(levels.view(b - a, right - left, 3), weights, torch.tensor(fill))
        strip = Image.frombytes("RGB", (window.count, b - a), bytes(resized.flatten().tolist()))
        result.paste(strip, (0, a))
    return result


def split_rows(height: int, width: int) -> list[tuple[int, int]]:
    """Ranges of rows with at most STRIP pixels each, or of a single row."""
    step = max(1, STRIP // width)
    return [(a, min(a + step, height)) for a in range(0, height, step)]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError as error:
        raise ValueError(
            f"an image of mode {image.mode} cannot be converted to {mode} ({error}); "
            "convert it to RGB first"
        ) from error
