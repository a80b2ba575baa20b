"""CLIP vision towers as others store them -> the names and numbers of the llava-hf layout.

Three ways of naming are read: Hugging Face's (a CLIPVisionModel, or a whole CLIPModel, whose text
tower is left out), open_clip's, and OpenAI's own, which open_clip took over. The latter two have
query, key and value in one matrix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillava.image import ImageConfig
from minillava.loading.json_entries import Entries, read_json
from minillava.loading.processor_files import read_image_config

from .download import fetch_tower
from .sources import ENDINGS, Weight, shards_in, weights_of

TOWER = "vision_tower.vision_model."
OPEN_CLIP_CONFIG = "open_clip_config.json"

_HEAD = 64  # width of a head in every CLIP of OpenAI and in open_clip unless it says otherwise
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

# open_clip's name -> Hugging Face's, below visual. and vision_model. ; {} is a block's number
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

# What a CLIP has beside its vision transformer, in any of the three.
_BESIDE = re.compile(
    r"(text_model|transformer|text|text_projection|visual_projection|token_embedding|ln_final)\..*"
    r"|(positional_embedding|text_projection|visual\.proj|logit_scale|logit_bias|attn_mask)"
    r"|(input_resolution|context_length|vocab_size)"
    r"|(vision_model\.)?embeddings\.position_ids"
)


@dataclass(frozen=True)
class Tower:
    """A vision tower's weights, what config.json says of it, and how pictures are made for it."""

    where: str
    parts: Mapping[str, Part]
    config: dict[str, Any]
    image: ImageConfig


@dataclass(frozen=True)
class Part:
    """A tensor of the tower: all of a stored one, or the third of it that begins at `first`."""

    weight: Weight
    shape: tuple[int, ...]
    first: int = 0


def find_tower(name: str, beside: Path | None = None) -> Path:
    """The folder or file that is meant: a path (also relative to `beside`), or a hub id."""
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
    """A CLIP of its own, from a folder or from one file of weights."""
    folder = None if path.is_file() else path
    files = [path] if folder is None else _files(folder)
    parts = tower_parts([(w.name, w) for file in files for w in weights_of(file)])
    if not any(name.startswith(TOWER) for name in parts):
        raise ValueError(f"{path} has no vision tower of a CLIP in it; give one that has")
    config = vision_config(folder, parts)
    return Tower(str(path), parts, config, _image(folder, config))


def inner_tower(weights: Iterable[tuple[str, Weight]], name: str, beside: Path) -> Tower:
    """One inside a checkpoint, with its names in a CLIP: that which the config calls `name`."""
    folder = next((p for p in (beside / name, Path(name)) if name and p.is_dir()), None)
    parts = tower_parts(weights)
    config = vision_config(folder, parts)
    return Tower(str(beside), parts, config, _image(folder, config))


def tower_parts(weights: Iterable[tuple[str, Weight]]) -> dict[str, Part]:
    """Tensors with their names in a CLIP -> by those of the llava-hf layout.

    Unknown ones keep their names, for the error about them.
    """
    weights = [(name, weight) for name, weight in weights if not _BESIDE.fullmatch(name)]
    open_clip = any(name.startswith("visual.") for name, _ in weights)
    parts: dict[str, Part] = {}
    for published, weight in weights:
        name = _open_clip_name(published) if open_clip else _hugging_face_name(published)
        if ".qkv." not in name:
            place(parts, name, Part(weight, weight.shape))
        elif not weight.shape or weight.shape[0] % 3:
            place(parts, published, Part(weight, weight.shape))
        else:
            rows = weight.shape[0] // 3
            for i, letter in enumerate("qkv"):
                part = Part(weight, (rows, *weight.shape[1:]), i * rows)
                place(parts, name.replace(".qkv.", f".{letter}_proj."), part)
    return parts


def place(parts: dict[str, Part], name: str, part: Part) -> None:
    """Raises ValueError for a second tensor of one name: which of them is meant is not known."""
    if name in parts:
        first, second = parts[name].weight, part.weight
        raise ValueError(
            f"{second.file}: {second.name} is there twice, also as {first.name} in "
            f"{first.file.name}; fetch the checkpoint again into a new folder"
        )
    parts[name] = part


def vision_config(folder: Path | None, parts: Mapping[str, Part]) -> dict[str, Any]:
    """config.json's vision_config: from the files of a CLIP, else from the shapes of its tensors.

    Raises ValueError where neither says how many heads there are, and for GELU.
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
    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = parts.get(TOWER + name)
        if found is None or len(found.shape) != dims or 0 in found.shape:
            raise ValueError(
                f"the vision tower's {name} is {'missing' if found is None else found.shape}, so "
                "its size is not known; give a whole CLIP with --vision-tower"
            )
        return found.shape

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    positions, _ = shape("embeddings.position_embedding.weight", 2)
    inner, _ = shape("encoder.layers.0.mlp.fc1.weight", 2)
    layers = {found[1] for name in parts if (found := re.search(r"\.layers\.(\d+)\.", name))}
    if width % head:
        raise ValueError(
            f"the vision tower is {width} wide, no multiple of {head}, so the number of its heads "
            "is not known; give with --vision-tower a folder that has its config.json or "
            f"{OPEN_CLIP_CONFIG}"
        )
    return _DEFAULTS | {
        "hidden_size": width,
        "image_size": round((positions - 1) ** 0.5) * patch,
        "intermediate_size": inner,
        "num_attention_heads": width // head,
        "num_hidden_layers": len(layers),
        "patch_size": patch,
    }


def _image(folder: Path | None, config: Mapping[str, Any]) -> ImageConfig:
    size = int(config["image_size"])
    if folder is None:
        return ImageConfig(size, size)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        stated = _entries(folder / OPEN_CLIP_CONFIG).section("preprocess_cfg", {})
        usual = ImageConfig()
        mean, std = _colour(stated, "mean", usual.mean), _colour(stated, "std", usual.std)
        return ImageConfig(size, size, mean=mean, std=std)
    return read_image_config(folder, size)


def _colour(e: Entries, key: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    value = e.values.get(key) or usual
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 3 or (key == "std" and 0 in value):
        raise e.error(key, value, "three numbers (std: none of them 0)")
    return tuple(value)


def _files(folder: Path) -> list[Path]:
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
                "give the one that is meant with --vision-tower"
            )
    raise ValueError(f"{folder} has no weights of a CLIP ({', '.join(ENDINGS)}); fetch them")


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
