"""Put questions and answers into the wording that a LLaVA-1.5 checkpoint was trained on.

"llava-hf" is the chat template of the llava-hf repositories; the other templates are
conv_templates of the original code (llava/conversation.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "<image>"
OPTIONS = "Options: "
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly"


@dataclass(frozen=True)
class Template:
    """The fixed text of a conversation: at its start, and around each question and answer."""

    system: str
    question: tuple[str, str]  # before and after a question
    answer: tuple[str, str]  # before and after an answer


_VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions. "
)
TEMPLATES = {
    "llava-hf": Template("", ("USER: ", " ASSISTANT:"), (" ", " ")),
    "vicuna_v1": Template(_VICUNA.format("user"), ("USER: ", " ASSISTANT:"), (" ", "</s>")),
    # FastV's scripts use this one for LLaVA-1.5.
    "llava_v1": Template(_VICUNA.format("human"), ("USER: ", " ASSISTANT:"), (" ", "</s>")),
    "plain": Template("", ("", "\n"), ("", "\n")),
    "llava_llama_2": Template(
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.\n<</SYS>>\n\n",
        ("", " [/INST]"),
        (" ", " </s><s>[INST] "),
    ),
}


_IMAGES_FIRST = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}"
)
_TEXT = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
)
_END = "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
# The chat template of the llava-hf repositories as jinja, as it is now and before it marked what
# the model generates.
LLAVA_HF_JINJA = (
    f"{_IMAGES_FIRST}{{% if message['role'] != 'assistant' %}}{_TEXT}{{% else %}}"
    + _TEXT.replace("{{ ", "{% generation %}{{ ").replace("}}", "}}{% endgeneration %}")
    + f"{{% endif %}}{_END}"
)
JINJA = (("llava-hf", LLAVA_HF_JINJA), ("llava-hf", f"{_IMAGES_FIRST}{_TEXT}{_END}"))


def conversation(
    template: str, question: str, turns: Sequence[tuple[str, str]] = (), n_images: int = 0
) -> str:
    """Build the prompt for `question` after earlier `turns` of (question, answer).

    All images belong to the first question: one line with <image> for each comes before it.
    conversation("llava-hf", "Why?", n_images=1) is "USER: <image>\\nWhy? ASSISTANT:". Raises
    ValueError for an unknown template.
    """
    if template not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise ValueError(
            f"{template!r} is not a known template; choose one of {known}, or write out "
            "the whole prompt (--raw-prompt)"
        )
    t = TEMPLATES[template]
    text = t.system
    images = f"{IMAGE}\n" * n_images
    for asked, answered in turns:
        text += t.question[0] + images + asked + t.question[1]
        text += t.answer[0] + answered + t.answer[1]
        images = ""
    return text + t.question[0] + images + question + t.question[1]


@dataclass(frozen=True)
class Choices:
    """A multiple-choice prompt cut at its options; before + options + after is the prompt."""

    before: str
    options: str  # "Options: (A) ... (B) ..."
    after: str  # "\nAnswer with the option's letter ..."

    @property
    def texts(self) -> str:
        """The options without letters: "Options: (A) red fish (B) blue" -> "red fish blue".

        As in Simignore's 7B code (mm_utils.py, tokenizer_image_token_split_option_without_letter),
        which cuts off the three characters "(A)", and the first space of the result.
        """
        options = re.split(r" (?=\([A-Z]\))", self.options.removeprefix(OPTIONS))
        return "".join(option[3:] for option in options)[1:]


def split_choices(prompt: str) -> Choices:
    """Cut "... Options: (A) ... (B) ...\\nAnswer with the option's letter ..." into three parts.

    The last instruction counts, and the last "Options: " before it (the released Simignore code
    would lose text if there are several). Raises ValueError if one of the two is missing.
    """
    before, instruction, after = prompt.rpartition(INSTRUCTION)
    head, marker, choices = before.rpartition(OPTIONS)
    if not instruction or not marker:
        missing = OPTIONS if instruction else INSTRUCTION
        raise ValueError(
            f"the prompt has no {missing!r}; options are read from prompts of the form "
            f"'… {OPTIONS}(A) … (B) …{INSTRUCTION}.'".replace("\n", "\\n")
        )
    return Choices(head, marker + choices, instruction + after)
