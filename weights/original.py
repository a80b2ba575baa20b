"""Translate the original LLaVA layout to llava-hf: tensor names, config, tokens, small files.

The config entries are those that the original code reads and writes (llava/train/train.py and
llava/model).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillava.loading.error_text import shorten
from minillava.loading.json_entries import Entries
from minillava.loading.regular_files import read_bytes
from minillava.loading.sentencepiece_model import load_pieces
from minillava.loading.tokenizer_files import MAX_MODEL, read_tokenizer
from minillava.processing.image import ImageConfig
from minillava.processing.templates import IMAGE

from .files import to_json

PAD = "<pad>"
SIZE_MULTIPLE = 64  # a vocabulary that has to grow gets a size that is a multiple of this

_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.([02])\.(weight|bias)")
_BUFFER = re.compile(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# Entries that are copied to text_config.
_TEXT = """
    attention_bias head_dim hidden_act hidden_size initializer_range intermediate_size
    max_position_embeddings mlp_bias num_attention_heads num_hidden_layers num_key_value_heads
    rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
""".split()  # noqa: SIM905

# Entries about training and the origin of the parts, which do not change the model.
_TRAINING = """
    freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_split_resolution
    max_length mm_hidden_size mm_projector_lr mm_vision_tower mm_vision_tower_lr
    pretrain_mm_mlp_adapter tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter
    tune_mm_vision_resampler unfreeze_mm_vision_tower use_mm_proj
""".split()  # noqa: SIM905


# Written by transformers or by training code; none changes what the model computes.
_HARMLESS = frozenset(
    """
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label ignore_index image_seq_length
    initializer_factor initializer_range is_decoder is_encoder_decoder label2id length_penalty
    max_length max_sequence_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type projection_dim remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class tokenizer_model_max_length tokenizer_padding_side top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905
) | {"tie_word_embeddings", "vocab_size"}  # other sections contain stale copies of these


