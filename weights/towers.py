"""Read CLIP vision towers of other libraries with the names and config of the llava-hf layout.

Two naming schemes are read: Hugging Face's (a CLIPVisionModel, or a whole CLIPModel, whose text
tower is skipped) and OpenAI's, which open_clip uses too. In the latter, query, key and value are
one matrix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillava.loading.image_config import read_image_config
from minillava.loading.json_entries import Entries, read_json
from minillava.processing.image import ImageConfig

from .download import fetch_tower
from .sources import ENDINGS, Weight, shards_in, weights_of

TOWER = "vision_tower.vision_model."
OPEN_CLIP_CONFIG = "open_clip_config.json"

_HEAD = 64  # width of a head: in all of OpenAI's CLIPs, and open_clip's default
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

# open_clip's name below visual. -> Hugging Face's below vision_model. ({}: number of the block)
_OPEN_CLIP = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.*": "pre_layrnorm.*",
    "ln_post.*": "post_layernorm.*",
    "transformer.resblocks.{}.ln_1.*": "encoder.layers.{}.layer_norm1.*",
    "transformer.resblocks.{}.ln_2.*": "encoder.layers.{}.layer_norm2.*",
    "transformer.resblocks.{}.attn.in_proj_*": "encoder.layers.{}.self_attn.qkv.*",
    "transformer.resblocks.{}.attn.out_proj.*": "encoder.layers.{}.self_attn.out_proj.*",
    "transformer.resblocks.{}.mlp.c_fc.*": "encoder.layers.{}.mlp.fc1.*",
    "transformer.resblocks.{}.mlp.c_proj.*": "encoder.layers.{}.mlp.fc2.*",
}

# Tensors of a CLIP that are not part of its vision transformer, in both schemes.
_NOT_VISION = re.compile(
    r"(text_model|transformer|text|text_projection|visual_projection|token_embedding|ln_final)\..*"
    r"|(positional_embedding|text_projection|visual\.proj|logit_scale|logit_bias|attn_mask)"
    r"|(input_resolution|context_length|vocab_size)"
    r"|(vision_model\.)?embeddings\.position_ids"
)


@dataclass(frozen=True)
class Tower:
    """A vision tower."""

    where: str  # its file or folder
    parts: Mapping[str, Part]  # name in the llava-hf layout -> tensor
    config: dict[str, Any]  # vision_config of config.json
    image: ImageConfig  # preprocessing


@dataclass(frozen=True)
class Part:
    """Rows `first` to `first + shape[0]` of a stored tensor: all of it, or q, k or v of a qkv."""

    weight: Weight
    shape: tuple[int, ...]
    first: int = 0


def find_tower(name: str, beside: Path | None = None) -> Path:
    """Find a CLIP by its path (also relative to the folder `beside`) or download it by its hub id.

    Raises ValueError if the name is neither.
    """
    for path in (*([beside / name] if beside else ()), Path(os.path.expanduser(name))):
        if path.exists():
            return path
    if _HUB_ID.fullmatch(name):
        return fetch_tower(name)
    raise ValueError(
        f"the vision tower {name!r} is neither a folder or file here nor a hub id; give it with "
        "--vision-tower: a folder, a file of weights, or openai/clip-vit-large-patch14-336"
    )


def read_tower(path: Path) -> Tower:
    """Read a CLIP's vision tower from a folder or from one file of weights.

    Raises ValueError if there is none, and as `vision_config` does.
    """
    folder = None if path.is_file() else path
    files = [path] if folder is None else _weight_files(folder)
    parts = tower_parts([(w.name, w) for file in files for w in weights_of(file)])
    if not any(name.startswith(TOWER) for name in parts):
        raise ValueError(f"{path} contains no vision tower of a CLIP; give one that does")
    config = vision_config(folder, parts)
    return Tower(str(path), parts, config, _image_config(folder, config))


def inner_tower(weights: Iterable[tuple[str, Weight]], name: str, beside: Path) -> Tower:
    """Read the vision tower inside a checkpoint from its (name in a CLIP, tensor) pairs.

    Its config is read from the CLIP folder `name` (also relative to `beside`) if that exists, else
    it is derived from the shapes.
    """
    folder = next((p for p in (beside / name, Path(name)) if name and p.is_dir()), None)
    parts = tower_parts(weights)
    config = vision_config(folder, parts)
    return Tower(str(beside), parts, config, _image_config(folder, config))


def tower_parts(weights: Iterable[tuple[str, Weight]]) -> dict[str, Part]:
    """Translate (name in a CLIP, tensor) pairs to name in the llava-hf layout -> tensor.

    A qkv matrix becomes three parts. Unknown tensors keep their names, so that the check of all
    names lists them.
    """
    weights = [(name, weight) for name, weight in weights if not _NOT_VISION.fullmatch(name)]
    open_clip = any(name.startswith("visual.") for name, _ in weights)
    parts: dict[str, Part] = {}
    for published, weight in weights:
        name = _open_clip_name(published) if open_clip else _hugging_face_name(published)
        if ".qkv." not in name:
            add_part(parts, name, Part(weight, weight.shape))
        elif not weight.shape or weight.shape[0] % 3:
            add_part(parts, published, Part(weight, weight.shape))
        else:
            rows = weight.shape[0] // 3
            for i, letter in enumerate("qkv"):
                part = Part(weight, (rows, *weight.shape[1:]), i * rows)
                add_part(parts, name.replace(".qkv.", f".{letter}_proj."), part)
    return parts


def add_part(parts: dict[str, Part], name: str, part: Part) -> None:
    """Add a tensor. Raises ValueError if there is one of that name already."""
    if name in parts:
        first, second = parts[name].weight, part.weight
        raise ValueError(
            f"{second.file}: {second.name} is there twice, also as {first.name} in "
            f"{first.file.name}; download the checkpoint again into a new folder"
        )
    parts[name] = part


def vision_config(folder: Path | None, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return config.json's vision_config, from the files of a CLIP or else from tensor shapes.

    Raises ValueError if neither determines the number of heads, and if the activation is GELU and
    not QuickGELU.
    """
    head = _HEAD
    if folder is not None and (folder / OPEN_CLIP_CONFIG).is_file():
        stated = _entries(folder / OPEN_CLIP_CONFIG).section("model_cfg", {})
        if stated.only("quick_gelu", (True,), None, "give OpenAI's CLIP") is None:
            raise stated.error("quick_gelu", None, "True", "give OpenAI's CLIP")
        head = stated.section("vision_cfg", {}).integer("head_width", head)
    elif folder is not None and (folder / "config.json").is_file():
        entries = _entries(folder / "config.json")
        if entries.values.get("model_type") == "clip":
            entries = entries.section("vision_config", {})
        return {
            key: entries.integer(key, default)
            if isinstance(default, int)
            else entries.values.get(key) or default
            for key, default in _DEFAULTS.items()
        }
    return _from_shapes(parts, head)


