"""Every entry that transformers asks a checkpoint's config for is in the tables, and is treated as
the tables say."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from minillava.loading.checkpoint import load
from minillava.loading.config_entries import TEXT, TOP, VISION
from minillava.loading.config_file import read_config, read_generation_rules
from minillava.loading.generation_file import GENERATION
from minillava.loading.json_entries import Only, Table, Unused

N = 16
IDS = torch.tensor([[1, *[tiny.IMAGE] * N, 5, 6, 9]])
PIXELS = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
GENERATION_FILE = "generation_config.json"
SECTIONS: dict[str, Table] = {"": TOP, "vision_config": VISION, "text_config": TEXT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory, layers=2, vision_layers=3)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[torch.Tensor, list[int]]:
    return answer(folder)


def answer(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits of the first token (V,) and four greedy tokens from transformers."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    mask = torch.ones_like(IDS)
    out = model.generate(
        input_ids=IDS,
        pixel_values=PIXELS,
        attention_mask=mask,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.logits[0][0], out.sequences[0, IDS.shape[1] :].tolist()


def variant(folder: Path, to: Path, file: str, section: str, key: str, value: Any) -> Path:
    """A copy of the checkpoint with one entry set."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).symlink_to(path)
    values = json.loads((folder / file).read_text())
    (values[section] if section else values)[key] = value
    (to / file).unlink()
    (to / file).write_text(json.dumps(values))
    return to


def test_the_tables_have_all_that_transformers_asks_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[type, set[str]] = defaultdict(set)
    classes = {LlavaConfig: TOP, CLIPVisionConfig: VISION, LlamaConfig: TEXT}
    for cls in (*classes, GenerationConfig):
        get = cls.__getattribute__

        def note(self: Any, key: str, get: Any = get, cls: type = cls) -> Any:
            asked[cls].add(key)
            return get(self, key)

        monkeypatch.setattr(cls, "__getattribute__", note)
    answer(folder)
    monkeypatch.undo()

    assert "vision_feature_layer" in asked[LlavaConfig]
    for cls, table in classes.items():
        settings = set() if cls is LlamaConfig else set(GENERATION)  # popped from other sections
        own = {key for key in asked[cls] if is_of_class(cls, key)}
        assert asked[cls] - own - table.keys() - settings == set(), cls
    arguments = {
        *("assistant_model", "logits_processor", "negative_prompt_ids", "stopping_criteria"),
        *("negative_prompt_attention_mask", "prefix_allowed_tokens_fn", "streamer"),
        *("synced_gpus", "input_ids", "attention_mask", "pixel_values"),
    }
    own = {key for key in asked[GenerationConfig] if is_of_class(GenerationConfig, key)}
    tensors = {"_eos_token_tensor", "_pad_token_tensor", "_mask_length"}
    assert asked[GenerationConfig] - own - GENERATION.keys() - arguments - tensors == set()


def is_of_class(cls: type, key: str) -> bool:
    """A method or property of transformers' class, not an entry of a file."""
    if key.startswith("__") or key in ("_heterogeneity_spec", "is_heterogeneous"):
        return True
    found = getattr(cls, key, None)
    return callable(found) or key in ("sub_configs", "sub_configs_defaults", "extra_output_flags")


