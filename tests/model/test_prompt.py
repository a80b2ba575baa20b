"""Prompts equal those of the original code and of the llava-hf chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillava.processing.templates import INSTRUCTION, TEMPLATES, conversation, split_choices

SCIENCE = (
    "USER: <image>\nContext: N/A\nQuestion: Which one?\n"
    "Options: (A) West Virginia (B) a (b) c (C) (D)\n"
    "Answer with the option's letter from the given choices directly. ASSISTANT:"
)


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Any:
    folder: Path = request.config.getoption("--goldens")
    return json.loads((folder / "tokenizer" / "prompts.json").read_text())


def render(template: str, texts: list[str], n_images: int = 0) -> str:
    """The prompt for `texts`: question, answer, question, ..."""
    turns = list(zip(texts[:-1:2], texts[1::2], strict=True))
    return conversation(template, texts[-1], turns, n_images)


def test_prompts_equal_the_original_conversations(goldens: Any) -> None:
    rows = goldens["original_conversations"]
    assert {row["template"] for row in rows} == set(TEMPLATES) - {"llava-hf"}
    for row in rows:
        texts = [text for _, text in row["turns"] if text is not None]
        assert render(row["template"], texts) == row["prompt"]
        n_images, question = texts[0].count("<image>\n"), texts[0].replace("<image>\n", "")
        assert render(row["template"], [question, *texts[1:]], n_images) == row["prompt"]


def test_prompts_equal_the_chat_template(goldens: Any) -> None:
    rows = goldens["hf_chat_template"]
    assert len(rows) == 8
    for row in rows:
        parts = [part for message in row["messages"] for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        n_images = sum(part["type"] == "image" for part in parts)
        cue = "" if row["add_generation_prompt"] else "ASSISTANT:"  # ours always ends so
        assert render("llava-hf", texts, n_images) == row["prompt"] + cue


def test_the_two_vicuna_templates_name_the_user_differently() -> None:
    assert "a curious user and" in conversation("vicuna_v1", "?")
    assert "the human's questions. USER: ? ASSISTANT:" in conversation("llava_v1", "?")


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'vicuna' is not a known template; choose one of llava-hf,"
    ):
        conversation("vicuna", "?")


def test_a_prompt_is_cut_at_its_options() -> None:
    parts = split_choices(SCIENCE)
    assert parts.before + parts.options + parts.after == SCIENCE
    assert parts.before.endswith("Which one?\n")
    assert parts.options == "Options: (A) West Virginia (B) a (b) c (C) (D)"
    assert parts.after.startswith("\nAnswer with")


def test_option_texts_lose_their_letters() -> None:
    """As in the released code three characters are cut from each option, and one space from the
    result; "(b)" in an option's text is not a letter."""
    assert split_choices(SCIENCE).texts == "West Virginia a (b) c"
    assert split_choices(f"Options: (A) yes{INSTRUCTION}").texts == "yes"
    assert split_choices(f"Options: {INSTRUCTION}").texts == ""


def test_the_last_instruction_counts() -> None:
    parts = split_choices(f"Options: (A) x{INSTRUCTION}. B\nOptions: (A) y{INSTRUCTION}.")
    assert parts.before == f"Options: (A) x{INSTRUCTION}. B\n"
    assert (parts.options, parts.after) == ("Options: (A) y", f"{INSTRUCTION}.")


def test_the_last_options_before_the_instruction_count() -> None:
    parts = split_choices(f"Options: none\nQuestion: ?\nOptions: (A) x{INSTRUCTION}.")
    assert (parts.before, parts.options) == ("Options: none\nQuestion: ?\n", "Options: (A) x")


@pytest.mark.parametrize(
    ("prompt", "missing"),
    [
        ("What is this?", "Answer with the option"),
        ("Options: (A) x (B) y", "Answer with the option"),
        (f"(A) x{INSTRUCTION}", "has no 'Options: '"),
        (f"(A) x{INSTRUCTION}\nOptions: (A) x", "has no 'Options: '"),
    ],
)
def test_a_prompt_without_options_is_refused(prompt: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing) as error:
        split_choices(prompt)
    assert "\n" not in str(error.value)
