"""Which chat template counts, and how many placeholders an image gets: as in transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minillava.loading.config_file import read_config
from minillava.loading.processor_files import read_processor
from minillava.loading.prompt_files import read_template
from minillava.processing.templates import JINJA, LLAVA_HF_JINJA

TOY = Path(__file__).parents[1] / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
CONFIG = read_config(TOY / "config.json")
PLACEHOLDERS = json.loads((TOY / "processor_config.json").read_text())
OTHER = "{{ 'other' }}"
MORE = "additional_chat_templates/default.jinja"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = ("*.safetensors*", "chat_template*")
    shutil.copytree(TOY, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*names))
    return tmp_path


def write(folder: Path, name: str, template: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    is_json = name.endswith(".json")
    entries = {**(PLACEHOLDERS if name == "processor_config.json" else {})}
    text = json.dumps(entries | {"chat_template": template}) if is_json else template
    (folder / name).write_text(text)


def apply(folder: Path, question: str, images: int) -> str:
    """The prompt that transformers makes of one question."""
    from transformers import AutoProcessor

    content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    processor = AutoProcessor.from_pretrained(folder)
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.json": LLAVA_HF_JINJA},
        {"chat_template.jinja": LLAVA_HF_JINJA},
        {MORE: LLAVA_HF_JINJA},
        {"processor_config.json": LLAVA_HF_JINJA},
        {"processor_config.json": {"default": LLAVA_HF_JINJA, "more": OTHER}},
        {"chat_template.json": {"default": LLAVA_HF_JINJA, "more": OTHER}},
        {"chat_template.json": LLAVA_HF_JINJA, "chat_template.jinja": OTHER},
        {"processor_config.json": LLAVA_HF_JINJA, "chat_template.json": OTHER},
        {"chat_template.jinja": LLAVA_HF_JINJA, MORE: OTHER},
        {"chat_template.jinja": LLAVA_HF_JINJA + "\n"},
        {"chat_template.jinja": LLAVA_HF_JINJA.replace("%}{%", "%}\n  {%")},
        {"chat_template.jinja": LLAVA_HF_JINJA.replace("\\n", "\n")},
        {"chat_template.jinja": JINJA[1][1]},
    ],
)
def test_a_known_template_gives_transformers_prompt(folder: Path, files: dict[str, Any]) -> None:
    for name, template in files.items():
        write(folder, name, template)
    ours = read_processor(folder, replace(CONFIG, image_aspect="pad"))
    assert ours.template == "llava-hf"
    for images in (0, 1, 2):
        assert ours.prompt("What is it?", images) == apply(folder, "What is it?", images)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            {"chat_template.json": OTHER, "chat_template.jinja": LLAVA_HF_JINJA},
            "chat_template.json",
        ),
        ({"chat_template.jinja": OTHER}, "chat_template.jinja"),
        (
            {MORE: OTHER},
            MORE,
        ),
        (
            {"processor_config.json": OTHER, "chat_template.json": LLAVA_HF_JINJA},
            "processor_config.json",
        ),
        ({"chat_template.json": {"more": LLAVA_HF_JINJA}}, "chat_template.json"),
        ({"chat_template.jinja": LLAVA_HF_JINJA.replace("USER", "User")}, None),
        ({"chat_template.jinja": LLAVA_HF_JINJA.replace("+ ' '", "")}, "chat_template.jinja"),
    ],
)
def test_another_template_is_refused_where_one_is_needed(
    folder: Path, files: dict[str, Any], named: str | None
) -> None:
    for name, template in files.items():
        write(folder, name, template)
    ours = read_processor(folder, CONFIG)
    assert ours(["USER: a ASSISTANT:"]).ids.shape[0] == 1  # a prompt that is written out
    if named is None:
        assert ours.template == "llava-hf"  # the same text all the same
        return
    with pytest.raises(ValueError, match=r"is not a known template.*--raw-prompt") as caught:
        ours.prompt("What?")
    assert str(folder / named) in str(caught.value)


def test_without_a_template_the_default_counts(folder: Path) -> None:
    """transformers' processor does not read tokenizer_config.json's, and has none then."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OTHER}))
    with pytest.raises(ValueError, match="does not have a chat template"):
        apply(folder, "a", 0)
    assert read_template(folder, "vicuna_v1") == "vicuna_v1"
    for nothing in (None, ""):
        write(folder, "chat_template.json", nothing)
        assert read_template(folder, "llava-hf") == "llava-hf"


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_of_another_type_is_refused(folder: Path, name: str) -> None:
    for value in (5, ["x"], {"default": 1}):
        write(folder, name, value)
        with pytest.raises(ValueError, match=f"{name}: chat_template is .*, but must be a text"):
            read_template(folder, "llava-hf")


def test_a_template_file_must_be_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not valid UTF-8"):
        read_template(folder, "llava-hf")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(ValueError, match=r"chat_template.jinja is a folder"):
        read_template(folder, "llava-hf")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"num_additional_image_tokens": 0},
            r"num_additional_image_tokens=0, .* make 15 place",
        ),
        ({"vision_feature_select_strategy": "full"}, r"strategy=full make 17 placeholders for an"),
        ({"patch_size": 7}, r"patch_size=7, .* make 64 placeholders for an image, but .* 16 image"),
        ({"patch_size": "x"}, r"processor_config.json: patch_size is 'x'"),
        ({"patch_size": 0}, r"processor_config.json: patch_size is 0"),
        ({"image_token": "<img>"}, r"image_token is '<img>', but must be '<image>'"),
        ({"processor_class": "LlavaNextProcessor"}, r"processor_class is 'LlavaNextProcessor'"),
        ({"patch_size": None}, None),
        ({"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}, None),
    ],
)
def test_the_number_of_placeholders_is_the_models(
    folder: Path, entries: dict[str, Any], message: str | None
) -> None:
    (folder / "processor_config.json").write_text(json.dumps(PLACEHOLDERS | entries))
    if message is None:
        assert read_processor(folder, CONFIG).num_image_tokens == 16
        return
    with pytest.raises(ValueError, match=message):
        read_processor(folder, CONFIG)
