"""Write the trained demo model as a llava-hf folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from minillava.config import Config
from minillava.loading.keys import published_name
from minillava.processing.templates import LLAVA_HF_JINJA

from . import scenes

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def export(
    folder: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    pieces: bytes,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write all files of the checkpoint.

    weights: by minillava's names; they are stored in `dtype`. pieces: tokenizer.model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {published_name(name): t.to(dtype).contiguous() for name, t in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "tokenizer.model").write_bytes(pieces)
    for name, content in settings(config, pieces, dtype).items():
        text = json.dumps(content, indent=None if name == "tokenizer.json" else 2)
        (folder / name).write_text(text + "\n")


def write_example(folder: Path) -> None:
    """Write example.png and example.json: a held-out image, a question about it and the answer."""
    for scene, example in scenes.held_out(2026, 1000, ["digit"]):
        digits = sum(thing.is_digit for thing in scene.things)
        if len(scene.things) == 5 and digits == 3 and example.question == "What digit is red?":
            scene.image.save(folder / "example.png")
            asked = {"image": "example.png", "question": example.question, "answer": example.answer}
            (folder / "example.json").write_text(json.dumps(asked, indent=2) + "\n")
            return


def settings(config: Config, pieces: bytes, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """Return file name -> content of every JSON file."""
    stored = str(dtype).removeprefix("torch.")
    vision, text, image_id = config.vision, config.text, config.image_token_id
    pad_id = image_id + 1
    special = {0: "<unk>", 1: "<s>", 2: "</s>", image_id: "<image>", pad_id: "<pad>"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_seq_length": vision.num_patches,
            "image_token_index": image_id,
            "model_type": "llava",
            "pad_token_id": pad_id,
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": text.hidden_size,
                "intermediate_size": text.intermediate_size,
                "max_position_embeddings": text.max_position_embeddings,
                "model_type": "llama",
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": text.num_hidden_layers,
                "rms_norm_eps": text.rms_norm_eps,
                "torch_dtype": stored,
                "vocab_size": text.vocab_size,
            },
            "tie_word_embeddings": False,
            "torch_dtype": stored,
            "vision_config": {
                "hidden_size": vision.hidden_size,
                "image_size": vision.image_size,
                "intermediate_size": vision.intermediate_size,
                "model_type": "clip_vision_model",
                "num_attention_heads": vision.num_attention_heads,
                "num_hidden_layers": vision.num_hidden_layers,
                "patch_size": vision.patch_size,
                "projection_dim": vision.hidden_size,
            },
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": "default",
            "vocab_size": text.vocab_size,
        },
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": pad_id,
        },
        "preprocessor_config.json": {
            "crop_size": {"height": vision.image_size, "width": vision.image_size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": STD,
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": vision.image_size},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": None,
            "added_tokens_decoder": {
                str(i): {"content": content, **flags, "special": True}
                for i, content in special.items()
            },
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "legacy": False,
            "model_max_length": text.max_position_embeddings,
            "pad_token": "<pad>",
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
        "special_tokens_map.json": {
            name: {"content": content, **flags}
            for name, content in (
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("pad_token", "<pad>"),
                ("unk_token", "<unk>"),
            )
        },
        "added_tokens.json": {"<image>": image_id, "<pad>": pad_id},
        "chat_template.json": {"chat_template": LLAVA_HF_JINJA},
        "tokenizer.json": fast_tokenizer(pieces, special),
    }


def fast_tokenizer(pieces: bytes, special: Mapping[int, str]) -> dict[str, Any]:
    """Return tokenizer.json: the SentencePiece model in the format of the tokenizers library."""
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = []
    for piece, i in vocab.items():
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i)):
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in vocab and right in vocab:
                    merges.append(
                        (-model.get_score(i), i, vocab[left], vocab[right], f"{left} {right}")
                    )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    again = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    one, two = ({"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": content, **flags, "special": True}
            for i, content in special.items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*first, one],
            "pair": [*first, one, again, two],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [text for *_, text in sorted(merges)],
        },
    }
