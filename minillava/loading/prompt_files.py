"""What a checkpoint's files say about the text of a prompt: its chat template and placeholders."""

from __future__ import annotations

import re
from pathlib import Path

from ..config import Config
from ..processing.templates import IMAGE, JINJA
from .json_entries import Entries, read_entries, read_json
from .regular_files import MB, is_present, read_bytes

CORRECT = "correct the file"


def read_template(folder: str | Path, default: str) -> str:
    """The key of templates.TEMPLATES that the chat template of a checkpoint's folder amounts to.

    transformers' LlavaProcessor prefers processor_config.json, then chat_template.json, then
    chat_template.jinja, and does not read tokenizer_config.json. `default`: without any of them. A
    template that is not known gives the name of its file, which templates.conversation refuses; a
    prompt that is written out needs no template.
    """
    folder = Path(folder)
    path, text = folder / "processor_config.json", None
    if is_present(path):
        text = _read_entry(path)
    if text is None and is_present(folder / "chat_template.json"):
        path = folder / "chat_template.json"
        text = _read_entry(path) or None
    elif text is None:
        for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
            if text is None and is_present(folder / name):
                path = folder / name
                text = _read_text(path)
    if text is None:
        return default
    known = {_reduce(jinja): name for name, jinja in JINJA}
    return known.get(_reduce(text), str(path))


def check_placeholders(folder: str | Path, config: Config) -> None:
    """Refuse a processor_config.json that asks for other placeholders than <image> N times."""
    path = Path(folder) / "processor_config.json"
    e = read_entries(path)
    e.only("image_token", (IMAGE,), IMAGE)
    e.only("processor_class", ("LlavaProcessor",), "LlavaProcessor")
    e.only("vision_feature_select_strategy", ("default", "full"), "default")
    names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    patch, additional = e.integer(names[0], 1), e.integer(names[1], 0, 0)
    if any(e.values.get(name) is None for name in names):
        return  # transformers answers nothing with such a file
    n = (config.vision.image_size // patch) ** 2 + additional
    n -= e.values[names[2]] == "default"
    if n != config.vision.num_patches:
        settings = ", ".join(f"{name}={e.values[name]}" for name in names)
        raise ValueError(
            f"{path}: {settings} make {n} placeholders for an image, but the model has "
            f"{config.vision.num_patches} image tokens; take both from one checkpoint"
        )


def _read_entry(path: Path) -> str | None:
    """The text under chat_template, or under its default; their names if there are only others."""
    e = Entries(str(path), "", read_json(path))
    value = e.values.get("chat_template")
    if isinstance(value, dict):
        value = value.get("default", ", ".join(value))
    if not isinstance(value, str | None):
        raise e.error("chat_template", value, "a text, or texts of which one is 'default'", CORRECT)
    return value


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, MB).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 ({error}); download it again") from error


def _reduce(jinja: str) -> str:
    """A template without what does not change its result: comments, generation marks, line ends
    and spaces around tags that transformers' settings of jinja2 remove."""
    jinja = re.sub(r"(?m)^[ \t]+(?=\{[%#])", "", jinja.replace("\r\n", "\n"))
    jinja = re.sub(r"(?<=[%#]\})\n", "", jinja)
    jinja = re.sub(r"\{#.*?#\}|\{% (end)?generation %\}", "", jinja, flags=re.DOTALL)
    return jinja.removesuffix("\n").replace("\\n", "\n")
