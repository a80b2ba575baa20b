"""config.json -> Config: transformers' defaults, and one-line errors for what is unsupported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlavaConfig

from minillava.config import Config, TextConfig, VisionConfig
from minillava.llava import LLaVA
from minillava.loading.config_file import parse_config, read_config

CHECKPOINTS = Path(__file__).parents[1] / "goldens" / "checkpoints"

# The complete config.json of llava-hf/llava-1.5-7b-hf.
HUB_7B: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}

TEXT = {
    "hidden_size": 64,  # all sizes here divide evenly in any mixture with the defaults
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 32100,
    "rms_norm_eps": 3e-6,
    "max_position_embeddings": 777,
    "tie_word_embeddings": True,
    "eos_token_id": [5, 6],
}
VISION = {
    "hidden_size": 96,
    "intermediate_size": 50,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "image_size": 64,
    "patch_size": 16,
    "layer_norm_eps": 2e-5,
}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 500.0},
    {"rope_scaling": None, "rope_theta": 7},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 9.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 11.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 75000.0}},
    {"rope_parameters": {"rope_theta": 5.0}},
    {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 1.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 9.0},
    {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}, "rope_theta": 9.0},
    {"rope_scaling": {"rope_type": "default", "factor": 2.0}, "rope_theta": 9.0},
    {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "default", "low_freq_factor": 1.0}},
    {
        "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
]


def check_against_transformers(entries: dict[str, Any]) -> None:
    ours = parse_config(copy.deepcopy(entries))
    theirs: Any = LlavaConfig.from_dict(copy.deepcopy(entries))
    for key in VISION:
        assert getattr(ours.vision, key) == getattr(theirs.vision_config, key), key
    for key in set(TEXT) - {"eos_token_id", "tie_word_embeddings"}:
        assert getattr(ours.text, key) == getattr(theirs.text_config, key), key
    assert ours.text.tie_word_embeddings == theirs.tie_word_embeddings
    rope = theirs.text_config.rope_parameters
    assert ours.text.rope_theta == rope["rope_theta"]
    assert ours.text.rope_factor == (rope["factor"] if rope["rope_type"] == "linear" else 1.0)
    assert ours.image_token_id == theirs.image_token_id
    assert ours.vision_feature_layer == theirs.vision_feature_layer


def test_the_published_7b_config_is_read_as_by_transformers() -> None:
    check_against_transformers(HUB_7B)
    config = parse_config(HUB_7B)
    assert (config.vision.num_patches, config.text.hidden_size) == (576, 4096)
    assert (config.eos_token_ids, config.image_aspect) == ((), "crop")  # see generation_config
    # the defaults are those of the 7B
    assert config == Config(VisionConfig(), TextConfig(), eos_token_ids=())


@pytest.mark.parametrize(("said", "read"), [(-1, 24), (-2, 23), (-25, 0), (0, 0), (1, 1)])
def test_the_feature_layer_is_counted_from_0(said: int, read: int) -> None:
    config = Config(VisionConfig(), TextConfig(num_hidden_layers=1), vision_feature_layer=said)
    with torch.device("meta"):
        assert LLaVA(config).feature_layer == read


def subsets(entries: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.sets(st.sampled_from(sorted(entries))).map(lambda keys: {k: entries[k] for k in keys})


@settings(max_examples=100, deadline=None)
@given(
    text=subsets(TEXT),
    vision=st.none() | subsets(VISION),
    rope=st.sampled_from(ROPES),
    top=subsets({"vision_feature_layer": -1, "tie_word_embeddings": True}),
)
def test_missing_entries_get_the_defaults_of_transformers(
    text: dict[str, Any], vision: dict[str, Any] | None, rope: dict[str, Any], top: dict[str, Any]
) -> None:
    # The default id of transformers, 32000, is outside its default vocabulary.
    top = {"model_type": "llava", "image_token_index": 7, **top}
    entries: dict[str, Any] = {**top, "text_config": {**text, **rope}}
    if vision is not None:
        entries["vision_config"] = vision
    check_against_transformers(entries)


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_every_spelling_of_rope_is_read_as_by_transformers(rope: dict[str, Any]) -> None:
    text = {**HUB_7B["text_config"], **rope}
    check_against_transformers({**HUB_7B, "text_config": text})


def test_a_full_dump_of_a_config_is_read() -> None:
    check_against_transformers(LlavaConfig(image_token_index=31999).to_dict())


@pytest.mark.parametrize(
    ("top", "text", "generation", "expected"),
    [
        ({}, {}, None, ()),
        ({}, {"eos_token_id": 7}, None, (7,)),
        ({}, {"eos_token_id": None}, None, ()),
        ({"eos_token_id": None}, {"eos_token_id": [7, 8]}, None, (7, 8)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, None, (5,)),
        ({"eos_token_id": [0, 32063]}, {}, None, (0, 32063)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, {}, ()),
    ],
)
def test_end_tokens_come_from_generation_config_or_else_from_config(
    tmp_path: Path,
    top: dict[str, Any],
    text: dict[str, Any],
    generation: dict[str, Any] | None,
    expected: tuple[int, ...],
) -> None:
    entries = {**HUB_7B, **top, "text_config": {**HUB_7B["text_config"], **text}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    if generation is None:
        theirs = GenerationConfig.from_model_config(entries)
    else:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        theirs = GenerationConfig.from_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json").eos_token_ids == expected
    end: Any = theirs.eos_token_id
    assert expected == (() if end is None else tuple(end) if isinstance(end, list) else (end,))


@pytest.mark.parametrize(
    ("ratio", "aspect"), [(None, "crop"), ("square", "crop"), ("crop", "crop"), ("pad", "pad")]
)
def test_the_image_aspect_is_that_of_the_checkpoint(ratio: str | None, aspect: str) -> None:
    assert parse_config({**HUB_7B, "image_aspect_ratio": ratio}).image_aspect == aspect


def test_the_image_token_has_two_names() -> None:
    entries = {k: v for k, v in HUB_7B.items() if k != "image_token_index"}
    assert parse_config(entries).image_token_id == 32000
    assert parse_config({**entries, "image_token_id": 31}).image_token_id == 31
    assert parse_config({**HUB_7B, "image_token_id": 32000}).image_token_id == 32000


@pytest.mark.parametrize("layer", [-25, -1, 0, 24])
def test_any_single_hidden_state_may_be_read(layer: int) -> None:
    assert parse_config({**HUB_7B, "vision_feature_layer": layer}).vision_feature_layer == layer


def test_harmless_entries_are_ignored() -> None:
    text = {**HUB_7B["text_config"], "pretraining_tp": 2, "sliding_window": None, "moe": False}
    entries = {**HUB_7B, "text_config": text, "_commit_hash": "abc", "use_cache": True}
    assert parse_config(entries) == parse_config(HUB_7B)


REFUSED: list[tuple[str, Any, str]] = [
    # entry, value, what the error must contain besides them
    ("model_type", "llava_next", "'llava'"),
    ("model_type", "vipllava", "'llava'"),
    ("model_type", "mllama", "'llava'"),
    ("model_type", None, "'llava'"),
    ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "python -m weights.convert SRC DST"),
    ("mm_projector_type", "mlp2x_gelu", "python -m weights.convert SRC DST"),
    ("architectures", ["LlavaLlamaForCausalLM"], "python -m weights.convert SRC DST"),
    ("projector_hidden_act", "relu", "'gelu'"),
    ("multimodal_projector_bias", False, "True"),
    ("vision_feature_select_strategy", "full", "'default'"),
    ("vision_feature_layer", [-2], "one whole number"),
    ("vision_feature_layer", [-2, -5], "one whole number"),
    ("vision_feature_layer", [], "one whole number"),
    ("vision_feature_layer", -26, "-25"),
    ("vision_feature_layer", 25, "24"),
    ("image_token_index", 32064, "vocab_size=32064"),
    ("image_token_index", -1, "at least 0"),
    ("image_token_index", "<image>", "whole number"),
    ("image_token_id", 31999, "32000"),
    ("image_aspect_ratio", "anyres", "'pad'"),
    ("eos_token_id", "</s>", "token id"),
    ("eos_token_id", [2, None], "token id"),
    ("eos_token_id", -1, "token id"),
    ("eos_token_id", 32064, "0 to 32063"),
    ("tie_word_embeddings", "yes", "True"),
    ("quantization_config", {"quant_method": "bitsandbytes"}, "unquantised"),
    ("text_config", [1], "object"),
    ("text_config.quantization_config", {"quant_method": "awq"}, "unquantised"),
    ("text_config.model_type", "mistral", "'llama'"),
    ("text_config.hidden_act", "gelu", "'silu'"),
    ("text_config.attention_bias", True, "False"),
    ("text_config.mlp_bias", True, "False"),
    ("text_config.sliding_window", 4096, "absent"),
    ("text_config.num_attention_heads", 33, "hidden_size"),
    ("text_config.num_attention_heads", 0, "at least 1"),
    ("text_config.num_attention_heads", True, "at least 1"),
    ("text_config.num_key_value_heads", 5, "num_attention_heads"),
    ("text_config.head_dim", 127, "even"),
    ("text_config.hidden_size", 10**30, "at most 10000000"),
    ("text_config.hidden_size", 4096.0, "whole number"),
    ("text_config.hidden_size", "4096", "whole number"),
    ("text_config.rms_norm_eps", 0, "above 0"),
    ("text_config.rms_norm_eps", float("nan"), "above 0"),
    ("text_config.rms_norm_eps", 1e308, "at most 1"),
    ("text_config.rms_norm_eps", 10**400, "at most 1"),
    ("text_config.rms_norm_eps", float("inf"), "at most 1"),
    ("architectures", 1, "a list of names"),
    ("architectures", True, "a list of names"),
    ("architectures", float("inf"), "a list of names"),
    ("architectures", [["a"]], "a list of names"),
    ("text_config.layer_types", "x", "'full_attention'"),
    ("text_config.layer_types", ["full_attention"], "'full_attention'"),
    ("text_config.rope_theta", "10000", "at least 0.001"),
    ("text_config.rope_theta", True, "at least 0.001"),
    ("text_config.rope_theta", -(10**400), "at least 0.001"),
    ("text_config.rope_scaling", 2.0, "object"),
    ("text_config.rope_scaling.type", "dynamic", "'linear'"),
    ("text_config.rope_scaling.rope_type", "llama3", "'linear'"),
    ("text_config.rope_parameters.rope_type", "yarn", "'linear'"),
    ("text_config.rope_parameters.partial_rotary_factor", 0.5, "1"),
    ("text_config.partial_rotary_factor", 0.5, "1"),
    ("vision_config.model_type", "siglip_vision_model", "'clip_vision_model'"),
    ("vision_config.hidden_act", "gelu", "'quick_gelu'"),
    ("vision_config.num_channels", 4, "3"),
    ("vision_config.patch_size", 13, "image_size"),
    ("vision_config.image_size", [336, 336], "whole number"),
    ("vision_config.num_attention_heads", 15, "hidden_size"),
    ("vision_config.layer_norm_eps", -1e-5, "above 0"),
]


@pytest.mark.parametrize(("entry", "value", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_unsupported_entries_are_refused_in_one_line(entry: str, value: Any, message: str) -> None:
    entries = copy.deepcopy(HUB_7B)
    *sections, key = entry.split(".")
    place = entries
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    with pytest.raises(ValueError, match=r"hub/config\.json: ") as caught:
        parse_config(entries, source="hub/config.json")
    error = str(caught.value)
    assert key in error
    assert (
        repr(value)[:20] in error
        or str(value)[:20] in error
        or key in ("num_attention_heads", "patch_size")
    )
    assert len(error) < 500
    assert message in error
    assert "; " in error or "python -m" in error  # what to do
    assert "\n" not in error


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0.5}, "at least 1"),
        ({"type": "linear", "factor": "2"}, "at least 1"),
        ({"type": "linear", "factor": 1e308}, "at most 1e"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)
def test_incomplete_rope_scaling_is_refused(scaling: dict[str, Any], message: str) -> None:
    text = {**HUB_7B["text_config"], "rope_scaling": scaling}
    with pytest.raises(ValueError, match=message):
        parse_config({**HUB_7B, "text_config": text})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        ("{", "json"),
        ("[1]", "object"),
        ("\udcff", "json"),
        ("\ufeff{}", "BOM"),
        ("[" * 100_000, "json"),
        ('{"a":' * 100_000, "json"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
