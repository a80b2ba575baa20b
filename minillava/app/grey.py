"""Grey images of more than 8 bits become grey images of 8 bits.

Pillow, and with it the reference processor, makes RGB of such an image by clipping at 255: a 16-bit
scan becomes all white. Where the format says which value is white, the values are scaled instead.
Where it does not (32-bit integers, floats), an image is only used if clipping changes little.
"""

from __future__ import annotations

import torch
from PIL import Image, ImageChops, TiffImagePlugin

from ..processing.resize import split_rows

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags and a value
_INSIDE = 0.75  # least share of values in 0..255 if the value of white is unknown


def to_eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits scaled to 8, rounded: 65535 becomes 255. Others are returned as they
    are. Raises ValueError if it is unknown which value is white and most values are not in 0..255.
    """
    if image.mode.startswith("I;16"):
        return _scale(image, _white(image))
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, in Pillow's 32
        return _scale(image, 65535)
    if image.mode in ("I", "F") and not _looks_like_bytes(image):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ValueError(
            f"it has {kind} pixels, most of them not in 0..255, and which value is white is "
            "unknown: convert it to 8 bits"
        )
    return image


def _white(image: Image.Image) -> int:
    """The largest value that the format allows: 65535, or 4095 for a TIFF of 12 bits."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(2 ** image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
    return 65535


def _scale(image: Image.Image, white: int) -> Image.Image:
    """Scale 0..white to 0..255 by strips of rows; a transparent value becomes an alpha channel."""
    transparent = image.info.get("transparency")
    inverted = (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    )
    result = Image.new("L" if transparent is None else "LA", image.size)
    for a, b in split_rows(image.height, image.width):
        strip = image.crop((0, a, image.width, b)).convert("I").convert("F")
        levels = strip.point(lambda v: v * (255 / white) + 0.5).convert("L")
        if inverted:
            levels = ImageChops.invert(levels)
        if transparent is not None:  # 255 where a value is above or below the transparent one
            above = strip.point(lambda v: v * 255 - transparent * 255).convert("L")
            below = strip.point(lambda v: v * -255 + transparent * 255).convert("L")
            levels.putalpha(ImageChops.lighter(above, below))
        result.paste(levels, (0, a))
    return result


def _looks_like_bytes(image: Image.Image) -> bool:
    """Whether most values lie in 0..255, and not all of them in 0..1 with fractions."""
    dtype = torch.int32 if image.mode == "I" else torch.float32
    inside, largest, fractions = 0, 0.0, False
    for a, b in split_rows(image.height, image.width):
        strip = image.crop((0, a, image.width, b))
        values = torch.frombuffer(bytearray(strip.tobytes()), dtype=dtype)
        inside += int(((values >= 0) & (values < 256)).sum())
        largest = max(largest, float(values.max()))
        fractions = fractions or bool((values != values.round()).any())
    return inside >= _INSIDE * image.width * image.height and (largest > 1 or not fractions)
