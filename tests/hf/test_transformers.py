"""Plans in transformers: our kept sets and tokens, from their layers, cache and generate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import DEMO_VALUES, example, write_clip

import minillava
from minillava import Batch, load, parse_plan
from minillava.generate import generate
from minillava.hf import to_transformers
from minillava.pruning import METHODS

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parents[2] / "weights" / "demo"
NEW = 5


@pytest.fixture(scope="module")
def theirs() -> Any:
    found = transformers.LlavaForConditionalGeneration.from_pretrained(
        DEMO, torch_dtype=torch.float32
    )
    return found.eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.AutoProcessor.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def ours() -> Any:
    return load(DEMO)[0]


@pytest.fixture(scope="module")
def inputs(processor: Any) -> Any:
    """Prompts of different lengths, with one, two and no pictures."""
    image = Image.open(DEMO / "example.png").convert("RGB")
    return processor(
        text=[
            "USER: <image>\nWhat digit is red? ASSISTANT:",
            "USER: <image> <image>\nWhat is in the pictures, at the left? ASSISTANT:",
            "USER: What is red? ASSISTANT:",
        ],
        images=[[image], [image, image.rotate(90)], []],
        return_tensors="pt",
        padding=True,
    )


def batch_of(inputs: Any) -> Batch:
    return Batch.from_padded(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])


def answers(model: Any, inputs: Any, n: int = NEW, **options: Any) -> list[list[int]]:
    found = model.generate(**inputs, max_new_tokens=n, **{"do_sample": False, **options})
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def assert_same(ours: Any, model: Any, inputs: Any, plan: Any, **options: Any) -> None:
    """Equal tokens up to the end of each answer, equal kept sets."""
    expected = generate(ours, batch_of(inputs), plan, NEW, **options)
    found = answers(model, inputs, **options)
    assert [f[: len(t)] for f, t in zip(found, expected.tokens, strict=True)] == expected.tokens
    assert [k.digest for k in model.kept] == [k.digest for k in expected.report.kept]
    assert [k.extra for k in model.kept] == [k.extra for k in expected.report.kept]
