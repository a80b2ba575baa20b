"""The small files of a checkpoint -> Processor: those of the tokenizer (tokenizer_files.py), of the
prompt (prompt_files.py) and of the image processor (image_config.py).

Missing entries get transformers' defaults. An entry that asks for something this code does not
compute is refused, never ignored.
"""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..processing.processor import Processor
from ..processing.templates import IMAGE
from .image_config import pads_images, read_image_config
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
        "pad" if pads_images(folder) else config.image_aspect,
        read_template(folder, "vicuna_v1" if config.image_aspect == "pad" else "llava-hf"),
    )
