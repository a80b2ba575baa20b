"""generation_config.json -> end tokens and GenerationRules.

transformers takes the settings of `generate` from generation_config.json alone if it is there, and
otherwise from config.json: from its top level, and from text_config for what is null or absent
there. The table says what becomes of each. What only concerns drawing at random has no influence:
minillava answers greedily unless the caller gives a temperature, whatever do_sample says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..processing.generation_rules import GenerationRules
from .json_entries import Entries, Followed, Only, Table, Unused

_CALLER = Unused("the caller's arguments say how long an answer may be and what is returned")
_DRAWING = Unused("for drawing at random, which the caller's temperature and top_p settle")
_BEAMS = Unused("for beam search, which num_beams asks for")
_ASSISTED = Unused("for answers drafted by a smaller model, which have the same tokens")
_PACE = Unused("how the computation is arranged, not what it gives")
_GREEDY = "remove it: minillava takes the likeliest token of each step"

GENERATION: Table = {
    "eos_token_id": Followed(),
    "repetition_penalty": Followed(),
    "no_repeat_ngram_size": Followed(),
    "bad_words_ids": Followed(),
    "min_length": Followed(),
    "min_new_tokens": Followed(),
    "forced_eos_token_id": Followed(),
    "suppress_tokens": Followed(),
    "begin_suppress_tokens": Followed(),
    # Other ways to choose tokens.
    "num_beams": Only((None, 1), _GREEDY),
    "num_return_sequences": Only((None, 1), _GREEDY),
    "penalty_alpha": Only((None, 0), _GREEDY),
    "dola_layers": Only((None,), _GREEDY),
    "constraints": Only((None,), _GREEDY),
    "force_words_ids": Only((None,), _GREEDY),
    "guidance_scale": Only((None, 1), _GREEDY),
    "sequence_bias": Only((None,), _GREEDY),
    "encoder_repetition_penalty": Only((None, 1), _GREEDY),
    "encoder_no_repeat_ngram_size": Only((None, 0), _GREEDY),
    "exponential_decay_length_penalty": Only((None,), _GREEDY),
    "watermarking_config": Only((None,), _GREEDY),
    "forced_bos_token_id": Only((None,), _GREEDY),
    "token_healing": Only((None, False), _GREEDY),
    "use_mtp": Only((None, False), _GREEDY),
    "speculation_type": Only((None,), _GREEDY),
    "is_assistant": Only((None, False), _GREEDY),
    "assistant_early_exit": Only((None,), _GREEDY),
    "stop_strings": Only((None,), "remove it, and give stop strings to generate (--stop TEXT)"),
    "max_time": Only((None,), "remove it: an answer ends after max_new_tokens, not after a time"),
    "cache_implementation": Only(
        (None, "dynamic", "static", "offloaded", "offloaded_static", "hybrid"),
        "remove it: the cache holds keys and values in the model's dtype",
    ),
    # Without influence on the likeliest token.
    "renormalize_logits": Unused("a constant is subtracted from all logits"),
    "remove_invalid_values": Unused("logits that are not finite are refused"),
    "do_sample": _DRAWING,
    "temperature": _DRAWING,
    "top_k": _DRAWING,
    "top_p": _DRAWING,
    "min_p": _DRAWING,
    "top_h": _DRAWING,
    "typical_p": _DRAWING,
    "epsilon_cutoff": _DRAWING,
    "eta_cutoff": _DRAWING,
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "low_memory": Unused("for contrastive search, which penalty_alpha asks for"),
    "prompt_lookup_num_tokens": _ASSISTED,
    "max_matching_ngram_size": _ASSISTED,
    "num_assistant_tokens": _ASSISTED,
    "num_assistant_tokens_schedule": _ASSISTED,
    "assistant_confidence_threshold": _ASSISTED,
    "assistant_lookbehind": _ASSISTED,
    "target_lookbehind": _ASSISTED,
    "assistant_ensemble_weight": _ASSISTED,
    "use_cache": _PACE,
    "cache_config": _PACE,
    "max_cache_len": _PACE,
    "prefill_chunk_size": _PACE,
    "compile_config": _PACE,
    "disable_compile": _PACE,
    "continuous_batching_config": _PACE,
    "max_length": _CALLER,
    "max_new_tokens": _CALLER,
    "output_attentions": _CALLER,
    "output_hidden_states": _CALLER,
    "output_scores": _CALLER,
    "output_logits": _CALLER,
    "return_dict_in_generate": _CALLER,
    "pad_token_id": Unused("fills up ended samples of a batch"),
    "bos_token_id": Unused("begins a prompt of no tokens"),
    "decoder_start_token_id": Unused("for encoder-decoder models"),
    "transformers_version": Unused("says who wrote the file"),
    "_from_model_config": Unused("says where the file came from"),
}


def parse_generation(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    vocab_size: int,
    source: str = "config.json",
) -> GenerationRules:
    """The rules of a checkpoint; `end_tokens` are the ids that end an answer.

    config: config.json, an object. generation: generation_config.json, or None if there is none.
    Raises ValueError for settings that minillava does not compute.
    """
    if generation is not None:
        e = dict.fromkeys(GENERATION, Entries("generation_config.json", "", generation))
    else:
        top = Entries(source, "", config)
        text = top.section("text_config", {})
        e = {k: top if config.get(k) is not None else text for k in GENERATION}
    for key, rule in GENERATION.items():
        e[key].check({key: rule})
    unset = e["min_new_tokens"].values.get("min_new_tokens") is None
    least = e["min_new_tokens"].integer("min_new_tokens", 0, 0)
    return GenerationRules(
        repetition_penalty=e["repetition_penalty"].number("repetition_penalty", 1.0, 1e6),
        no_repeat_ngram_size=e["no_repeat_ngram_size"].integer("no_repeat_ngram_size", 0, 0),
        bad_words_ids=_parse_words(e["bad_words_ids"], vocab_size),
        min_length=e["min_length"].integer("min_length", 0, 0),
        min_new_tokens=None if unset else least,
        end_tokens=e["eos_token_id"].ids("eos_token_id", vocab_size),
        **{key: e[key].ids(key, vocab_size) for key in _TOKENS},
    )


_TOKENS = ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")


def changes_tokens(rules: GenerationRules) -> bool:
    """Whether the rules can change an answer; end tokens alone only end it."""
    nothing = GenerationRules(end_tokens=rules.end_tokens)
    return rules not in (nothing, GenerationRules(end_tokens=rules.end_tokens, min_new_tokens=0))


def _parse_words(e: Entries, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """bad_words_ids: a list of lists of token ids."""
    value = e.values.get("bad_words_ids")
    if value is None:
        return ()
    lists = isinstance(value, list) and bool(value)
    if not lists or not all(
        isinstance(word, list)
        and word
        and all(type(i) is int and 0 <= i < vocab_size for i in word)
        for word in value
    ):
        allowed = f"a list of lists of token ids from 0 to {vocab_size - 1}, none of them empty"
        raise e.error("bad_words_ids", value, allowed, "correct the file")
    return tuple(tuple(word) for word in value)