# Values at odds with the defaults, by entry; "x" for all others.
VALUES: dict[str, Any] = {
    "attention_dropout": 0.5,
    "auto_map": {"AutoConfig": "code.Class"},
    "assistant_confidence_threshold": 0.9,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "attn_implementation": "eager",
    "_attn_implementation": "eager",
    "base_model_ep_plan": {"a": "b"},
    "base_model_fsdp_plan": {"a": "b"},
    "base_model_pp_plan": {"a": [["b"], ["c"]]},
    "base_model_tp_plan": {"a": "b"},
    "bos_token_id": 5,
    "chunk_size_feed_forward": 2,
    "decoder": {"hidden_size": 3},
    "decoder_start_token_id": 5,
    "default_theta": 3.0,
    "disable_compile": True,
    "diversity_penalty": 3.0,
    "do_sample": False,
    "dtype": "float16",
    "early_stopping": True,
    "eos_token_id": 5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "generator": {"hidden_size": 3},
    "experts_implementation": "eager",
    "_experts_implementation": "eager",
    "gradient_checkpointing": True,
    "head_dim": 3,
    "id2label": {"0": "a"},
    "ignore_keys_at_rope_validation": [],
    "image_seq_length": 3,
    "init_std": 0.5,
    "initializer_factor": 3.0,
    "initializer_range": 0.5,
    "is_encoder_decoder": True,
    "label2id": {"a": 0},
    "layer_types": None,  # a list must fit num_hidden_layers in transformers
    "length_penalty": 3.0,
    "low_memory": True,
    "max_cache_len": 3,
    "max_length": 3,
    "max_matching_ngram_size": 2,
    "max_new_tokens": 2,
    "max_position_embeddings": 3,
    "min_p": 0.1,
    "mtp_layer_types": ["full_attention"],
    "num_assistant_tokens": 5,
    "num_beam_groups": 3,
    "num_labels": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "_output_attentions": True,
    "pad_token_id": 5,
    "prefill_chunk_size": 2,
    "pretraining_tp": 2,
    "problem_type": "regression",
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "return_dict_in_generate": True,
    "rope_parameters": {"rope_theta": 3.0},
    "target_lookbehind": 3,
    "temperature": 0.2,
    "text_config": {"hidden_size": 3},
    "tie_last_hidden_states": True,
    "tie_word_embeddings": True,
    "top_h": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "torch_dtype": "float16",
    "typical_p": 0.1,
    "use_cache": False,
    "vision_feature_layer": 0,
    "vision_feature_select_strategy": "full",
    "vocab_size": 3,
    "_from_model_config": True,
    "_post_init_done": False,
}
# With another value of these transformers does not answer at all.
FAILS = {"return_dict", "compile_config", "continuous_batching_config", "architectures"}

# Entries of training tools, and others that no code asks for.
UNKNOWN = {
    "hidden_size": ("", 128),  # LLaMA-Factory writes it beside text_config
    "unsloth_version": ("", "2025.1.1"),
    "unsloth_fixed": ("", True),
    "ignore_index": ("", -1),
    "some_gate": ("", 0.5),
    "num_experts": ("text_config", 8),
    "projection_dim": ("vision_config", 3),
    "use_head": ("vision_config", True),
    "forced_decoder_ids": (GENERATION_FILE, [[1, 5]]),
}


# The dtype changes the arithmetic of transformers; the others exclude further entries.
ALONE = {
    *("dtype", "torch_dtype", "decoder", "generator"),
    *("prompt_lookup_num_tokens", "prefill_chunk_size"),
}


def unused() -> Iterator[tuple[str, str, str, Any]]:
    for section, table in SECTIONS.items():
        for key, rule in table.items():
            if isinstance(rule, Unused) and key not in FAILS:
                yield "config.json", section, key, VALUES.get(key, "x")
    for key, rule in GENERATION.items():
        if isinstance(rule, Unused) and key not in FAILS:
            yield GENERATION_FILE, "", key, VALUES.get(key, "x")
    for key, (section, value) in UNKNOWN.items():
        file = GENERATION_FILE if section == GENERATION_FILE else "config.json"
        yield file, section if file == "config.json" else "", key, value


def test_all_entries_without_influence_are_let_pass_together(
    folder: Path, tmp_path: Path, expected: tuple[torch.Tensor, list[int]]
) -> None:
    changed = tmp_path / "c"
    shutil.copytree(folder, changed)
    files = {f: json.loads((folder / f).read_text()) for f in ("config.json", GENERATION_FILE)}
    for file, section, key, value in unused():
        if key not in ALONE:
            (files[file][section] if section else files[file])[key] = value
    for name, values in files.items():
        (changed / name).write_text(json.dumps(values))
    logits, tokens = answer(changed)
    tiny.assert_close(logits, expected[0])
    assert tokens == expected[1]
    assert read_config(changed / "config.json") == read_config(folder / "config.json")


