"""config.json -> Config.

Missing entries get transformers' defaults (for example rms_norm_eps 1e-6), which are not always the
dataclass defaults (1e-5, those of the 7B). config_entries.py says which entries matter and why; one
that asks for something this code does not compute is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config, TextConfig, VisionConfig
from ..processing.generation_rules import GenerationRules
from .config_entries import ROPE, TEXT, TOP, VISION
from .error_text import shorten
from .generation_file import changes_tokens, parse_generation
from .json_entries import Entries, read_json
from .quantization_entries import parse_layout
from .regular_files import is_present

GENERATION_FILE = "generation_config.json"


def read_config(path: str | Path) -> Config:
    """Read a config.json and the generation_config.json beside it, if there is one.

    Raises ValueError for an unreadable file and for a model that this code does not compute. It
    names the file, the entry, its value, what is allowed and what to do.
    """
    return parse_config(read_json(path), _read_generation(path), str(path))


def read_generation_rules(path: str | Path, config: Config) -> GenerationRules | None:
    """The rules for choosing tokens of the checkpoint whose config.json this is, if it has any."""
    values, generation = read_json(path), _read_generation(path)
    rules = parse_generation(values, generation, config.text.vocab_size, str(path))
    return rules if changes_tokens(rules) else None


def _read_generation(path: str | Path) -> dict[str, Any] | None:
    generation = Path(path).with_name(GENERATION_FILE)
    return read_json(generation) if is_present(generation) else None


def parse_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    source: str = "config.json",
) -> Config:
    """Parse the contents of the two files; generation None: there is no generation_config.json.

    `source` is the name of config.json in errors.
    """
    top = Entries(source, "", config)
    _refuse_original_layout(top)
    if top.only("model_type", ("llava",), None) is None:
        raise top.error("model_type", None, "'llava'")
    top.check(TOP)
    parse_layout(top)
    # Without a vision_config the tower is CLIP ViT-L/14-336; an entry missing from one that is
    # there gets the default of transformers' CLIPVisionConfig, which is a smaller model.
    vision = _parse_vision(top.section("vision_config", _VIT_L_14_336))
    text = _parse_text(top.section("text_config", {}), tied=top.flag("tie_word_embeddings", False))
    return Config(
        vision=vision,
        text=text,
        image_token_id=_parse_image_token(top, text.vocab_size),
        vision_feature_layer=_parse_feature_layer(top, vision.num_hidden_layers),
        eos_token_ids=parse_generation(config, generation, text.vocab_size, source).end_tokens,
        image_aspect="pad" if config.get("image_aspect_ratio") == "pad" else "crop",
    )


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
    names = top.values.get("architectures")
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise top.error("architectures", names, "a list of names", "correct the file")
    if "LlavaLlamaForCausalLM" in names:
        marks.append("architectures")
    if marks:
        raise ValueError(
            f"{top.where(marks[0])} is {shorten(top.values[marks[0]])}: this is a checkpoint in "
            "the original LLaVA layout, and only the llava-hf layout is read; write that with "
            "`python -m weights.convert SRC DST` (SRC: the folder with its weights)"
        )


def _parse_vision(e: Entries) -> VisionConfig:
    e.check(VISION)
    config = VisionConfig(
        hidden_size=e.integer("hidden_size", 768),
        intermediate_size=e.integer("intermediate_size", 3072),
        num_hidden_layers=e.integer("num_hidden_layers", 12),
        num_attention_heads=e.integer("num_attention_heads", 12),
        image_size=e.integer("image_size", 224),
        patch_size=e.integer("patch_size", 32),
        layer_norm_eps=e.number("layer_norm_eps", 1e-5, 1.0),
    )
    e.multiple("hidden_size", config.hidden_size, "num_attention_heads", config.num_attention_heads)
    e.multiple("image_size", config.image_size, "patch_size", config.patch_size)
    return config


def _parse_text(e: Entries, tied: bool) -> TextConfig:
    e.check(TEXT)
    hidden_size = e.integer("hidden_size", 4096)
    heads = e.integer("num_attention_heads", 32)
    kv_heads = e.integer("num_key_value_heads", heads)
    e.multiple("hidden_size", hidden_size, "num_attention_heads", heads)
    e.multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = e.integer("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise e.error("head_dim", head_dim, "an even number (rotary embedding rotates pairs)")
    layers = e.integer("num_hidden_layers", 32)
    kinds = e.values.get("layer_types")
    e.seen.add("layer_types")
    listed = isinstance(kinds, list) and len(kinds) == layers
    if kinds is not None and not (listed and all(kind == "full_attention" for kind in kinds)):
        raise e.error("layer_types", kinds, "absent or 'full_attention' for each layer")
    theta, factor = _parse_rope(e)
    return TextConfig(
        hidden_size=hidden_size,
        intermediate_size=e.integer("intermediate_size", 11008),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=e.integer("vocab_size", 32000),
        rms_norm_eps=e.number("rms_norm_eps", 1e-6, 1.0),
        rope_theta=theta,
        rope_factor=factor,
        max_position_embeddings=e.integer("max_position_embeddings", 2048),
        # Either of two entries ties them, as in transformers; files differ in which one they set.
        tie_word_embeddings=e.flag("tie_word_embeddings", False) or tied,
    )


def _parse_rope(e: Entries) -> tuple[float, float]:
    """Base and linear factor, from rope_theta and rope_scaling or from rope_parameters.

    If a file has both, rope_scaling wins, and a rope_theta inside it, as in transformers. A factor
    is read for rope_type "linear" alone, and `type` only where rope_type is missing.
    """
    theta = e.number("rope_theta", 10000.0, _MOST_THETA, _LEAST_THETA)
    r = e.section("rope_scaling", {})
    if not r.values:
        r = e.section("rope_parameters", {})
    r.check(ROPE)
    nested = [key for key, value in r.values.items() if isinstance(value, Mapping)]
    if nested:
        raise r.error(nested[0], r.values[nested[0]], "absent: all layers have the same rotation")
    key = "type" if r.values.get("rope_type") is None else "rope_type"
    kind = r.only(key, ("default", "linear"), "default")
    factor = r.number("factor", None, 1e6, minimum=1.0) if kind == "linear" else 1.0
    return r.number("rope_theta", theta, _MOST_THETA, _LEAST_THETA), factor


_LEAST_THETA, _MOST_THETA = 1e-3, 1e12  # beyond them the angles are useless


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
