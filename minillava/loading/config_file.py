"""config.json -> Config.

Missing entries get transformers' defaults (for example rms_norm_eps 1e-6), which are not always the
dataclass defaults (1e-5, those of the 7B). An entry that asks for something this code does not
compute is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config, TextConfig, VisionConfig
from .json_entries import Entries, read_json


def read_config(path: str | Path) -> Config:
    """Read a config.json and the generation_config.json beside it, if there is one.

    Raises ValueError for an unreadable file and for a model that this code does not compute. It
    names the file, the entry, its value, what is allowed and what to do.
    """
    generation = Path(path).with_name("generation_config.json")
    return parse_config(
        read_json(path), read_json(generation) if generation.is_file() else {}, str(path)
    )


def parse_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    source: str = "config.json",
) -> Config:
    """Parse the contents of the two files. `source` is the name of config.json in errors."""
    top = Entries(source, "", config)
    _refuse_original_layout(top)
    if top.only("model_type", ("llava",), None) is None:
        raise top.error("model_type", None, "'llava'")
    top.only("projector_hidden_act", ("gelu",), "gelu")
    top.only("multimodal_projector_bias", (True,), True)
    top.only("vision_feature_select_strategy", ("default",), "default")
    _check_quantization(top)
    # Without a vision_config the tower is CLIP ViT-L/14-336; an entry missing from one that is
    # there gets the default of transformers' CLIPVisionConfig, which is a smaller model.
    vision = _parse_vision(top.section("vision_config", _VIT_L_14_336))
    text = _parse_text(top.section("text_config", {}), tied=top.flag("tie_word_embeddings", False))

    result = Config(
        vision=vision,
        text=text,
        image_token_id=_parse_image_token(top, text.vocab_size),
        vision_feature_layer=_parse_feature_layer(top, vision.num_hidden_layers),
        eos_token_ids=_parse_eos(
            top, Entries("generation_config.json", "", generation or {}), text.vocab_size
        ),
        image_aspect=_parse_aspect(top),
    )
    top.refuse_strangers()
    return result


_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def _refuse_original_layout(top: Entries) -> None:
    marks = [key for key in top.values if key.startswith("mm_")]
    if "LlavaLlamaForCausalLM" in (top.values.get("architectures") or ()):
        marks.append("architectures")
    if marks:
        raise ValueError(
            f"{top.where(marks[0])} is {top.values[marks[0]]!r}: this is a checkpoint in the "
            "original LLaVA layout, and only the llava-hf layout is read; write that with "
            "`python -m weights.convert SRC DST` (SRC: the folder with its weights)"
        )


def _check_quantization(top: Entries) -> None:
    """Accept our own quantised checkpoints, whose weights load() recognises, and no others."""
    e = top.section("quantization_config", {})
    if e.values and (e.values.get("quant_method"), e.values.get("version")) != ("minillava", 1):
        allowed = "absent, or as weights.quantise writes it (quant_method 'minillava', version 1)"
        todo = "load the checkpoint's unquantised weights"
        raise top.error("quantization_config", dict(e.values), allowed, todo)


def _parse_vision(e: Entries) -> VisionConfig:
    e.only("model_type", ("clip_vision_model",), "clip_vision_model")
    e.only("hidden_act", ("quick_gelu",), "quick_gelu")
    e.only("num_channels", (3,), 3)
    e.only("quantization_config", (None,), None, "load the checkpoint's unquantised weights")
    config = VisionConfig(
        hidden_size=e.integer("hidden_size", 768),
        intermediate_size=e.integer("intermediate_size", 3072),
        num_hidden_layers=e.integer("num_hidden_layers", 12),
        num_attention_heads=e.integer("num_attention_heads", 12),
        image_size=e.integer("image_size", 224),
        patch_size=e.integer("patch_size", 32),
        layer_norm_eps=e.number("layer_norm_eps", 1e-5),
    )
    e.multiple("hidden_size", config.hidden_size, "num_attention_heads", config.num_attention_heads)
    e.multiple("image_size", config.image_size, "patch_size", config.patch_size)
    e.refuse_strangers()
    return config


def _parse_text(e: Entries, tied: bool) -> TextConfig:
    e.only("model_type", ("llama",), "llama")
    e.only("hidden_act", ("silu",), "silu")
    e.only("attention_bias", (False,), False)
    e.only("mlp_bias", (False,), False)
    e.only("sliding_window", (None, False), None)
    e.only("quantization_config", (None,), None, "load the checkpoint's unquantised weights")
    hidden_size = e.integer("hidden_size", 4096)
    heads = e.integer("num_attention_heads", 32)
    kv_heads = e.integer("num_key_value_heads", heads)
    e.multiple("hidden_size", hidden_size, "num_attention_heads", heads)
    e.multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = e.integer("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise e.error("head_dim", head_dim, "an even number (rotary embedding rotates pairs)")
    theta, factor = _parse_rope(e)
    config = TextConfig(
        hidden_size=hidden_size,
        intermediate_size=e.integer("intermediate_size", 11008),
        num_hidden_layers=e.integer("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=e.integer("vocab_size", 32000),
        rms_norm_eps=e.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_factor=factor,
        max_position_embeddings=e.integer("max_position_embeddings", 2048),
        # Either of two entries ties them, as in transformers; files differ in which one they set.
        tie_word_embeddings=e.flag("tie_word_embeddings", False) or tied,
    )
    e.refuse_strangers()
    return config


def _parse_rope(e: Entries) -> tuple[float, float]:
    """Base and linear factor, from rope_theta and rope_scaling or from rope_parameters.

    If a file has both, rope_scaling wins, and a rope_theta inside it, as in transformers.
    """
    theta = e.number("rope_theta", 10000.0)
    name = "rope_scaling" if e.values.get("rope_scaling") else "rope_parameters"
    e.seen.update(("rope_scaling", "rope_parameters"))
    r = e.section(name, {})
    old_kind = r.only("type", ("default", "linear"), "default")
    kind = r.only("rope_type", ("default", "linear"), old_kind)
    if r.values.get("type") not in (None, kind):
        raise r.error("type", old_kind, f"{kind!r} like rope_type beside it")
    factor = r.number("factor", 1.0 if kind == "default" else None, minimum=1.0)
    if kind == "default" and factor != 1.0:
        raise r.error("factor", factor, "1.0, or rope_type 'linear'")
    r.only("partial_rotary_factor", (1,), 1)
    theta = r.number("rope_theta", theta)
    r.refuse_strangers()
    return theta, factor


def _parse_image_token(top: Entries, vocab_size: int) -> int:
    index = top.integer("image_token_index", 32000, minimum=0)
    token = top.integer("image_token_id", index, minimum=0)
    if top.values.get("image_token_index") not in (None, token):
        raise top.error("image_token_id", token, f"{index} like image_token_index beside it")
    if token >= vocab_size:
        key = "image_token_id" if top.values.get("image_token_id") else "image_token_index"
        raise top.error(key, token, f"an id below text_config.vocab_size={vocab_size}")
    return token


def _parse_feature_layer(top: Entries, n_layers: int) -> int:
    """Hidden state 0 enters the first block; hidden state i leaves block i - 1."""
    layer = top.integer("vision_feature_layer", -2, minimum=-n_layers - 1)
    if layer > n_layers:
        allowed = f"one whole number from {-n_layers - 1} to {n_layers}"
        raise top.error("vision_feature_layer", layer, allowed)
    return layer


def _parse_eos(top: Entries, generation: Entries, vocab_size: int) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else text_config, else transformers' 2.

    A text_config with eos_token_id null has no end token: generation stops at the limit only.
    """
    text = top.section("text_config", {})
    source = next((s for s in (generation, top) if s.values.get("eos_token_id") is not None), text)
    ids = source.values.get("eos_token_id", 2)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        allowed = f"a token id or a list of token ids from 0 to {vocab_size - 1}"
        raise source.error("eos_token_id", ids, allowed)
    return tuple(ids)


def _parse_aspect(top: Entries) -> str:
    """From image_aspect_ratio, which checkpoints converted from the original layout keep."""
    aspect = top.only("image_aspect_ratio", (None, "square", "crop", "pad"), None)
    return "pad" if aspect == "pad" else "crop"
