"""The demo checkpoint: its files, the scenes of its questions, and its accuracy on them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from safetensors import safe_open

from eval.conditions import Questions, Way, ask
from eval.statistics import estimate
from minillava.generate import generate
from minillava.loading.checkpoint import load
from weights import scenes

DEMO = Path(__file__).parents[2] / "weights" / "demo"


# The files.


def test_the_hub_layouts_files_are_there_and_small():
    names = {path.name for path in DEMO.iterdir()}
    assert {
        "added_tokens.json",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    } <= names
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 8_000_000


def test_weights_are_16_bit_and_the_decoder_is_deep_enough():
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert all(f"language_model.model.layers.{i}.mlp.up_proj.weight" in names for i in range(12))
    config = json.loads((DEMO / "config.json").read_text())["vision_config"]
    assert (config["image_size"] // config["patch_size"]) ** 2 >= 144


def test_the_tokenizer_contains_no_path():
    trainer = dict(_fields(dict(_fields((DEMO / "tokenizer.model").read_bytes()))[2]))
    assert not trainer.get(1, b"")  # input
    assert not trainer.get(2, b"")  # model_prefix


def _fields(data: bytes):
    """Yield number and value of every field of a protocol buffer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, data[at : at + size]
            at += size


def test_every_word_of_an_answer_is_one_piece():
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    for word in (*scenes.COLOURS, *scenes.SHAPES, *scenes.DIGITS, "yes", "no", "nothing", *"ABCD"):
        assert len(pieces.encode(word)) == 1, word


# The scenes.


def test_scenes_are_a_function_of_the_seed():
    first, again, other = (scenes.make_scene(np.random.default_rng(s), "train") for s in (1, 1, 2))
    assert first.things == again.things
    assert first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


def test_no_digit_image_is_in_both_splits():
    used = {}
    for split in ("train", "held-out"):
        rng = np.random.default_rng(0)
        used[split] = {t.digit_index for _ in range(2000) for t in scenes.make_things(rng, split)}
    assert used["train"] & used["held-out"] == {-1}
    assert len(used["train"]) > 1000
    assert len(used["held-out"]) > 300


def test_things_have_different_places_and_names():
    rng = np.random.default_rng(3)
    for _ in range(200):
        things = scenes.make_things(rng, "train")
        assert 2 <= len(things) <= 5
        assert len({t.place for t in things}) == len({t.name for t in things}) == len(things)
        for t in things:
            x, y = (t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2
            assert scenes.PLACES.index(t.place) == int(y * 3 / 168) * 3 + int(x * 3 / 168)


def test_answers_are_right():
    rng = np.random.default_rng(4)
    for _ in range(300):
        things = scenes.make_things(rng, "train")
        for example in scenes.questions(things, rng, list(scenes.KINDS)):
            assert example.answer in _right_answers(things, example), (things, example)


def _right_answers(things: tuple[scenes.Thing, ...], example: scenes.Example) -> list[str]:
    """The right answers, derived from the question's text and the things alone."""
    question, options = example.question, {}
    if example.kind == "choice":
        question, line, _ = example.question.split("\n")
        texts = line.removeprefix("Options: (").split(" (")
        options = {text.split(") ")[1]: text[0] for text in texts}
        assert len(options) == len(texts)
    words = question.rstrip("?.").split()
    rest = " ".join(words[4:])
    if example.kind == "caption":
        return [scenes.describe(things)]
    if words[0] == "How":
        kinds = {"objects": things, "digits": [t for t in things if t.is_digit]}
        kinds["shapes"] = [t for t in things if not t.is_digit]
        of_colour = [t for t in things if t.colour == words[2]]
        return [str(len(kinds.get(words[2], of_colour)))]
    if words[0] == "Is":
        place = words[words.index("at") + 2 :] if "at" in words else []
        others = words[: words.index("at")] if place else words
        match = [
            t
            for t in things
            if (" ".join(place) or t.place) == t.place
            and all(w == t.colour for w in others if w in scenes.COLOURS)
            and all(w == t.name for w in others if w in (*scenes.DIGITS, *scenes.SHAPES))
        ]
        return ["yes" if match else "no"]
    if words[1] in ("digit", "shape"):
        found = [
            t.name for t in things if t.is_digit == (words[1] == "digit") and t.colour == words[-1]
        ]
    elif words[1] in ("colour", "color"):
        found = [t.colour for t in things if t.name == words[-1]]
        found = [things[0].ground] if words[-1] == "background" else found
    elif words[0] == "Where":
        found = [t.place for t in things if words[-1] == t.name]
        if words[-1] == "one":
            found = [t.place for t in things if words[-2] == t.colour]
    else:
        found = [f"{t.colour} {t.name}" for t in things if t.place == rest] or ["nothing"]
    assert len(found) == 1, "the question is ambiguous"
    return [options[found[0]]] if options else found


def test_constant_answers_are_rarely_right():
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in scenes.KINDS}
    for i in range(1500):
        rng = np.random.default_rng([5, i])
        things = scenes.make_things(rng, "train")
        for example in scenes.questions(things, rng, list(scenes.KINDS)):
            answers[example.kind][example.answer] += 1
    most = {kind: c.most_common(1)[0][1] / c.total() for kind, c in answers.items()}
    assert 0.5 <= most.pop("yes-no") < 0.53
    assert most.pop("choice") < 0.40
    assert max(most.values()) < 0.40, most


# The model.


def test_answers_survive_the_loss_of_tokens_that_show_nothing():
    model, processor = load(DEMO)
    questions = Questions((11,), 24)
    ways = {
        "first": Way(),
        "follow-up": Way(follow=True),
        "fastv": Way("fastv:k=2,r=0.75"),
        "random": Way("random:keep=16"),
    }
    right = {
        name: estimate(questions.short(ask(model, processor, questions, way))).value
        for name, way in ways.items()
    }
    assert min(right[name] for name in ("first", "follow-up", "fastv")) >= 90, right
    assert right["random"] <= 80, right


def test_the_example_question_is_answered():
    asked = json.loads((DEMO / "example.json").read_text())
    model, processor = load(DEMO)
    prompt = f"USER: <image>\n{asked['question']} ASSISTANT:"
    batch = processor([prompt], images=[[Image.open(DEMO / asked["image"])]])
    result = generate(model, batch, max_new_tokens=8)
    assert processor.decode(result.tokens[0]) == asked["answer"]


def test_transformers_opens_it_and_answers_the_same():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(DEMO).float().eval()
    their_processor = transformers.AutoProcessor.from_pretrained(DEMO)
    model, processor = load(DEMO)
    for scene, example in scenes.held_out(12, 4, ("where", "choice", "caption", "digit")):
        prompt = f"USER: <image>\n{example.question} ASSISTANT:"
        inputs = their_processor(images=scene.image, text=prompt, return_tensors="pt")
        batch = processor([prompt], images=[[scene.image]])
        assert batch.ids.tolist() == inputs["input_ids"].tolist()
        out = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert generate(model, batch, max_new_tokens=16).tokens[0] == expected
        text = their_processor.decode(expected, skip_special_tokens=True)
        assert processor.decode(expected) == text
