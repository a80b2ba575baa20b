"""The adapter for VLMEvalKit, whose base class is its own if it is installed, else a stand-in."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minillava import load, parse_plan
from minillava.generate import generate
from minillava.processing.processor import Processor

DEMO = Path(__file__).parents[2] / "weights" / "demo"
PLAN = "fastv:k=3,r=0.75"


class BaseModel:
    """As vlmeval/vlm/base.py: generate() checks a message and hands it to generate_inner()."""

    allowed_types = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: Any, dataset: Any = None) -> Any:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    name = "minillava.harness.vlmevalkit"
    if importlib.util.find_spec("vlmeval") is None:
        for parent in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setattr(sys.modules["vlmeval.vlm.base"], "BaseModel", BaseModel, raising=False)
    yield importlib.import_module(name)
    del sys.modules[name]


def test_answers_are_those_of_generate(
    adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, call = [], Processor.__call__

    def noting(self: Any, texts: Any, *rest: Any) -> Any:
        prompts.append(texts)
        return call(self, texts, *rest)

    monkeypatch.setattr(Processor, "__call__", noting)
    picture, turned = DEMO / "example.png", tmp_path / "turned.png"
    Image.open(picture).rotate(90).save(turned)
    asked = adapter.MiniLLaVA(str(DEMO), prune=PLAN, max_new_tokens=12)
    model, processor = load(DEMO)
    for images, question in (
        ([picture], "What digit is red?"),
        ([picture, turned], "What is in the pictures?"),
        ([], "What is red?"),
    ):
        message = [{"type": "image", "value": str(path)} for path in images]
        found = asked.generate([*message, {"type": "text", "value": question}], dataset="d")
        places = "<image>\n" * len(images)
        prompt = f"USER: {places}{question} ASSISTANT:"
        batch = processor([prompt], [[Image.open(path) for path in images]])
        result = generate(model, batch, parse_plan(PLAN), max_new_tokens=12)
        assert prompts[-2] == prompts[-1]
        assert found == processor.decode(result.tokens[0])


def test_what_it_cannot_do_is_refused(adapter: Any) -> None:
    with pytest.raises(ValueError, match="no pruning method 'fastfood'"):
        adapter.MiniLLaVA(str(DEMO), prune="fastfood")
    with pytest.raises(ValueError, match="template=alpaca; there are: "):
        adapter.MiniLLaVA(str(DEMO), template="alpaca")
    model = adapter.MiniLLaVA(str(DEMO))
    with pytest.raises(ValueError, match="a part of type video; minillava reads images and text"):
        model.generate_inner([{"type": "video", "value": "film.mp4"}])