@pytest.mark.slow
@pytest.mark.parametrize(("file", "section", "key", "value"), list(unused()))
def test_an_entry_without_influence_is_let_pass(
    folder: Path,
    tmp_path: Path,
    expected: tuple[torch.Tensor, list[int]],
    file: str,
    section: str,
    key: str,
    value: Any,
) -> None:
    changed = variant(folder, tmp_path / "c", file, section, key, value)
    logits, tokens = answer(changed)
    half = key in ("dtype", "torch_dtype")  # there the arithmetic of transformers is float16
    tiny.assert_close(logits, expected[0], 0.05 if half else 1e-4)
    assert tokens == expected[1]
    config = read_config(changed / "config.json")
    assert config == read_config(folder / "config.json")
    assert read_generation_rules(changed / "config.json", config) is None


def other_value(rule: Only) -> Any:
    return next(v for v in ("x", True, 7) if v not in rule.values)


@pytest.mark.parametrize(
    ("section", "key"),
    [(s, k) for s, table in SECTIONS.items() for k, r in table.items() if isinstance(r, Only)],
)
def test_another_value_is_refused_by_name(
    folder: Path, tmp_path: Path, section: str, key: str
) -> None:
    rule = SECTIONS[section][key]
    assert isinstance(rule, Only)
    path = ".".join(filter(None, (section, key)))
    for i, value in enumerate(rule.values):
        changed = variant(folder, tmp_path / str(i), "config.json", section, key, value)
        if (key, value) != ("model_type", None) and key != "image_aspect_ratio":
            assert read_config(changed / "config.json") == read_config(folder / "config.json")
    changed = variant(folder, tmp_path / "c", "config.json", section, key, other_value(rule))
    with pytest.raises(ValueError, match=rf"config\.json: {path} is ") as caught:
        read_config(changed / "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config"])
@pytest.mark.parametrize("key", [k for k, r in GENERATION.items() if isinstance(r, Only)])
def test_another_way_to_choose_tokens_is_refused(
    folder: Path, tmp_path: Path, place: str, key: str
) -> None:
    rule = GENERATION[key]
    assert isinstance(rule, Only)
    file = "config.json" if place == "text_config" else place
    section = "text_config" if place == "text_config" else ""
    changed = variant(folder, tmp_path / "c", file, section, key, other_value(rule))
    if place != GENERATION_FILE:
        read_config(changed / "config.json")  # transformers reads generation_config.json alone
        (changed / GENERATION_FILE).unlink()
    with pytest.raises(ValueError, match=rf"{file}: .*{key} is .*; remove it"):
        read_config(changed / "config.json")


def test_tied_matrices_that_differ_are_both_used(folder: Path, tmp_path: Path) -> None:
    changed = variant(folder, tmp_path / "c", "config.json", "", "tie_word_embeddings", True)
    theirs = LlavaForConditionalGeneration.from_pretrained(changed)
    ours, _ = load(changed)
    assert not ours.config.text.tie_word_embeddings
    assert torch.equal(ours.llama.lm_head.weight, theirs.lm_head.weight)
    embedding = theirs.model.language_model.embed_tokens.weight
    assert torch.equal(ours.llama.embed_tokens.weight, embedding)
    assert not torch.equal(embedding, theirs.lm_head.weight)


def test_other_weights_in_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "c"
    shutil.copytree(folder, to)
    (to / "adapter_model.safetensors").write_bytes(b"")
    load(to)  # it is read only for its config
    (to / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"contains adapter_config\.json.*merge it"):
        load(to)
    (to / "adapter_config.json").unlink()
    (to / "shard-00000-model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"contains shard-00000.*save the whole model"):
        load(to)
