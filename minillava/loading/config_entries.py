"""Which entries of config.json matter, and what becomes of each: three tables.

A checkpoint answers here as it does in transformers 5 (LlavaForConditionalGeneration, with
CLIPVisionModel and LlamaModel). transformers makes every entry an attribute of its config, known or
not, but only the attributes that its code asks for can change anything. The rule is therefore:

- An entry that the code asks for is followed, or refused by name unless it has a value for which
  minillava computes the same.
- An entry that the code asks for but that changes no answer is let pass; the table says why.
- An entry that is in no table is never asked for, for example what a training tool noted down
  (unsloth_version, or hidden_size beside text_config), and is let pass.

tests/loading/test_config_entries.py notes what transformers asks for while it loads a checkpoint
and answers, and checks that the tables have all of it.
"""

from __future__ import annotations

from .json_entries import Followed, Only, Table, Unused
from .tensor_files import SINGLE

_TRAINING = Unused("for training")
_INITIAL = Unused("for the first values of weights that are not in the files")
_OUTPUTS = Unused("says what else a forward returns")
_KERNELS = Unused("chooses between implementations of the same computation")
_LABELS = Unused("for classifiers")
_PARALLEL = Unused("for models on several devices")
_DECODER = Unused("for decoders")
_NOTE = Unused("a note about the file")
_ELSEWHERE = Unused("of the decoder or the tower, which read their own sections")
_UNQUANTISED = "load the checkpoint's unquantised weights"

# Entries that mean the same in all three sections.
_EVERYWHERE: Table = {
    "quantization_config": Only((None,), _UNQUANTISED),
    "per_layer_config": Only((None, {})),
    "attribute_map": Only((None, {}), "remove it: it gives entries other names"),
    "attn_implementation": _KERNELS,
    "_attn_implementation": _KERNELS,
    "_attn_implementation_internal": _KERNELS,
    "experts_implementation": Unused("for mixtures of experts"),
    "_experts_implementation": Unused("for mixtures of experts"),
    "_experts_implementation_internal": Unused("for mixtures of experts"),
    "architectures": _NOTE,
    "transformers_version": _NOTE,
    "name_or_path": _NOTE,
    "_name_or_path": _NOTE,
    "auto_map": Unused("names classes that are only used with trust_remote_code"),
    "dtype": Unused("the caller's dtype is used, or that of the files"),
    "torch_dtype": Unused("the caller's dtype is used, or that of the files"),
    "use_cache": Unused("gives the same logits with and without the cache"),
    "return_dict": _OUTPUTS,
    "output_attentions": _OUTPUTS,
    "_output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "gradient_checkpointing": _TRAINING,
    "attention_dropout": _TRAINING,
    "chunk_size_feed_forward": Unused("splits a computation into pieces"),
    "initializer_range": _INITIAL,
    "initializer_factor": _INITIAL,
    "init_std": _INITIAL,
    "id2label": _LABELS,
    "label2id": _LABELS,
    "num_labels": _LABELS,
    "problem_type": _LABELS,
    "base_model_tp_plan": _PARALLEL,
    "base_model_pp_plan": _PARALLEL,
    "base_model_ep_plan": _PARALLEL,
    "base_model_fsdp_plan": _PARALLEL,
    "mtp_layer_types": Unused("for drafting several tokens at once"),
}

# Names under which transformers looks for a decoder's section.
_SECTIONS: Table = {
    "is_encoder_decoder": Only((None, False)),
    "text_encoder": Only((None,)),
    "decoder": Only((None,)),
    "generator": Only((None,)),
}

