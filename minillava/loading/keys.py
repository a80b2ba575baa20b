"""The names of tensors in published checkpoints and in our model, as one table (KEYS)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

# Name in the llava-hf repositories on the hub -> name in our model. {} stands for a layer's number
# and * for the rest of a name. None: left out on purpose. The first match wins.
KEYS: dict[str, str | None] = {
    "vision_tower.vision_model.embeddings.position_ids": None,  # 0, 1, 2, ...
    "vision_tower.vision_model.embeddings.class_embedding": "vision.class_embedding",
    "vision_tower.vision_model.embeddings.patch_embedding.*": "vision.patch_embedding.*",
    "vision_tower.vision_model.embeddings.position_embedding.*": "vision.position_embedding.*",
    "vision_tower.vision_model.pre_layrnorm.*": "vision.norm_pre.*",  # their spelling
    "vision_tower.vision_model.encoder.layers.{}.layer_norm1.*": "vision.blocks.{}.norm1.*",
    "vision_tower.vision_model.encoder.layers.{}.self_attn.*": "vision.blocks.{}.attn.*",
    "vision_tower.vision_model.encoder.layers.{}.layer_norm2.*": "vision.blocks.{}.norm2.*",
    "vision_tower.vision_model.encoder.layers.{}.mlp.*": "vision.blocks.{}.mlp.*",
    "vision_tower.vision_model.post_layernorm.*": "vision.norm_post.*",
    "multi_modal_projector.*": "projector.*",
    "language_model.model.embed_tokens.*": "llama.embed_tokens.*",
    "language_model.model.rotary_emb.inv_freq": None,  # computed from the config
    "language_model.model.layers.{}.self_attn.rotary_emb.inv_freq": None,
    "language_model.model.layers.{}.input_layernorm.*": "llama.blocks.{}.norm1.*",
    "language_model.model.layers.{}.self_attn.*": "llama.blocks.{}.attn.*",
    "language_model.model.layers.{}.post_attention_layernorm.*": "llama.blocks.{}.norm2.*",
    "language_model.model.layers.{}.mlp.*": "llama.blocks.{}.mlp.*",
    "language_model.model.norm.*": "llama.norm.*",
    "language_model.lm_head.*": "llama.lm_head.*",
}

# Spellings that other versions write -> the spelling of the keys above. The first match wins.
SPELLINGS: dict[str, str] = {
    "vision_tower.vision_model.*": "vision_tower.vision_model.*",
    "vision_tower.*": "vision_tower.vision_model.*",  # written by transformers 5
    "model.vision_tower.vision_model.*": "vision_tower.vision_model.*",
    "model.vision_tower.*": "vision_tower.vision_model.*",  # modules in transformers 5
    "model.multi_modal_projector.*": "multi_modal_projector.*",
    "model.language_model.*": "language_model.model.*",
    "lm_head.*": "language_model.lm_head.*",
    "*": "*",
}


def our_name(published: str) -> str | None:
    """Translate a published name into ours; None if it is left out. Raises KeyError if unknown."""
    name = _translate(published, SPELLINGS.items())
    return None if name is None else _translate(name, KEYS.items())


def published_name(ours: str) -> str:
    """Translate our name into that of the llava-hf repositories on the hub."""
    rows = [(to, name) for name, to in KEYS.items() if to is not None]
    return str(_translate(ours, rows))


def _translate(name: str, rows: Iterable[tuple[str, str | None]]) -> str | None:
    for pattern, to in rows:
        if found := _regex(pattern).fullmatch(name):
            parts = {"layer": "", "rest": ""} | found.groupdict()
            return to and to.replace("{}", parts["layer"]).replace("*", parts["rest"])
    raise KeyError(name)


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    layer, rest = r"(?P<layer>\d+)", r"(?P<rest>.+)"
    return re.compile(re.escape(pattern).replace(r"\{\}", layer).replace(r"\*", rest))
