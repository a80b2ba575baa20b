"""JSON files changed at random places: every outcome is a model or a ValueError of one line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from minillava.generate import generate
from minillava.loading.checkpoint import load
from minillava.processing.image import preprocess

FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
PICTURES = [
    Image.radial_gradient("L").convert("RGB").resize(size) for size in ((150, 90), (33, 34))
]

DEEP: Any = 1
for _ in range(300):
    DEEP = [DEEP]

# Written into the text of a file as they are, since json.dumps writes no value like them.
RAW = (
    *("1e999", "-1e999", "NaN", "1" + "0" * 400, "-1" + "0" * 400, "1" * 5000),
    *("[" * 10**5, '"\\ud800"'),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**12, 0.5, -0.5, 1e308, 1e-308, 2.0, 224),
    *("", "x", "x" * 5000, "a\nb", "\ufeff", "gelu", "default", "linear", "llama"),
    *([], [1], [[1]], [1, 2, 3], [0.5, 0.5, 0.5], ["x"], {}, {"a": 1}, {"height": 56, "width": 56}),
    DEEP,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.write_hf(path, layers=1, vision_layers=2)
    pictures = json.loads((path / "preprocessor_config.json").read_text())
    nested = {"image_processor": pictures, "patch_size": 14, "num_additional_image_tokens": 1}
    (path / "processor_config.json").write_text(json.dumps(nested))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (path / "config.json").write_text(json.dumps(config))
    generation = {"repetition_penalty": 1.2, "suppress_tokens": [5], "bad_words_ids": [[6, 7]]}
    tiny.rewrite_config(path, lambda v: v.update(generation), "generation_config.json")
    return path


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def changed_text(text: str, rng: random.Random) -> str:
    """One to three random changes of values, then perhaps one of the text."""
    values = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(list(places(values)) or [(values, "x")])
        kind = rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("hidden_size", "do_pad", "num_beams", "x"))] = rng.choice(VALUES)
        elif kind == 2:
            other, name = rng.choice(list(places(values)) or [(values, "x")])
            if isinstance(container, dict) and isinstance(other, dict) and name in other:
                container[name] = json.loads(json.dumps(other[name]))  # in another section
        elif kind == 3:
            container[key] = "RAW"
        else:
            container[key] = rng.choice(VALUES)
    new = json.dumps(values).replace('"RAW"', rng.choice(RAW))
    at = rng.randrange(len(new) + 1)
    kind = rng.randrange(30)
    if kind == 0:
        return new[:at]
    if kind == 1:
        return "\ufeff" + new
    if kind == 2 and new.startswith("{") and len(new) > 2:
        return '{"size": 3, "hidden_size": 5, ' + new[1:]  # perhaps an entry twice
    return new[:at] + rng.choice('0"{}[],:e') + new[at + 1 :] if kind == 3 else new


def variant(folder: Path, to: Path, rng: random.Random) -> Path:
    to.mkdir()
    name = rng.choice(FILES)
    for path in folder.iterdir():
        if path.name == name:
            (to / name).write_text(changed_text(path.read_text(), rng), errors="surrogatepass")
        elif path.name != "processor_config.json" or name == path.name:
            (to / path.name).symlink_to(path)
    return to


def outcome(folder: Path) -> Any:
    """The model and its processor; None if the folder is refused in one line."""
    message = ""
    try:
        return load(folder)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000
    return None


def compare(folder: Path, loaded: Any) -> bool:
    """Whether transformers answers too; if so, with the same tokens and pixels."""
    model, processor = loaded
    if model.config.text.max_position_embeddings < 30:
        return False  # the prompt would be refused, see test_generate.py
    batch = tiny.make_batch(model, "ttItt")
    try:
        hf = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        out = hf.generate(
            input_ids=batch.ids,
            pixel_values=batch.pixels,
            attention_mask=batch.mask.long(),
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=False,
        )
        processed = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
        pixels = [processed(p, return_tensors="pt").pixel_values[0] for p in PICTURES]
    except Exception:
        return False
    with torch.inference_mode():
        tokens = generate(model, batch, max_new_tokens=5).tokens
    expected = out[0, batch.ids.shape[1] :].tolist()
    assert tokens == [expected]
    for picture, theirs in zip(PICTURES, pixels, strict=True):
        assert torch.equal(preprocess(picture, processor.image, processor.aspect), theirs)
    return True


def fuzz(folder: Path, to: Path, count: int, compared: int, seed: int) -> tuple[int, int]:
    """How many of `count` variants load, and how many of those transformers answers too."""
    rng = random.Random(seed)
    loaded = answered = 0
    for i in range(count):
        changed = variant(folder, to / str(i), rng)
        found = outcome(changed)
        if found is not None:
            loaded += 1
            answered += loaded <= compared and compare(changed, found)
    return loaded, answered


def test_changed_files_load_or_are_refused(folder: Path, tmp_path: Path) -> None:
    loaded, answered = fuzz(folder, tmp_path, 120, 12, seed=1)
    assert 10 < loaded < 110
    assert answered > 3


@pytest.mark.slow
def test_many_changed_files_load_or_are_refused(folder: Path, tmp_path: Path) -> None:
    loaded, answered = fuzz(folder, tmp_path, 1500, 300, seed=2)
    assert 150 < loaded < 1350
    assert answered > 50


def test_the_unchanged_folder_is_answered_like_transformers(folder: Path) -> None:
    assert compare(folder, load(folder))