TOP: Table = {
    **_EVERYWHERE,
    **_SECTIONS,
    "model_type": Only(("llava",)),
    "vision_config": Followed(),
    "text_config": Followed(),
    "image_token_index": Followed(),
    "image_token_id": Followed(),
    "vision_feature_layer": Followed(),
    "tie_word_embeddings": Followed(),
    "quantization_config": Followed(),  # see quantization_entries.py
    "projector_hidden_act": Only(("gelu",)),
    "multimodal_projector_bias": Only((True,)),
    "vision_feature_select_strategy": Only(("default",)),
    "image_aspect_ratio": Only((None, "square", "crop", "pad")),  # of converted checkpoints
    "image_processor_type": Only((None, *(f"LlavaImageProcessor{k}" for k in ("", "Fast", "Pil")))),
    "is_causal": Only((None, False)),
    "fusion_config": Only((None, {})),
    "configuration_files": Only((None, [], ["config.json"]), "make that file config.json"),
    "transformers_weights": Only((None, SINGLE), f"name that file {SINGLE}"),
    "layer_types": _ELSEWHERE,
    "max_position_embeddings": _ELSEWHERE,
    "head_dim": _ELSEWHERE,
    "rope_parameters": _ELSEWHERE,
    "vision_aspect_ratio": Unused("for models that cut a picture into tiles"),
    "gguf_file": Unused("an argument of from_pretrained"),
}

VISION: Table = {
    **_EVERYWHERE,
    "hidden_size": Followed(),
    "intermediate_size": Followed(),
    "num_hidden_layers": Followed(),
    "num_attention_heads": Followed(),
    "image_size": Followed(),
    "patch_size": Followed(),
    "layer_norm_eps": Followed(),
    "model_type": Only(("clip_vision_model",)),
    "hidden_act": Only(("quick_gelu",)),
    "num_channels": Only((3,)),
    "is_causal": Only((None, False)),
    "is_encoder_decoder": _DECODER,
    "decoder": _DECODER,
    "generator": _DECODER,
    "text_config": _DECODER,
    "layer_types": _DECODER,
    "rope_parameters": _DECODER,
    "vocab_size": _DECODER,
    "tie_word_embeddings": _DECODER,
    "tie_last_hidden_states": Unused("the tower's last hidden state is the same either way"),
    "vision_aspect_ratio": _ELSEWHERE,
    "vision_feature_layer": _ELSEWHERE,
    "vision_feature_select_strategy": _ELSEWHERE,
}

TEXT: Table = {
    **_EVERYWHERE,
    **_SECTIONS,
    "hidden_size": Followed(),
    "intermediate_size": Followed(),
    "num_hidden_layers": Followed(),
    "num_attention_heads": Followed(),
    "num_key_value_heads": Followed(),
    "head_dim": Followed(),
    "vocab_size": Followed(),
    "rms_norm_eps": Followed(),
    "max_position_embeddings": Followed(),
    "tie_word_embeddings": Followed(),
    "rope_theta": Followed(),
    "rope_scaling": Followed(),
    "rope_parameters": Followed(),
    "layer_types": Followed(),
    "model_type": Only(("llama",)),
    "hidden_act": Only(("silu",)),
    "attention_bias": Only((False,)),
    "mlp_bias": Only((False,)),
    "sliding_window": Only((None, False)),
    "attention_chunk_size": Only((None,)),
    "kv_sharing_modes": Only((None,)),
    "partial_rotary_factor": Only((None, 1)),
    "_rope_type_labels": Only((None, [])),
    "is_causal": Only((None, True)),
    "text_config": Only((None,)),
    "pad_token_id": Unused("zeroes a row of the embedding when a model is made anew"),
    "bos_token_id": Unused("begins a prompt of no tokens"),
    "eos_token_id": Unused("read with the settings of generation, see generation_file.py"),
    "pretraining_tp": Unused("how training split the weights"),
    "default_theta": Unused("set after it was used"),
    "default_rope_type": Unused("set after it was used"),
    "ignore_keys_at_rope_validation": Unused("for a check that only warns"),
    "_post_init_done": Unused("set by transformers itself"),
    "vision_aspect_ratio": _ELSEWHERE,
    "vision_feature_layer": _ELSEWHERE,
    "vision_feature_select_strategy": _ELSEWHERE,
}

# An object under rope_parameters or rope_scaling.
ROPE: Table = {
    "rope_type": Followed(),
    "type": Followed(),
    "rope_theta": Followed(),
    "factor": Followed(),
    "partial_rotary_factor": Only((None, 1)),
}
