"""The small files of a checkpoint -> Processor: those of the tokenizer (tokenizer_files.py), of the
prompt (prompt_files.py) and preprocessor_config.json.

Missing entries get transformers' defaults. An entry that asks for something this code does not
compute is refused, never ignored.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..config import Config
from ..processing.image import ImageConfig
from ..processing.processor import Processor
from ..processing.templates import IMAGE
from .json_entries import Entries, read_json
from .prompt_files import check_placeholders, read_template
from .tokenizer_files import read_tokenizer


def read_processor(folder: str | Path, config: Config) -> Processor:
    """Read the processor of a checkpoint.

    image_aspect_ratio "pad" in config.json means that the checkpoint was converted from the
    original LLaVA layout, so without a chat template it gets that code's vicuna_v1. Raises
    ValueError if the files do not fit each other.
    """
    tokenizer = read_tokenizer(folder, config.image_token_id)
    if tokenizer.image_id != config.image_token_id:
        raise ValueError(
            f"{folder}: {IMAGE} has id {tokenizer.image_id} in the tokenizer's files, but "
            f"{config.image_token_id} in config.json; take both from one checkpoint"
        )
    if len(tokenizer) > config.text.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer's ids go up to {len(tokenizer) - 1}, but the model has "
            f"vocab_size={config.text.vocab_size}; take both from one checkpoint"
        )
    check_placeholders(folder, config)
    return Processor(
        tokenizer,
        read_image_config(folder, config.vision.image_size),
        config.vision.num_patches,
        config.image_aspect,
        read_template(folder, "vicuna_v1" if config.image_aspect == "pad" else "llava-hf"),
    )


# ---------------------------------------------------------------- images


def read_image_config(folder: str | Path, image_size: int) -> ImageConfig:
    """Read preprocessor_config.json, or else the image_processor of processor_config.json.

    Without either, CLIP's settings at the vision tower's `image_size` are used. Raises ValueError
    for settings that this code does not compute; it names the file, the entry, its value, what is
    allowed and what to do.
    """
    own, nested = (Path(folder) / f"{n}_config.json" for n in ("preprocessor", "processor"))
    if own.is_file():
        entries = Entries(str(own), "", read_json(own))
    elif nested.is_file():
        entries = Entries(str(nested), "", read_json(nested)).section("image_processor", {})
    else:
        return ImageConfig(image_size, image_size)
    return (
        _parse_image_config(entries, image_size)
        if entries.values
        else ImageConfig(image_size, image_size)
    )


def _parse_image_config(e: Entries, image_size: int) -> ImageConfig:
    """Missing entries get the defaults of transformers' CLIPImageProcessor."""
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        e.only(key, (True,), True)
    e.only("do_pad", (False,), False, "leave it out and ask for image_aspect='pad'")
    kinds = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
    e.only("image_processor_type", kinds, kinds[0])
    e.only("feature_extractor_type", ("CLIPFeatureExtractor", *kinds), kinds[0])
    crop, size = (
        _parse_side(e, "crop_size", ("height", "width")),
        _parse_side(e, "size", ("shortest_edge",)),
    )
    if crop != image_size:
        raise e.error("crop_size", crop, f"{image_size} like vision_config.image_size")
    if size < crop:
        raise e.error("size", size, f"at least {crop} like crop_size")
    filters = tuple(f.value for f in Image.Resampling if f != Image.Resampling.NEAREST)
    config = ImageConfig(
        size=size,
        crop=crop,
        resample=e.only("resample", filters, Image.Resampling.BICUBIC.value),
        mean=_parse_colour(e, "image_mean", ImageConfig.mean),
        std=_parse_colour(e, "image_std", ImageConfig.std),
        rescale=e.number("rescale_factor", 1 / 255),
    )
    # Read by transformers' loading code, or without influence on the pixels.
    e.seen.update(("processor_class", "data_format", "input_data_format", "return_tensors"))
    e.seen.update(("default_to_square", "device", "disable_grouping", "image_seq_length"))
    e.refuse_strangers()
    return config


def _parse_side(e: Entries, key: str, names: tuple[str, ...]) -> int:
    """A length given as one number (old files) or as the same number under each of `names`."""
    e.seen.add(key)
    value = e.values.get(key, 224)
    side = value[names[0]] if isinstance(value, dict) and names[0] in value else value
    if value not in (side, dict.fromkeys(names, side)) or type(side) is not int or side < 1:
        allowed = f"pixels as one number, or the same number under {' and '.join(names)}"
        raise e.error(key, value, allowed)
    return side


def _parse_colour(e: Entries, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    e.seen.add(key)
    value = e.values.get(key, default)
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 3 or (key == "image_std" and 0 in value):
        raise e.error(key, value, "three numbers (std: none of them 0)")
    return tuple(float(v) for v in value)
