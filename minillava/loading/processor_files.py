"""The small files of a checkpoint's folder -> Processor: tokenizer.model with the json files beside
it, and preprocessor_config.json.

Absent entries are what transformers takes them to be; what this code does not compute is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import Config
from ..image import ImageConfig
from ..processor import Processor
from ..prompt import IMAGE
from ..tokenizer import Tokenizer
from .json_entries import Entries, read_json


def read_processor(folder: str | Path, config: Config) -> Processor:
    """Of a checkpoint. One made for padded pictures was converted from the original layout,
    and speaks vicuna_v1. Raises ValueError for files that do not fit each other."""
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
    return Processor(
        tokenizer,
        read_image_config(folder, config.vision.image_size),
        config.vision.num_patches,
        config.image_aspect,
        "vicuna_v1" if config.image_aspect == "pad" else "llava-hf",
    )


# ---------------------------------------------------------------- ids


def read_tokenizer(folder: str | Path, image_id: int) -> Tokenizer:
    """Read a checkpoint's tokenizer.model and the json files beside it.

    image_id: of <image>, where no file names it. Raises ValueError for files that are missing
    or ask for something this code does not do.
    """
    folder = Path(folder)
    model = folder / "tokenizer.model"
    if not model.is_file():
        raise ValueError(
            f"there is no {model}; only SentencePiece models are read, not tokenizer.json: "
            "copy tokenizer.model from the repository that the checkpoint was made from"
        )
    path = folder / "tokenizer_config.json"
    entries = Entries(str(path), "", read_json(path) if path.is_file() else {})
    entries.only("add_bos_token", (True,), True)
    entries.only("add_eos_token", (False,), False)
    entries.only("clean_up_tokenization_spaces", (False,), False)
    padding = entries.values.get("pad_token")
    content = padding.get("content") if isinstance(padding, Mapping) else padding
    return Tokenizer(model, {IMAGE: image_id} | _added_tokens(folder, entries), content or "<unk>")


def _added_tokens(folder: Path, config: Entries) -> dict[str, int]:
    """From the first of the three places where transformers writes them that has any."""
    return dict(_listed(folder / "tokenizer.json", "added_tokens")) or (
        dict(_numbered(config)) or dict(_named(folder / "added_tokens.json"))
    )


def _listed(path: Path, key: str) -> Iterator[tuple[str, int]]:
    if path.is_file():
        for token in read_json(path).get(key) or ():
            yield _plain(path, token, token.get("id"))


def _numbered(config: Entries) -> Iterator[tuple[str, int]]:
    for number, token in config.section("added_tokens_decoder", {}).values.items():
        yield _plain(Path(config.source), token, int(number) if number.isdecimal() else number)


def _named(path: Path) -> Iterator[tuple[str, int]]:
    if path.is_file():
        for content, number in read_json(path).items():
            yield _plain(path, {"content": content}, number)


def _plain(path: Path, token: Mapping[str, Any], number: object) -> tuple[str, int]:
    content = token.get("content")
    odd = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
    if odd or not isinstance(content, str) or not content or type(number) is not int:
        raise ValueError(
            f"{path}: the added token {content!r} with id {number!r} {' and '.join(odd)} is not "
            "supported, only plain tokens with an id are; use the files of llava-hf/llava-1.5-7b-hf"
        )
    return content, number


# ---------------------------------------------------------------- pictures


def read_image_config(folder: str | Path, image_size: int) -> ImageConfig:
    """Read preprocessor_config.json, else processor_config.json, else take the vision tower's
    `image_size` and CLIP's numbers.

    Raises ValueError, naming file, entry, value, what is allowed and what to do, for settings
    that this code does not compute.
    """
    own, shared = (Path(folder) / f"{n}_config.json" for n in ("preprocessor", "processor"))
    if own.is_file():
        entries = Entries(str(own), "", read_json(own))
    elif shared.is_file():
        entries = Entries(str(shared), "", read_json(shared)).section("image_processor", {})
    else:
        return ImageConfig(image_size, image_size)
    return _image(entries, image_size) if entries.values else ImageConfig(image_size, image_size)


def _image(e: Entries, image_size: int) -> ImageConfig:
    """Absent entries are what CLIPImageProcessor takes them to be."""
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        e.only(key, (True,), True)
    e.only("do_pad", (False,), False, "leave it out and ask for image_aspect='pad'")
    kinds = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
    e.only("image_processor_type", kinds, kinds[0])
    e.only("feature_extractor_type", ("CLIPFeatureExtractor", *kinds), kinds[0])
    crop, size = _side(e, "crop_size", ("height", "width")), _side(e, "size", ("shortest_edge",))
    if crop != image_size:
        raise e.error("crop_size", crop, f"{image_size} like vision_config.image_size")
    if size < crop:
        raise e.error("size", size, f"at least {crop} like crop_size")
    filters = tuple(f.value for f in Image.Resampling if f != Image.Resampling.NEAREST)
    config = ImageConfig(
        size=size,
        crop=crop,
        resample=e.only("resample", filters, Image.Resampling.BICUBIC.value),
        mean=_colour(e, "image_mean", ImageConfig.mean),
        std=_colour(e, "image_std", ImageConfig.std),
        rescale=e.number("rescale_factor", 1 / 255),
    )
    # of the loading code, or without influence on pixels
    e.seen.update(("processor_class", "data_format", "input_data_format", "return_tensors"))
    e.seen.update(("default_to_square", "device", "disable_grouping", "image_seq_length"))
    e.refuse_strangers()
    return config


def _side(e: Entries, key: str, names: tuple[str, ...]) -> int:
    """A length that stands there as a number (old files) or once under each of `names`."""
    e.seen.add(key)
    value = e.values.get(key, 224)
    side = value[names[0]] if isinstance(value, dict) and names[0] in value else value
    if value not in (side, dict.fromkeys(names, side)) or type(side) is not int or side < 1:
        allowed = f"pixels as one number, or the same number under {' and '.join(names)}"
        raise e.error(key, value, allowed)
    return side


def _colour(e: Entries, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    e.seen.add(key)
    value = e.values.get(key, default)
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 3 or (key == "image_std" and 0 in value):
        raise e.error(key, value, "three numbers (std: none of them 0)")
    return tuple(float(v) for v in value)