@dataclass(frozen=True)
class Vocabulary:
    """The special tokens, and the size of the vocabulary that is written."""

    begin: str  # content of BOS in tokenizer.model, usually <s>
    end: str  # of EOS
    unknown: str  # of the unknown token
    special: Mapping[str, int]  # content -> id of all special tokens
    added: Mapping[str, int]  # content -> id of those that are not in tokenizer.model
    size: int  # rows of embedding and output head

    @classmethod
    def of(cls, folder: Path, rows: int) -> Vocabulary:
        """Read the tokenizer in `folder` and add <image> and <pad> after its last id.

        `rows` is the number of rows in the source's embedding. If it is too small, `size` is the
        next multiple of 64. Raises ValueError if not even the tokenizer's own ids fit.
        """
        path = folder / "tokenizer.model"
        pieces = load_pieces(str(path), read_bytes(path, MAX_MODEL))
        tokenizer = read_tokenizer(folder, -1)  # -1: no image token unless a file names one
        special, end = dict(tokenizer.special_tokens), len(tokenizer)
        if end > rows:
            raise ValueError(
                f"{folder}: the tokenizer's ids go up to {end - 1}, but the weights have {rows} "
                "rows; take both from one checkpoint"
            )
        for content in (IMAGE, PAD):
            if special.get(content, -1) < 0:
                special[content] = end
                end += 1
        return cls(
            begin=pieces.id_to_piece(pieces.bos_id()),
            end=pieces.id_to_piece(pieces.eos_id()),
            unknown=pieces.id_to_piece(pieces.unk_id()),
            special=dict(sorted(special.items(), key=lambda item: item[1])),
            added={c: i for c, i in special.items() if i >= pieces.get_piece_size()},
            size=rows if end <= rows else -(-end // SIZE_MULTIPLE) * SIZE_MULTIPLE,
        )


# ---------------------------------------------------------------- names


def hub_name(name: str) -> str | None:
    """Translate a tensor's name to llava-hf's; None for a buffer that the model computes.

    Unknown names are returned unchanged. Raises ValueError for a tensor of LLaVA-NeXT.
    """
    if _BUFFER.fullmatch(name):
        return None
    if found := _PROJECTOR.fullmatch(name):
        return f"multi_modal_projector.linear_{int(found[1]) // 2 + 1}.{found[2]}"
    if name == "model.image_newline":
        raise ValueError(
            "the weights have image_newline, so they are a LLaVA-NeXT, which cuts images into "
            "tiles; only LLaVA-1.5 can be converted, for example liuhaotian/llava-v1.5-7b"
        )
    decoder = name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."))
    return f"language_model.{name}" if decoder else name


# ---------------------------------------------------------------- config


def check(entries: Entries) -> None:
    """Raise ValueError if the config describes any model but LLaVA-1.5."""
    e = entries
    e.only("model_type", ("llava", "llava_llama", "llama"), None)
    if e.only("mm_projector_type", ("mlp2x_gelu",), None) is None:
        raise e.error("mm_projector_type", None, "'mlp2x_gelu'")
    e.only("mm_vision_select_feature", ("patch",), "patch")
    e.only("mm_patch_merge_type", (None, "flat"), None)
    e.only("mm_resampler_type", (None,), None)
    e.only("mm_use_im_start_end", (False,), False)
    e.only("mm_use_im_patch_token", (False,), False)
    e.only("image_aspect_ratio", (None, "square", "pad"), None)
    e.only("image_grid_pinpoints", (None, []), None)
    e.only("quantization_config", (None,), None, "take the unquantised weights")
    e.integer("mm_vision_select_layer", -2, minimum=-1000)
    e.seen.update(_TEXT)  # checked when config.json is read, as entries of text_config
    _refuse_strangers(e)


def _refuse_strangers(e: Entries) -> None:
    """Raise ValueError for an entry that is not known, unless it is switched off."""
    for key, value in e.values.items():
        known = key in e.seen or key in _HARMLESS or key in _TRAINING or key.startswith("_")
        if not known and value not in (None, False, "", [], {}):
            raise ValueError(
                f"{e.where(key)} is {shorten(value)}, an entry that minillava does not know and "
                "that may change what the model computes; the entries that the original LLaVA "
                "writes are known; if this one changes nothing, remove it from the file"
            )


def hub_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any],
    vision: Mapping[str, Any],
    vocabulary: Vocabulary,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return config.json of the llava-hf layout.

    `values` and `generation` are the source's config.json and generation_config.json, `vision` is
    the new vision_config. image_aspect_ratio is kept because minillava decides by it whether to pad
    images and to use the vicuna_v1 template.
    """
    name = str(dtype).removeprefix("torch.")
    text = {key: values[key] for key in _TEXT if values.get(key) is not None}
    tied = bool(values.get("tie_word_embeddings", False))
    size = vocabulary.size
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "eos_token_id": _end_token_id(values, generation),
        "ignore_index": -100,
        "image_aspect_ratio": values.get("image_aspect_ratio"),
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "image_token_index": vocabulary.special[IMAGE],
        "model_type": "llava",
        "pad_token_id": vocabulary.special[PAD],
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **text,
            "tie_word_embeddings": tied,
            "torch_dtype": name,
            "vocab_size": size,
        },
        "tie_word_embeddings": tied,
        "torch_dtype": name,
        "vision_config": dict(vision),
        "vision_feature_layer": values.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
        "vocab_size": size,
    }
    return {key: value for key, value in config.items() if value is not None}


def _end_token_id(values: Mapping[str, Any], generation: Mapping[str, Any]) -> Any:
    """eos_token_id, where generation_config.json has precedence over config.json."""
    stated = (place.get("eos_token_id") for place in (generation, values))
    return next((end for end in stated if end is not None), 2)


# ---------------------------------------------------------------- the other small files


def small_files(
    config: Mapping[str, Any], tokens: Path, vocabulary: Vocabulary, image: ImageConfig
) -> dict[str, bytes]:
    """Return name -> content of the files beside the weights: the JSON files, tokenizer.model."""
    v = vocabulary
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    roles = {"bos_token": v.begin, "eos_token": v.end, "pad_token": PAD, "unk_token": v.unknown}
    tokenizer = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {"content": content, **plain, "special": True}
            for content, i in v.special.items()
        },
        **roles,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": IMAGE},
        "image_token": IMAGE,
        "legacy": True,  # a space before each stretch of text, as in llava-hf's tokenizer.json
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    generation = {
        "bos_token_id": v.special[v.begin],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": v.special[PAD],
    }
    processor = {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,  # the class token, which LLaVA then drops
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    preprocessor = {
        "crop_size": {"height": image.crop, "width": image.crop},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": image.mean,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": image.std,
        "processor_class": "LlavaProcessor",
        "resample": image.resample,
        "rescale_factor": image.rescale,
        "size": {"shortest_edge": image.size},
    }
    contents = {
        "added_tokens.json": v.added,
        "special_tokens_map.json": {role: {"content": c, **plain} for role, c in roles.items()},
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": preprocessor,
        "processor_config.json": processor,
        "generation_config.json": generation,
        "config.json": config,
    }
    return {"tokenizer.model": (tokens / "tokenizer.model").read_bytes()} | {
        name: to_json(content) for name, content in contents.items()
    }
