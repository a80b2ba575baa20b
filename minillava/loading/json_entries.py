"""Read a checkpoint's json files entry by entry, with errors that name the entry."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# Written by transformers or by training code; none changes what the model computes.
HARMLESS = frozenset(
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

MAX_INTEGER = 10**7  # larger than any size in a checkpoint


class Entries:
    """One object of a json file, whose entries are read by type and checked.

    An entry that is null counts as absent and gets the default. `seen` collects the keys read.
    """

    def __init__(self, source: str, section: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.name = section
        self.values = values
        self.seen: set[str] = set()

    def where(self, key: str) -> str:
        """The place of an entry as errors show it: "config.json: text_config.hidden_size"."""
        return f"{self.source}: {self.name}{key}"

    def error(self, key: str, value: object, allowed: str, todo: str = "") -> ValueError:
        todo = todo or "use a LLaVA-1.5 checkpoint such as llava-hf/llava-1.5-7b-hf"
        return ValueError(f"{self.where(key)} is {value!r}, but must be {allowed}; {todo}")

    def section(self, key: str, default: Mapping[str, Any]) -> Entries:
        """The object under `key`."""
        self.seen.add(key)
        value = self.values.get(key)
        if not isinstance(value, Mapping | None):
            raise self.error(key, value, "an object", "correct the file")
        return Entries(self.source, f"{self.name}{key}.", default if value is None else value)

    def only(self, key: str, allowed: tuple[Any, ...], default: Any, todo: str = "") -> Any:
        """An entry that may only have one of the values in `allowed`."""
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        # Types must agree too, since True == 1 in Python.
        if not any(value == a and type(value) in (type(a), float) for a in allowed):
            known = " or ".join("absent" if a is None else repr(a) for a in allowed)
            raise self.error(key, value, known, todo)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.only(key, (False, True), default, "correct the file"))

    def integer(self, key: str, default: int, minimum: int = 1) -> int:
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or not minimum <= value <= MAX_INTEGER:
            allowed = f"one whole number of at least {minimum}, at most {MAX_INTEGER}"
            raise self.error(key, value, allowed)
        return value

    def number(self, key: str, default: float | None, minimum: float = 0.0) -> float:
        """A finite number above 0 and at least `minimum`. With the default None it is required."""
        self.seen.add(key)
        value = self.values.get(key)
        value = default if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise self.error(key, value, "a number above 0")
        if value < minimum:
            raise self.error(key, value, f"a number of at least {minimum}")
        return float(value)

    def multiple(self, key: str, value: int, of: str, divisor: int) -> None:
        if value % divisor:
            raise self.error(key, value, f"a multiple of {of}={divisor}", "correct the file")

    def refuse_strangers(self, harmless: Collection[str] = HARMLESS) -> None:
        """Raises ValueError for an unread entry, unless it is switched off or harmless."""
        for key, value in self.values.items():
            if key in self.seen or key in harmless or key.startswith("_"):
                continue
            if value in (None, False, "", [], {}):  # switched off
                continue
            raise ValueError(
                f"{self.where(key)} is {value!r}, an entry that minillava does not know and that "
                "may change what the model computes; the entries that transformers writes for "
                "LLaVA-1.5 are known; if this one changes nothing, remove it from the file"
            )


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a json file that contains an object. Raises ValueError if it does not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}); give a checkpoint that has it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid json ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} contains {type(content).__name__}, but must be an object; download it again"
        )
    return content
