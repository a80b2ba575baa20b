"""How a checkpoint wants its pictures: preprocessor_config.json, processor_config.json, or neither.

What an entry is taken to be when a file leaves it out is what transformers' CLIPImageProcessor
takes it to be. Anything but shortest edge, centre crop, 1/255 and normalisation is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config
from .entries import Entries, read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# the same arithmetic under several names (and of several backends, which round differently)
_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
    "LlavaImageProcessor",
    "LlavaImageProcessorFast",
    "LlavaImageProcessorPil",
)
_HARMLESS = ("data_format", "default_to_square", "input_data_format", "processor_class")


@dataclass(frozen=True)
class ImageSettings:
    """Side of the square picture in pixels, colour statistics per channel, and the aspect mode."""

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    aspect: str = "crop"

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> ImageSettings:
        """Read a checkpoint's settings. Raises ValueError for those that are not supported."""
        settings = cls(config.vision.image_size, aspect=config.image_aspect)
        nested = None
        if (path := folder / "processor_config.json").is_file():
            processor = Entries(str(path), "", read_json(path))
            processor.only("image_token", ("<image>",), "<image>")
            processor.only("patch_size", (config.vision.patch_size,), None)
            processor.only("vision_feature_select_strategy", ("default",), "default")
            nested = processor.section("image_processor", {})
        if (path := folder / "preprocessor_config.json").is_file():
            return settings._read(Entries(str(path), "", read_json(path)))
        if nested is not None and nested.values:
            return settings._read(nested)
        return settings

    def _read(self, e: Entries) -> ImageSettings:
        e.only("image_processor_type", _PROCESSORS, None)
        e.only("feature_extractor_type", _PROCESSORS, None)
        for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb"):
            e.only(f"do_{step}", (True,), True)
        e.only("resample", (3,), 3)  # bicubic
        if abs(e.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise e.error("rescale_factor", e.values["rescale_factor"], "1/255")
        for key, sides in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
            self._check_side(e, key, sides)
        result = ImageSettings(
            size=self.size,
            mean=_channels(e, "image_mean", CLIP_MEAN),
            std=_channels(e, "image_std", CLIP_STD),
            aspect="pad" if e.flag("do_pad", False) else self.aspect,
        )
        e.refuse_strangers(_HARMLESS)
        return result

    def _check_side(self, e: Entries, key: str, sides: tuple[str, ...]) -> None:
        """Old files give one number, newer ones an object."""
        e.seen.add(key)
        value = e.values.get(key)
        value = 224 if value is None else value
        if value not in (self.size, dict.fromkeys(sides, self.size)):
            allowed = f"{dict.fromkeys(sides, self.size)} like vision_config.image_size"
            raise e.error(key, value, allowed, "correct the file")


def _channels(
    e: Entries, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    e.seen.add(key)
    value: Any = e.values.get(key)
    if value is None:
        return default
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(x, int | float) and 0 < x <= 1 for x in value)
    ):
        raise e.error(key, value, "three numbers above 0 and at most 1", "correct the file")
    red, green, blue = value
    return float(red), float(green), float(blue)
