"""A PIL picture -> pixels (3, S, S) float32 for the vision tower.

Two ways to make it square, each equal bit for bit to its reference (with the same Pillow):
"crop": transformers' `CLIPImageProcessorPil`: what is transparent is laid over white, the shorter
side resized, the middle cut out. "pad": the original LLaVA code (llava/mm_utils.py,
expand2square): transparency is dropped, the picture set in the middle of a square filled with the
mean colour, that square resized. EXIF rotation is left to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

ASPECTS = ("crop", "pad")
STRIP = 1 << 24  # pixels in work at one time where a picture is taken in strips (64 MB)
MAX_AREA = 1 << 32  # pixels of a picture padded, or enlarged before the middle is cut out


@dataclass(frozen=True)
class ImageConfig:
    """What preprocessor_config.json says (processor_files.py reads it); LLaVA-1.5's by default."""

    size: int = 336  # pixels of the shorter side after the resize
    crop: int = 336  # S, side of the square cut from the middle
    resample: int = Image.Resampling.BICUBIC.value
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255

    @property
    def fill(self) -> tuple[int, ...]:
        """The mean colour, cut down to whole grey levels as the original code does."""
        return tuple(int(255 * m) for m in self.mean)


def preprocess(image: Image.Image, config: ImageConfig, aspect: str = "crop") -> Tensor:
    """Pixels (3, S, S) float32, normalised, of a picture of any size and mode.

    Pictures that are enlarged or padded are taken in strips, so that 1 x 5000 pixels do not need
    gigabytes. Raises ValueError for an unknown aspect, an empty or broken picture, a mode that
    Pillow cannot turn into RGB, and one so long that its padded square or its enlarged form would
    have more than MAX_AREA pixels (a side of 65,536; a shape of 38,000 to 1).
    """
    check_aspect(aspect)
    if 0 in image.size:
        raise ValueError(f"the picture has {_by(image.size)} pixels; give one that is not empty")
    try:
        image.load()
        square = (_crop if aspect == "crop" else _pad)(image, config)
    except OSError as error:
        raise ValueError(f"the picture is broken ({error}); give a whole one") from error
    S = config.crop
    levels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(S, S, 3)
    pixels = levels.permute(2, 0, 1)  # (3, S, S)
    # the product in float64 and rounded once, the rest in float32, as in the reference
    scaled = (pixels.double() * config.rescale).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return ((scaled - mean) / std).contiguous()


def check_aspect(aspect: str) -> None:
    """Raises ValueError for any that is not in ASPECTS."""
    if aspect not in ASPECTS:
        raise ValueError(f"image_aspect={aspect!r}; it can be {' or '.join(ASPECTS)}")


# ------------------------------------------------------------ the square, as a picture


def _crop(image: Image.Image, c: ImageConfig) -> Image.Image:
    w, h = image.size
    short, long = min(w, h), max(w, h)
    longer = int(c.size * long / short)
    size = (c.size, longer) if w <= h else (longer, c.size)
    if short < c.size:
        return _resize_strips(image, (w, h), (0, 0), size, c)
    left, top = (size[0] - c.crop) // 2, (size[1] - c.crop) // 2
    whole = _over_white(image).resize(size, c.resample)
    return whole.crop((left, top, left + c.crop, top + c.crop))


def _pad(image: Image.Image, c: ImageConfig) -> Image.Image:
    w, h = image.size
    side = max(w, h)
    at = ((side - w) // 2, (side - h) // 2)
    return _resize_strips(image, (side, side), at, (c.size, c.size), c, c.fill)


def _resize_strips(
    image: Image.Image,
    frame: tuple[int, int],
    at: tuple[int, int],
    size: tuple[int, int],
    c: ImageConfig,
    fill: tuple[int, ...] | None = None,
) -> Image.Image:
    """The middle of a frame resized to `size`, with the picture in it at `at`, on `fill` if given.

    Pillow resizes along rows and then along columns, rounding in between, each row and column for
    itself: taken in strips it gives the same. (Where rows become fewer in number than columns do,
    Pillow 13 goes the other way round; it does not for these frames, enlarged or square.)
    """
    for what, (a, b) in (("padded", frame), ("enlarged", size)):
        if a * b > MAX_AREA:
            raise ValueError(
                f"a picture of {_by(image.size)} pixels would have {_by((a, b))} when {what}, more "
                f"than the {MAX_AREA} allowed; cut it or make it smaller"
            )
    (width, height), (w, h), (x, y) = frame, image.size, at
    left, top = (size[0] - c.crop) // 2, (size[1] - c.crop) // 2
    rows = Image.new("RGB", (c.crop, height), fill)
    for a, b in _strips(h, max(width, size[0])):
        strip = image.crop((0, a, w, b))
        if fill is None:
            strip = _opaque(strip)
        else:
            strip, part = Image.new("RGB", (width, b - a), fill), strip
            strip.paste(_without_alpha(part), (x, 0))
        strip = strip.resize((size[0], b - a), c.resample)
        rows.paste(strip.crop((left, 0, left + c.crop, b - a)), (0, y + a))
    square = Image.new("RGB", (c.crop, c.crop))
    for a, b in _strips(c.crop, max(height, size[1])):
        strip = rows.crop((a, 0, b, height)).resize((b - a, size[1]), c.resample)
        square.paste(strip.crop((0, top, b - a, top + c.crop)), (a, 0))
    return square


def _strips(length: int, across: int) -> list[tuple[int, int]]:
    step = max(1, STRIP // across)
    return [(a, min(a + step, length)) for a in range(0, length, step)]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


# ------------------------------------------------------------ colours


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    rgb = Image.new("RGB", image.size)
    for a, b in _strips(image.height, image.width):
        rgb.paste(_opaque(image.crop((0, a, image.width, b))), (0, a))
    return rgb


def _opaque(image: Image.Image) -> Image.Image:
    """transformers 5: alpha channels and transparent colours are laid over white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return _convert(image, "RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, _convert(image, "RGBA")).convert("RGB")


def _without_alpha(image: Image.Image) -> Image.Image:
    """Original LLaVA: convert("RGB"). `image` is our own copy of a strip."""
    image.info.pop("transparency", None)  # changes no pixel, but Pillow would warn of it
    return _convert(image, "RGB")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError as error:
        raise ValueError(
            f"a picture of mode {image.mode} cannot be turned into {mode} ({error}); "
            "convert it to RGB first"
        ) from error
