"""Questions and answers as the text a LLaVA-1.5 checkpoint was trained on.

The llava-hf wording is the chat template of those repositories, the others are conv_templates of
the original code (llava/conversation.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "<image>"
OPTIONS = "Options: "
LETTER = "\nAnswer with the option's letter from the given choices directly"


@dataclass(frozen=True)
class Template:
    """What stands before, between and behind the turns of a conversation."""

    system: str
    question: tuple[str, str]  # before and behind a question
    answer: tuple[str, str]


def _vicuna(whom: str) -> Template:
    return Template(
        f"A chat between a curious {whom} and an artificial intelligence assistant. The assistant "
        f"gives helpful, detailed, and polite answers to the {whom}'s questions. ",
        ("USER: ", " ASSISTANT:"),
        (" ", "</s>"),
    )


TEMPLATES = {
    "llava-hf": Template("", ("USER: ", " ASSISTANT:"), (" ", " ")),
    "vicuna_v1": _vicuna("user"),
    "llava_v1": _vicuna("human"),  # what FastV's scripts choose for LLaVA-1.5
    "plain": Template("", ("", "\n"), ("", "\n")),
    "llava_llama_2": Template(
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.\n<</SYS>>\n\n",
        ("", " [/INST]"),
        (" ", " </s><s>[INST] "),
    ),
}


def conversation(
    template: str, question: str, turns: Sequence[tuple[str, str]] = (), n_images: int = 0
) -> str:
    """The prompt for `question` after earlier `turns` of (question, answer).

    The pictures all belong to the first question and stand before it, each on a line of its own.
    Raises ValueError for an unknown template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"there is no template {template!r}; there are: {', '.join(TEMPLATES)}")
    t = TEMPLATES[template]
    text = t.system
    pictures = f"{IMAGE}\n" * n_images
    for asked, answered in turns:
        text += t.question[0] + pictures + asked + t.question[1]
        text += t.answer[0] + answered + t.answer[1]
        pictures = ""
    return text + t.question[0] + pictures + question + t.question[1]


@dataclass(frozen=True)
class Choices:
    """A ScienceQA-style prompt cut at its options; the three parts joined give it back."""

    before: str
    options: str  # "Options: (A) … (B) …"
    after: str  # "\nAnswer with the option's letter …"

    @property
    def texts(self) -> str:
        """The option texts without letters, in a row, as Simignore's released 7B code makes them.

        mm_utils.py, tokenizer_image_token_split_option_without_letter: "(A)" is cut off as three
        characters and the space before the first text with it.
        """
        pieces = re.split(r" (?=\([A-Z]\))", self.options.removeprefix(OPTIONS))
        return "".join(piece[3:] for piece in pieces)[1:]


def split_choices(prompt: str) -> Choices:
    """Cut a prompt of the form "… Options: (A) … (B) …\\nAnswer with the option's letter …".

    Where "Options: " comes more than once, the last one before the instruction counts (the released
    code would lose text there). Raises ValueError where one of the two is missing.
    """
    before, found, after = prompt.rpartition(LETTER)
    head, options, choices = before.rpartition(OPTIONS)
    if not found or not options:
        missing = LETTER if not found else OPTIONS
        raise ValueError(
            f"the prompt has no {missing!r}; options are read from prompts of the form "
            f"'… {OPTIONS}(A) … (B) …{LETTER}.'".replace("\n", "\\n")
        )
    return Choices(head, options + choices, found + after)
