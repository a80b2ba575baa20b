"""The small files of a checkpoint -> Processor: tokenizer.model with the json files beside it. The
settings of pictures are read by image_config.py.

Missing entries get transformers' defaults. An entry that asks for something this code does not
compute is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..processing.processor import Processor
from ..processing.templates import IMAGE
from ..processing.tokenizer import Tokenizer
from .image_config import pads_images, read_image_config
from .json_entries import Entries, read_json


def read_processor(folder: str | Path, config: Config) -> Processor:
    """Read the processor of a checkpoint.

    image_aspect_ratio "pad" in config.json means that the checkpoint was converted from the
    original LLaVA layout, so it gets that code's vicuna_v1 template. Raises ValueError if the files
    do not fit each other.
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
    return Processor(
        tokenizer,
        read_image_config(folder, config.vision.image_size),
        config.vision.num_patches,
        "pad" if pads_images(folder) else config.image_aspect,
        "vicuna_v1" if config.image_aspect == "pad" else "llava-hf",
    )


# ---------------------------------------------------------------- tokenizer


def read_tokenizer(folder: str | Path, image_id: int) -> Tokenizer:
    """Read a checkpoint's tokenizer.model and the json files beside it.

    image_id: the id of <image> if no file gives one. Raises ValueError for missing files and for
    settings that this code does not support.
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
    """From the first of the three files that has any: transformers versions use different ones."""
    return dict(_read_tokenizer_json(folder / "tokenizer.json")) or (
        dict(_read_tokens_decoder(config)) or dict(_read_added_tokens(folder / "added_tokens.json"))
    )


def _read_tokenizer_json(path: Path) -> Iterator[tuple[str, int]]:
    if path.is_file():
        for token in read_json(path).get("added_tokens") or ():
            yield _check_token(path, token, token.get("id"))


def _read_tokens_decoder(config: Entries) -> Iterator[tuple[str, int]]:
    for number, token in config.section("added_tokens_decoder", {}).values.items():
        yield _check_token(
            Path(config.source), token, int(number) if number.isdecimal() else number
        )


def _read_added_tokens(path: Path) -> Iterator[tuple[str, int]]:
    if path.is_file():
        for content, number in read_json(path).items():
            yield _check_token(path, {"content": content}, number)


def _check_token(path: Path, token: Mapping[str, Any], number: object) -> tuple[str, int]:
    content = token.get("content")
    flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
    if flags or not isinstance(content, str) or not content or type(number) is not int:
        raise ValueError(
            f"{path}: the added token {content!r} with id {number!r} {' and '.join(flags)} is not "
            "supported, only plain tokens with an id are; use the files of llava-hf/llava-1.5-7b-hf"
        )
    return content, number
