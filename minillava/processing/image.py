"""A PIL image -> pixels (3, S, S) float32 for the vision tower, S = 336.

CLIP was trained on squares of one size, so every image must become one. There are two ways:
"crop" resizes the shorter side to S and cuts out the middle, which loses the ends of a long image.
"pad" first centres the image on a square filled with CLIP's mean colour, which keeps everything
but spends image tokens on the border. A checkpoint expects the way it was trained with.

Both equal their reference bit for bit (with the same Pillow). "crop" is transformers'
CLIPImageProcessorPil, which lays transparent images over white. "pad" is the original LLaVA code
(llava/mm_utils.py, expand2square), which ignores transparency. EXIF rotation is not applied here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .resize import check_area, resize_and_cut, to_rgb

ASPECTS = ("crop", "pad")


@dataclass(frozen=True)
class ImageConfig:
    """The settings of preprocessor_config.json; the defaults are LLaVA-1.5's."""

    size: int = 336  # pixels of the shorter side after the resize
    crop: int = 336  # S, side of the square
    resample: int = Image.Resampling.BICUBIC.value
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour in 0..255, rounded down as in the original code: (122, 116, 104)."""
        red, green, blue = (int(255 * m) for m in self.mean)
        return red, green, blue


def preprocess(image: Image.Image, config: ImageConfig, aspect: str = "crop") -> Tensor:
    """Make an image of any size and mode square and normalise it: pixels (3, S, S) float32.

    Raises ValueError for an unknown aspect, an image that is empty, broken or of a mode that Pillow
    cannot convert to RGB, and one so long that its padded square or its enlarged form would have
    more than MAX_AREA pixels (65,536 pixels a side, or a shape of 38,000 to 1).
    """
    check_aspect(aspect)
    if 0 in image.size:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"the image has {size} pixels; give one that is not empty")
    try:
        image.load()
        square = (_crop_square if aspect == "crop" else _pad_square)(image, config)
    except OSError as error:
        raise ValueError(f"the image is broken ({error}); give an undamaged copy") from error
    S = config.crop
    levels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(S, S, 3)
    pixels = levels.permute(2, 0, 1)  # (3, S, S)
    # As in the reference: the product in float64, rounded once, and the rest in float32.
    scaled = (pixels.double() * config.rescale).float()
    mean, std = torch.tensor([config.mean, config.std], dtype=torch.float32)[..., None, None]
    return ((scaled - mean) / std).contiguous()


def check_aspect(aspect: str) -> None:
    """Raises ValueError if the aspect is not one of ASPECTS."""
    if aspect not in ASPECTS:
        raise ValueError(f"image_aspect={aspect!r} must be {' or '.join(ASPECTS)}; choose one")


def _crop_square(image: Image.Image, c: ImageConfig) -> Image.Image:
    """Resize the shorter side to `size`, then cut the middle S x S."""
    w, h = image.size
    longer = int(c.size * max(w, h) / min(w, h))
    size = (c.size, longer) if w <= h else (longer, c.size)
    if min(w, h) < c.size:  # enlarged, perhaps to something that does not fit into memory
        check_area(image, size, "enlarged")
        return resize_and_cut(to_rgb(image, over_white=True), (w, h), size, c.crop, c.resample)
    left, top = (size[0] - c.crop) // 2, (size[1] - c.crop) // 2
    resized = to_rgb(image, over_white=True).resize(size, c.resample)
    return resized.crop((left, top, left + c.crop, top + c.crop))


def _pad_square(image: Image.Image, c: ImageConfig) -> Image.Image:
    """Centre the image on a square of the mean colour, then resize to `size`."""
    square, size = (max(image.size),) * 2, (c.size, c.size)
    check_area(image, square, "padded")
    rgb = to_rgb(image, over_white=False)
    return resize_and_cut(rgb, square, size, c.crop, c.resample, c.fill)
