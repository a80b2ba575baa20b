"""The settings of generation_config.json that change greedy answers, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from minillava.generate import generate
from minillava.loading.checkpoint import load
from minillava.processing.generation_rules import GenerationRules
from minillava.request import Settings

MANY = 14  # new tokens
PROMPTS = ("ttItt", "tIttIttt", "tttt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory, layers=2, vision_layers=3)


@pytest.fixture(scope="module")
def usual(folder: Path) -> list[list[int]]:
    """What each prompt is answered without any rules."""
    model, _ = load(folder)
    return generate(model, tiny.make_batch(model, *PROMPTS), max_new_tokens=MANY).tokens


def variant(
    folder: Path, to: Path, entries: dict[str, Any], file: str = "generation_config.json"
) -> Path:
    """The same checkpoint with other settings, in generation_config.json or in config.json."""
    to.mkdir()
    for path in folder.iterdir():
        if path.name != "generation_config.json":
            (to / path.name).symlink_to(path)
    values = json.loads((folder / file).read_text())
    (values["text_config"] if file == "config.json" else values).update(entries)
    (to / file).unlink(missing_ok=True)
    (to / file).write_text(json.dumps(values))
    return to


def theirs(folder: Path, **options: Any) -> list[list[int]]:
    """The answers of transformers, each prompt alone, without what follows an end token."""
    hf = LlavaForConditionalGeneration.from_pretrained(folder)
    model, _ = load(folder)
    batch = tiny.make_batch(model, *PROMPTS)
    found = []
    for b in range(len(PROMPTS)):
        one = tiny.alone(model, batch, b)
        inputs = {"input_ids": one.ids, "attention_mask": one.mask.long()}
        if one.pixels is not None:
            inputs["pixel_values"] = one.pixels
        out = hf.generate(**inputs, max_new_tokens=MANY, do_sample=False, **options)
        found.append(out[0, one.ids.shape[1] :].tolist())
    return found


def ours(folder: Path, **options: Any) -> list[list[int]]:
    model, _ = load(folder)
    batch = tiny.make_batch(model, *PROMPTS)
    return generate(model, batch, max_new_tokens=MANY, **options).tokens


# %0, %1, ... stand for tokens that the first prompt is usually answered with.
RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": ["%0", "%2"]},
    {"begin_suppress_tokens": ["%0", "%1"]},
    {"bad_words_ids": [["%0"], ["%1", "%2"], ["%0", "%1", "%2"]]},
    {"bad_words_ids": [["%3"], ["%1"]], "eos_token_id": "%3"},
    {"eos_token_id": "%2", "min_new_tokens": 7},
    {"eos_token_id": ["%2", "%4"], "min_length": 26},
    {"eos_token_id": "%2", "min_length": 60, "min_new_tokens": 4},
    {"eos_token_id": "%2", "min_length": 60, "min_new_tokens": 0},
    {"forced_eos_token_id": 9},
    {"forced_eos_token_id": [11, 9], "suppress_tokens": [9]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "begin_suppress_tokens": ["%0"]},
    {"suppress_tokens": []},
]


def filled(value: Any, usual: list[int]) -> Any:
    if isinstance(value, str):
        return usual[int(value[1:])]
    if isinstance(value, list):
        return [filled(v, usual) for v in value]
    return {k: filled(v, usual) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("rules", "file"),
    [(rules, "generation_config.json") for rules in RULES]
    + [(rules, "config.json") for rules in RULES[::3]],
    ids=str,
)
def test_rules_give_the_tokens_of_transformers(
    folder: Path, tmp_path: Path, usual: list[list[int]], rules: dict[str, Any], file: str
) -> None:
    entries = filled(rules, usual[0])
    changed = variant(folder, tmp_path / "c", entries, file)
    expected = theirs(changed)
    assert ours(changed) == expected
    if rules != {"suppress_tokens": []}:
        assert expected != usual, "the rule changes nothing here"


def test_without_a_cache_and_alone_the_answers_are_the_same(
    folder: Path, tmp_path: Path, usual: list[list[int]]
) -> None:
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    model, _ = load(variant(folder, tmp_path / "c", rules))
    batch = tiny.make_batch(model, *PROMPTS)
    together = generate(model, batch, max_new_tokens=MANY)
    again = generate(model, batch, max_new_tokens=MANY, use_cache=False)
    assert together.tokens == again.tokens != usual
    for b, tokens in enumerate(together.tokens):
        assert generate(model, tiny.alone(model, batch, b), max_new_tokens=MANY).tokens == [tokens]


@pytest.mark.parametrize("minimum", [2, 9])
def test_the_callers_minimum_wins(
    folder: Path, tmp_path: Path, usual: list[list[int]], minimum: int
) -> None:
    entries = {"eos_token_id": usual[0][1], "min_new_tokens": 6, "min_length": 80}
    changed = variant(folder, tmp_path / "c", entries)
    expected = theirs(changed, min_new_tokens=minimum)
    assert ours(changed, min_new_tokens=minimum) == expected
    assert ours(changed) != expected


def test_the_logits_are_those_that_each_token_was_chosen_from(
    folder: Path, tmp_path: Path, usual: list[list[int]]
) -> None:
    banned = usual[0][0]
    model, _ = load(variant(folder, tmp_path / "c", {"suppress_tokens": [banned]}))
    batch = tiny.make_batch(model, *PROMPTS)
    result = generate(model, batch, max_new_tokens=3, output_logits=True)
    assert result.logits is not None
    assert result.logits.argmax(-1).tolist() == result.tokens
    assert (result.logits[..., banned] == -torch.inf).all()
    model.rules = None
    plain = generate(model, batch, max_new_tokens=1, output_logits=True)
    assert plain.logits is not None
    others = [i for i in range(tiny.VOCABULARY) if i != banned]
    assert torch.equal(plain.logits[:, 0, others], result.logits[:, 0, others])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_that_allow_no_token_are_refused(
    folder: Path, tmp_path: Path, temperature: float
) -> None:
    everything = {"suppress_tokens": list(range(tiny.VOCABULARY))}
    model, _ = load(variant(folder, tmp_path / "c", everything))
    with pytest.raises(ValueError, match="allow no token here; change generation_config"):
        generate(model, tiny.make_batch(model, "ttt"), temperature=temperature)


def test_a_checkpoint_without_rules_has_none(folder: Path) -> None:
    assert load(folder)[0].rules is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0, but must be a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"repetition_penalty": 10**400}, "repetition_penalty is 1000"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size is 2.5"),
        ({"suppress_tokens": [320]}, "suppress_tokens is .320., but must be a token id"),
        ({"suppress_tokens": [True]}, "suppress_tokens is .True."),
        ({"bad_words_ids": []}, "bad_words_ids is .., but must be a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is ...., but must be a list of lists"),
        ({"bad_words_ids": [5]}, "bad_words_ids is .5."),
        ({"bad_words_ids": {"a": 1}}, "bad_words_ids is "),
        ({"min_length": "x"}, "min_length is 'x'"),
        ({"min_new_tokens": True}, "min_new_tokens is True"),
        ({"eos_token_id": [[2]]}, "eos_token_id is ..2.."),
        ({"forced_eos_token_id": -1}, "forced_eos_token_id is -1"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_refused(
    folder: Path, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    changed = variant(folder, tmp_path / "c", entries)
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}") as caught:
        load(changed)
    assert "\n" not in str(caught.value)


ids = st.integers(0, 11)


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(ids, min_size=1, max_size=12),
    penalty=st.sampled_from([1.0, 0.5, 1.5]),
    ngram=st.integers(0, 4),
    words=st.lists(st.lists(ids, min_size=1, max_size=3), max_size=3),
    suppress=st.lists(ids, max_size=3),
    first=st.lists(ids, max_size=3),
    generated=st.integers(0, 3),
    least=st.integers(0, 14),
)
def test_rules_change_logits_as_transformers_processors(
    prompt: list[int],
    penalty: float,
    ngram: int,
    words: list[list[int]],
    suppress: list[int],
    first: list[int],
    generated: int,
    least: int,
) -> None:
    generated = min(generated, len(prompt) - 1)
    eos = torch.tensor([3])
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(penalty)]
    if ngram:
        processors.append(NoRepeatNGramLogitsProcessor(ngram))
    if [w for w in words if w != [3]]:
        processors.append(NoBadWordsLogitsProcessor(words, eos))
    processors.append(MinLengthLogitsProcessor(least, eos))
    processors.append(SuppressTokensLogitsProcessor(suppress))
    processors.append(SuppressTokensAtBeginLogitsProcessor(first, len(prompt) - generated))
    logits = torch.linspace(-1, 1, 40)[torch.randperm(40)]
    row = torch.tensor(prompt)
    rules = GenerationRules(
        repetition_penalty=penalty,
        no_repeat_ngram_size=ngram,
        bad_words_ids=tuple(map(tuple, words)),
        min_length=least,
        suppress_tokens=tuple(suppress),
        begin_suppress_tokens=tuple(first),
        end_tokens=(3,),
    )
    found = rules.apply(logits[None], [row], generated, Settings(max_new_tokens=9))
    expected = LogitsProcessorList(processors)(row[None], logits[None])
    assert torch.equal(found, expected)
