"""Batches equal those of transformers' LlavaProcessor and of the released Simignore code."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minillava.loading.config_file import read_config
from minillava.loading.processor_files import read_processor
from minillava.processing.image import preprocess
from minillava.processing.tokenizer import StreamDecoder

GOLDENS = Path(__file__).parents[1] / "goldens"
TOY = GOLDENS / "checkpoints" / "tiny-a" / "hub-sharded"
REAL = GOLDENS / "tokenizer" / "tiny-c"
N, IMAGE = 16, 318

CONFIG = read_config(TOY / "config.json")
ours = read_processor(TOY, CONFIG)
SCIENCE = (
    "USER: <image>\nContext: N/A\nQuestion: Which?\nOptions: (A) red fish (B) blue\n"
    "Answer with the option's letter from the given choices directly. ASSISTANT:"
)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    settings = json.loads((TOY / "processor_config.json").read_text())
    keys = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    return LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(TOY),
        AutoTokenizer.from_pretrained(TOY),
        **{key: settings[key] for key in keys},
    )


def make_image(seed: int, width: int = 70, height: int = 60) -> Image.Image:
    levels = random.Random(seed).randbytes(4 * width * height)
    return Image.frombytes("RGBA", (width, height), levels)


def test_ids_equal_the_goldens(goldens: Path) -> None:
    processor = read_processor(REAL, read_config(REAL / "config.json"))
    golden = json.loads((goldens / "tokenizer" / "processor_tiny-c.json").read_text())
    assert len(golden["rows"]) == 3
    for row in golden["rows"]:
        batch = processor([row["text"]], [[make_image(0)] * row["text"].count("<image>")])
        assert batch.ids[0].tolist() == row["input_ids"]
        assert (batch.pixels is not None) == ("pixel_values" in row["keys"])
    batch = processor(golden["batch"]["texts"], [[make_image(0)], [make_image(1)]])
    assert batch.ids.tolist() == golden["batch"]["input_ids"]
    assert batch.mask.int().tolist() == golden["batch"]["attention_mask"]
    assert batch.pixels is not None
    assert list(batch.pixels.shape) == golden["batch"]["pixel_values_shape"]


PROMPTS = [
    ["USER: <image>\nWhat is this? ASSISTANT:"],
    ["<image>"],
    ["no image", "a longer prompt <image>\nwith one", "<image><image>\nand <image> </s>three"],
]


@pytest.mark.parametrize("prompts", PROMPTS)
def test_batches_equal_transformers(theirs: Any, prompts: list[str]) -> None:
    counts = [prompt.count("<image>") for prompt in prompts]
    images = [[make_image(10 * b + i) for i in range(n)] for b, n in enumerate(counts)]
    batch = ours(prompts, images)
    flat = [p for sample in images for p in sample]
    expected = theirs(text=prompts, images=flat, padding=True, return_tensors="pt")
    assert torch.equal(batch.ids, expected["input_ids"])
    assert torch.equal(batch.mask, expected["attention_mask"].bool())
    assert batch.pixels is not None
    assert torch.equal(batch.pixels, expected["pixel_values"])
    assert (batch.ids == IMAGE).sum(1).tolist() == [n * N for n in counts]
    assert batch.focus is None


def test_text_alone_equals_transformers(theirs: Any) -> None:
    prompts = ["Hi", "a longer prompt", ""]
    batch = ours(prompts)
    expected = theirs(text=prompts, padding=True, return_tensors="pt")
    assert torch.equal(batch.ids, expected["input_ids"])
    assert torch.equal(batch.mask, expected["attention_mask"].bool())
    assert batch.pixels is None


def test_decoded_text_equals_transformers(theirs: Any) -> None:
    ids = ours.tokenizer.encode("Yes, 世界.\n", bos=False)
    assert ours.decode([*ids, 2]) == theirs.decode([*ids, 2], skip_special_tokens=True)
    assert ours.decode([*ids, 2]) == "Yes, 世界.\n"
    stream = StreamDecoder(ours.tokenizer)
    assert "".join([stream.push(i) for i in ids]) + stream.finish() == "Yes, 世界.\n"


def test_the_aspect_is_the_checkpoints_unless_asked_for() -> None:
    image = make_image(0, 90, 40).convert("RGB")
    crop, pad = (preprocess(image, ours.image, aspect) for aspect in ("crop", "pad"))
    padded = replace(ours, aspect="pad")
    for processor, aspect, expected in (
        (ours, None, crop),
        (ours, "pad", pad),
        (padded, None, pad),
        (padded, "crop", crop),
    ):
        pixels = processor(["<image>"], [[image]], image_aspect=aspect).pixels
        assert pixels is not None
        assert torch.equal(pixels[0], expected)


# ------------------------------------------------------------ tokens


def expand_images(ids: list[int]) -> list[int]:
    return [w for i in ids for w in ([IMAGE] * N if i == IMAGE else [i])]


def test_tokens_of_the_original_code() -> None:
    text = "USER: <image>\nHi ASSISTANT: Yo.</s>USER: And? ASSISTANT:"
    batch = ours([text], [[make_image(0)]], tokens="llava")
    assert batch.ids[0].tolist() == expand_images(ours.tokenizer.encode_original(text))
    hf = ours([text], [[make_image(0)]])
    assert hf.ids.shape[1] == batch.ids.shape[1] + 1  # a space is put after </s>


def test_the_simignore_form_tokenises_four_pieces(theirs: Any) -> None:
    """Each of them alone, so a space is put before each."""
    pieces = (
        "USER: ",
        "\nContext: N/A\nQuestion: Which?\n",
        "Options: (A) red fish (B) blue",
        "\nAnswer with the option's letter from the given choices directly. ASSISTANT:",
    )
    alone = [theirs.tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    expected = [1, *alone[0], *[IMAGE] * N, *alone[1], *alone[2], *alone[3]]
    batch = ours([SCIENCE], [[make_image(0)]], tokens="simignore")
    assert batch.ids[0].tolist() == expected
    assert len(expected) == len(ours([SCIENCE], [[make_image(0)]]).ids[0]) + 2


def test_focus(theirs: Any) -> None:
    def alone(text: str, bos: bool) -> list[int]:
        return theirs.tokenizer(text, add_special_tokens=bos).input_ids

    expected = {
        "options": alone("red fish blue", True),
        "options-lettered": alone("Options: (A) red fish (B) blue", False),
        "the red one": alone("the red one", False),
    }
    for tokens in ("hf", "llava", "simignore"):
        for focus, ids in expected.items():
            batch = ours([SCIENCE], [[make_image(0)]], tokens=tokens, focus=focus)
            assert batch.focus is not None
            assert [f.tolist() for f in batch.focus if f is not None] == [ids]
            assert batch.focus[0] is not None
            assert batch.focus[0].dtype == torch.int64


def test_focus_can_differ_from_prompt_to_prompt() -> None:
    batch = ours(["Hi", SCIENCE, "Ho"], [[], [make_image(0)], []], focus=[None, "options", "x"])
    assert batch.focus is not None
    assert [f is None for f in batch.focus] == [True, False, False]
    assert ours(["Hi"], focus=[None]).focus is None


def test_columns_of_tables_are_lists_of_texts() -> None:
    found = ours(np.array(["Hi", "Ho"]), focus=(text for text in ("red", "blue")))
    expected = ours(["Hi", "Ho"], focus=["red", "blue"])
    assert torch.equal(found.ids, expected.ids)
    assert [own.tolist() for own in found.focus] == [own.tolist() for own in expected.focus]


# ------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"prompts": ["Hi", "<image> <image>"], "images": [[], [make_image(0)]]},
            "prompt 1 has 2 <image> placeholders, but images[1] has 1 images; add images or",
        ),
        (
            {"prompts": ["<image>"]},
            "prompt 0 has 1 <image> placeholders, but images[0] has 0 images",
        ),
        (
            {"prompts": ["Hi"], "images": [[make_image(0)]]},
            "prompt 0 has 0 <image> placeholders, but",
        ),
        (
            {"prompts": ["Hi"], "images": []},
            "images has 0 entries for 1 prompts; give one list per",
        ),
        (
            {"prompts": ["<image>"], "images": [make_image(0)]},
            "images[0] is Image; give a list of PIL images",
        ),
        (
            {"prompts": ["<image>"], "images": [["a.png"]]},
            "images[0] is list that contains str; give",
        ),
        ({"prompts": "Hi"}, "prompts is 'Hi'; give a list of at least one prompt"),
        ({"prompts": []}, "prompts is []; give a list of at least one prompt"),
        ({"prompts": None}, "prompts is None; give a list of at least one prompt"),
        ({"prompts": ["Hi", None]}, "prompts has None; give a list of texts"),
        (
            {"prompts": ["<image>"], "images": make_image(0)},
            "images is Image; give a list with one per prompt",
        ),
        ({"prompts": ["Hi"], "focus": 3}, "the focus of prompt 0 is 3; give a text or None"),
        ({"prompts": ["Hi"], "tokens": "gpt"}, "tokens='gpt' must be one of hf, llava, simignore"),
        (
            {"prompts": ["<image>"], "images": [[make_image(0)]], "image_aspect": "square"},
            "image_aspect='square' must be crop or pad",
        ),
        ({"prompts": ["Hi"], "image_aspect": "Pad"}, "image_aspect='Pad' must be crop or pad"),
        ({"prompts": ["Hi"], "focus": ["a", "b"]}, "focus has 2 entries for 1 prompts"),
        ({"prompts": ["Hi"], "focus": ""}, "the focus '' of prompt 0 is empty"),
        ({"prompts": ["Hi"], "focus": " "}, "the focus ' ' of prompt 0 is empty"),
        ({"prompts": ["Hi"], "focus": "the <image>"}, "or contains <image>; give a text"),
        (
            {"prompts": ["Hi"], "focus": "options"},
            "focus='options' does not work for prompt 0: the prompt has no",
        ),
        (
            {"prompts": ["<image>"], "images": [[make_image(0)]], "tokens": "simignore"},
            "tokens='simignore' does not work for prompt 0: the prompt has no",
        ),
        (
            {"prompts": [SCIENCE.replace("<image>", "")], "tokens": "simignore"},
            "needs prompts with one <image>, before the options; prompt 0 has 0",
        ),
        (
            {
                "prompts": [SCIENCE.replace("<image>", "") + "<image>"],
                "images": [[make_image(0)]],
                "tokens": "simignore",
            },
            "prompts with one <image>, before the options; prompt 0 has 1",
        ),
        ({"prompts": ["a\ud800"]}, "half of a character pair"),
        (
            {"prompts": ["fu\udcfcr"]},
            "pair or a byte that is not UTF-8 (after 'fu')",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ours(**call)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------ prompts and files


def test_a_question_goes_into_the_checkpoints_template() -> None:
    assert ours.prompt("Why?") == "USER: Why? ASSISTANT:"
    assert ours.prompt("Why?", 2) == "USER: <image>\n<image>\nWhy? ASSISTANT:"
    assert ours.prompt("Sure?", 1, [("Why?", "So.")]) == (
        "USER: <image>\nWhy? ASSISTANT: So. USER: Sure? ASSISTANT:"
    )
    original = replace(ours, template="vicuna_v1").prompt("Sure?", 1, [("Why?", "So.")])
    assert original.endswith(" USER: <image>\nWhy? ASSISTANT: So.</s>USER: Sure? ASSISTANT:")


def test_a_typed_placeholder_is_refused() -> None:
    for question, turns in (("a <image>?", []), ("b?", [("a <image>?", "c")])):
        with pytest.raises(ValueError, match="the question 'a <image>\\?' contains <image>"):
            ours.prompt(question, 1, turns)


def test_a_checkpoint_for_padded_images_uses_the_original_template(tmp_path: Path) -> None:
    processor = read_processor(TOY, replace(CONFIG, image_aspect="pad"))
    assert (processor.aspect, processor.template) == ("pad", "llava-hf")  # a file has that one
    shutil.copy(TOY / "tokenizer.json", tmp_path)
    processor = read_processor(tmp_path, replace(CONFIG, image_aspect="pad"))
    assert (processor.aspect, processor.template) == ("pad", "vicuna_v1")
    assert (ours.aspect, ours.template) == ("crop", "llava-hf")


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    shutil.copytree(TOY, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.saf*"))
    with pytest.raises(ValueError, match=r"<image> has id 318 .* but 317 in config.json"):
        read_processor(tmp_path, replace(CONFIG, image_token_id=317))
    small = replace(CONFIG, text=replace(CONFIG.text, vocab_size=319))
    with pytest.raises(ValueError, match=r"ids go up to 319, but the model has vocab_size=319"):
        read_processor(tmp_path, small)