def _entries(path: Path) -> Entries:
    return Entries(str(path), "", read_json(path))


_DEFAULTS = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 32,
    "projection_dim": 512,
}


def _from_shapes(parts: Mapping[str, Part], head: int) -> dict[str, Any]:
    """Derive vision_config from tensor shapes, with heads of width `head`."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = parts.get(TOWER + name)
        if found is None or len(found.shape) != dims or 0 in found.shape:
            raise ValueError(
                f"the vision tower's {name} is {'missing' if found is None else found.shape}, so "
                "its size is unknown; give a whole CLIP with --vision-tower"
            )
        return found.shape

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    positions, _ = shape("embeddings.position_embedding.weight", 2)
    inner, _ = shape("encoder.layers.0.mlp.fc1.weight", 2)
    layers = {found[1] for name in parts if (found := re.search(r"\.layers\.(\d+)\.", name))}
    if width % head:
        raise ValueError(
            f"the vision tower is {width} wide, not a multiple of {head}, so its number of "
            "heads is unknown; give a folder with its config.json or "
            f"{OPEN_CLIP_CONFIG} with --vision-tower"
        )
    return _DEFAULTS | {
        "hidden_size": width,
        "image_size": round((positions - 1) ** 0.5) * patch,
        "intermediate_size": inner,
        "num_attention_heads": width // head,
        "num_hidden_layers": len(layers),
        "patch_size": patch,
    }


def _image_config(folder: Path | None, config: Mapping[str, Any]) -> ImageConfig:
    """The preprocessing that the CLIP's folder states, with OpenAI's values for missing entries."""
    size = int(config["image_size"])
    if folder is None:
        return ImageConfig(size, size)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        stated = _entries(folder / OPEN_CLIP_CONFIG).section("preprocess_cfg", {})
        default = ImageConfig()
        mean, std = _rgb(stated, "mean", default.mean), _rgb(stated, "std", default.std)
        return ImageConfig(size, size, mean=mean, std=std)
    return read_image_config(folder, size)


def _rgb(e: Entries, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A mean or std of three numbers."""
    value = e.values.get(key) or default
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 3 or (key == "std" and 0 in value):
        raise e.error(key, value, "three numbers (std: none of them 0)")
    return tuple(value)


def _weight_files(folder: Path) -> list[Path]:
    """The weight files in a CLIP's folder. Raises ValueError if it has none, or several models."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        own = [folder / f"open_clip_{name}" for name in ("model.safetensors", "pytorch_model.bin")]
        if found := [path for path in own if path.is_file()]:
            return found[:1]
    if shards := shards_in(folder):
        return shards
    for ending in ENDINGS:
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) == 1:
            return found
        if found:
            raise ValueError(
                f"{folder} has several files of weights ({', '.join(f.name for f in found[:3])}); "
                "give one of them with --vision-tower"
            )
    raise ValueError(f"{folder} has no weights of a CLIP ({', '.join(ENDINGS)}); download them")


# ---------------------------------------------------------------- names


def _hugging_face_name(name: str) -> str:
    bare = re.fullmatch(r"(embeddings|encoder|pre_layrnorm|post_layernorm)\..+", name)
    return TOWER + (name if bare else name.removeprefix("vision_model."))


def _open_clip_name(name: str) -> str:
    inner = name.removeprefix("visual.")
    for pattern, to in _OPEN_CLIP.items():
        regex = re.escape(pattern).replace(r"\{\}", r"(?P<n>\d+)").replace(r"\*", "(?P<rest>.+)")
        if found := re.fullmatch(regex, inner):
            parts = {"n": "", "rest": ""} | found.groupdict()
            return TOWER + to.replace("{}", parts["n"]).replace("*", parts["rest"])
    return name
