"""preprocessor_config.json or processor_config.json -> ImageConfig, and whether to pad pictures.

transformers reads the image_processor of processor_config.json if it is there, and otherwise
preprocessor_config.json. Its processors are CLIP's and LLaVA's own, which differ in do_pad alone:
LLaVA's pads the picture to a square of the mean colour, which is our aspect "pad"; CLIP's pads the
finished squares, which changes nothing. The tables say what becomes of each entry; entries that
are in none are read by neither. A missing entry gets the default of both; one that is null does
not, and is refused where the computation needs a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.image import ImageConfig
from .json_entries import Entries, Followed, Only, Table, Unused, read_json
from .regular_files import is_present

_CLIP = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
_LLAVA = ("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil")

_ARRAYS = Unused("how an array is laid out, while pictures are PIL images here")
_TORCHVISION = Unused("for the form on torchvision; the PIL form is the reference")

IMAGES: Table = {
    "image_processor_type": Followed(),
    "feature_extractor_type": Followed(),
    "size": Followed(),
    "crop_size": Followed(),
    "resample": Followed(),
    "rescale_factor": Followed(),
    "image_mean": Followed(),
    "image_std": Followed(),
    "do_pad": Followed(),
    "pad_size": Followed(),
    "default_to_square": Followed(),
    "do_resize": Only((True,)),
    "do_center_crop": Only((True,)),
    "do_rescale": Only((True,)),
    "do_normalize": Only((True,)),
    "do_convert_rgb": Only((True,)),
    "use_square_size": Only((None, False)),
    "data_format": _ARRAYS,
    "input_data_format": _ARRAYS,
    "return_tensors": _ARRAYS,
    "device": _TORCHVISION,
    "disable_grouping": _TORCHVISION,
    "image_seq_length": Unused("the number of placeholders follows from the tower"),
    "auto_map": Followed(),  # its classes are only used with trust_remote_code
    "processor_class": Unused("names the class around tokenizer and image processor"),
}

# Beside image_processor in processor_config.json.
PROCESSOR: Table = {
    "image_processor": Followed(),
    "image_token": Only((None, "<image>")),
    "patch_size": Unused("only the tower's gives as many placeholders as it has patches"),
    "num_additional_image_tokens": Unused("only 1 gives as many placeholders as patches"),
    "vision_feature_select_strategy": Unused("only 'default' gives as many as patches"),
}


def read_image_config(folder: str | Path, image_size: int) -> ImageConfig:
    """Read how pictures become pixels.

    Without either file, CLIP's settings at the vision tower's `image_size` are used. Raises
    ValueError for settings that this code does not compute; it names the file, the entry, its
    value, what is allowed and what to do.
    """
    e = _find_entries(Path(folder))
    if e is None:
        return ImageConfig(image_size, image_size)
    e.check(IMAGES)
    _refuse_nulls(e)
    crop, size = _parse_crop(e), _parse_size(e)
    if crop != image_size:
        raise e.error("crop_size", crop, f"{image_size} like vision_config.image_size")
    if size < crop:
        raise e.error("size", size, f"at least {crop} like crop_size")
    filters = [f.value for f in Image.Resampling if f != Image.Resampling.NEAREST]
    return ImageConfig(
        size=size,
        crop=crop,
        resample=e.integer("resample", Image.Resampling.BICUBIC, min(filters), max(filters)),
        mean=_parse_colour(e, "image_mean", ImageConfig.mean, least=-_MOST),
        std=_parse_colour(e, "image_std", ImageConfig.std, least=1 / _MOST),
        rescale=e.number("rescale_factor", 1 / 255, _MOST, 1 / _MOST),
    )


def pads_images(folder: str | Path) -> bool:
    """Whether the checkpoint's image processor pads pictures to a square."""
    e = _find_entries(Path(folder))
    if e is None:
        return False
    pads = e.flag("do_pad", False)
    if _parse_kind(e) in _LLAVA:
        return pads
    padded = e.values.get("pad_size")
    if pads and padded is not None:
        raise e.error("pad_size", padded, "absent", "remove it")
    return False


_MOST = 1e6  # bound of numbers that pixels are scaled by


def _find_entries(folder: Path) -> Entries | None:
    nested, own = (folder / f"{name}_config.json" for name in ("processor", "preprocessor"))
    if is_present(nested):
        outer = Entries(str(nested), "", read_json(nested))
        outer.check(PROCESSOR)
        if outer.values.get("image_processor") is not None:
            return outer.section("image_processor", {})
    return Entries(str(own), "", read_json(own)) if is_present(own) else None


def _refuse_nulls(e: Entries) -> None:
    """In transformers null does not mean the default here: a step that is null is left out."""
    steps = {key for key in IMAGES if key.startswith("do_") and key != "do_pad"}
    values = {"size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"}
    for key, value in e.values.items():
        if value is None and key in steps | values:
            raise e.error(key, value, "absent or a value", "remove the entry from the file")


def _parse_kind(e: Entries) -> str:
    """The class: image_processor_type, else feature_extractor_type, else LLaVA's own.

    Beside code for an image processor, feature_extractor_type is not asked for.
    """
    old = e.only("feature_extractor_type", (None, "CLIPFeatureExtractor", *_CLIP, *_LLAVA), None)
    kind = e.only("image_processor_type", (None, *_CLIP, *_LLAVA), None)
    if "AutoImageProcessor" in e.section("auto_map", {}).values:
        old = None
    return str(kind or (old or _LLAVA[0]).replace("FeatureExtractor", "ImageProcessor"))


def _parse_crop(e: Entries) -> int:
    """crop_size: one number (old files), or the same number as height and width."""
    e.seen.add("crop_size")
    value = e.values.get("crop_size", 224)
    side = value.get("height") if isinstance(value, Mapping) else value
    square = not isinstance(value, Mapping) or value == {"height": side, "width": side}
    return _check_side(e, "crop_size", value, side, square, "height and width")


def _parse_size(e: Entries) -> int:
    """size: the shorter side after the resize, as one number (old files) or as shortest_edge.

    With do_pad the picture is square, so the same height and width mean the same.
    """
    e.seen.update(("size", "default_to_square"))
    value = e.values.get("size", {"shortest_edge": 224})
    if e.only("default_to_square", (None, False, True), False) and not isinstance(value, Mapping):
        value = {"height": value, "width": value}
    side = next(iter(value.values()), None) if isinstance(value, Mapping) else value
    allowed: list[Any] = [side, {"shortest_edge": side}]
    if _parse_kind(e) in _LLAVA and e.flag("do_pad", False):
        allowed.append({"height": side, "width": side})
    return _check_side(e, "size", value, side, value in allowed, "shortest_edge")


def _check_side(e: Entries, key: str, value: object, side: object, fits: bool, names: str) -> int:
    if not fits or type(side) is not int or not 1 <= side <= _LONGEST:
        allowed = f"pixels as one number, or the same number under {names}, at most {_LONGEST}"
        raise e.error(key, value, allowed)
    return side


_LONGEST = 10**5  # pixels of a side


def _parse_colour(
    e: Entries, key: str, default: tuple[float, ...], least: float
) -> tuple[float, ...]:
    """A number for each of red, green and blue."""
    e.seen.add(key)
    value = e.values.get(key, default)
    numbers = isinstance(value, list | tuple) and all(
        type(v) in (int, float) and least <= v <= _MOST for v in value
    )
    if not numbers or len(value) != 3:
        raise e.error(key, value, f"three numbers from {least:g} to {_MOST:g}")
    return tuple(float(v) for v in value)
