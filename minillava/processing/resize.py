"""Convert, frame and resize images of any shape in little memory, strip by strip.

A resized image may be huge for a moment: 1 x 5000 pixels with the shorter side at 336 become
336 x 1,680,000, of which only the middle is wanted. Pillow resizes along one axis, rounds to bytes,
then resizes along the other, and treats each row and each column alone. Working in strips therefore
gives the same bits. (Pillow 13 resizes columns first where that is cheaper; it never is for an
image that is enlarged, or for a square that stays one.)
"""

from __future__ import annotations

from PIL import Image

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
    for a, b in _split_rows(image.height, image.width):
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
    rows = _resize_rows(image, frame[0], size[0], cut, resample, fill)
    columns = rows.transpose(Image.Transpose.TRANSPOSE)
    square = _resize_rows(columns, frame[1], size[1], cut, resample, fill)
    return square.transpose(Image.Transpose.TRANSPOSE)


def _resize_rows(
    image: Image.Image, frame: int, width: int, cut: int, resample: int, fill: tuple[int, ...]
) -> Image.Image:
    """Centre each row in `frame` pixels, resize it to `width` pixels, keep the middle `cut`."""
    left, x = (width - cut) // 2, (frame - image.width) // 2
    result = Image.new("RGB", (cut, image.height))
    for a, b in _split_rows(image.height, max(frame, width)):
        strip = Image.new("RGB", (frame, b - a), fill)
        strip.paste(image.crop((0, a, image.width, b)), (x, 0))
        strip = strip.resize((width, b - a), resample)
        result.paste(strip.crop((left, 0, left + cut, b - a)), (0, a))
    return result


def _split_rows(height: int, width: int) -> list[tuple[int, int]]:
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
