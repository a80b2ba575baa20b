"""Our model against transformers on the same folder: every stage, every layer, every token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PAD, assert_close, make_batch, watching, write_hf

from minillava import Batch, load
from minillava.generate import Result, generate

DEMO = Path(__file__).parents[2] / "weights" / "demo"
NEW = 6
SHAPES = {
    "one": ["tttItttt"],
    "image first": ["Itttt"],
    "image last": ["tttI"],
    "several images": ["ttIttItt"],
    "adjacent images": ["ttIItt"],
    "text only": ["tttttt"],
    "padded": ["tttItttttt", "tIt", "ttttt", "IttItItt"],
}
KINDS = {
    "MHA": {"kv_heads": 4, "layers": 2},
    "GQA": {"kv_heads": 2, "layers": 3},
    "one key head, tied": {"kv_heads": 1, "tied": True, "layers": 2},
    "MHA, tied, rope_theta": {"kv_heads": 4, "tied": True, "layers": 2, "old_rope": True},
    "GQA, rope_theta": {"kv_heads": 2, "layers": 2, "old_rope": True},
}


@dataclass(frozen=True)
class Pair:
    ours: Any
    theirs: Any  # transformers' LlavaForConditionalGeneration, from the same folder


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    write_hf(folder, vision_layers=3, **KINDS[request.param])
    return read(folder)


def read(folder: Path) -> Pair:
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return Pair(load(folder)[0], theirs.requires_grad_(False))


def inputs(batch: Batch) -> dict[str, Any]:
    """Arguments for transformers' forward. Positions count from the first token that is no
    padding, as in transformers' generate."""
    mask = batch.mask.long()
    found = {"input_ids": batch.ids, "attention_mask": mask}
    found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if batch.pixels is not None:
        found["pixel_values"] = batch.pixels
    return found


@torch.no_grad()
def assert_same_answers(pair: Pair, batch: Batch, n: int) -> Result:
    """Compare greedy tokens and the logits that each was chosen from."""
    given = inputs(batch)
    del given["position_ids"]
    theirs = pair.theirs.generate(
        **given,
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ours = generate(pair.ours, batch, max_new_tokens=n, output_logits=True)
    logits = torch.stack(theirs.logits, dim=1)
    new = theirs.sequences[:, batch.ids.shape[1] :]
    for b, tokens in enumerate(ours.tokens):
        assert tokens == new[b, : len(tokens)].tolist()
        assert_close(ours.logits[b, : len(tokens)], logits[b, : len(tokens)])
        assert len(tokens) == n or ours.report.stopped[b] == "eos"
    return ours


def test_vision_tower_and_projector(pair: Pair) -> None:
    ours, theirs = pair.ours, pair.theirs.model
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    L = ours.config.vision.num_hidden_layers
    expected = theirs.vision_tower(pixels, output_hidden_states=True)
    states = ours.vision(pixels, range(L + 1))
    assert len(expected.hidden_states) == L + 1
    for i, state in enumerate(expected.hidden_states):
        assert_close(states[i], state)
    assert_close(ours.vision.norm_post(states[L][:, 0]), expected.pooler_output)
    features = theirs.multi_modal_projector(expected.hidden_states[-2][:, 1:])
    assert_close(ours.projector(states[L - 1][:, 1:]), features)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_every_decoder_layer_and_every_row_of_logits(pair: Pair, shape: str) -> None:
    batch = make_batch(pair.ours, *SHAPES[shape])
    with watching(*pair.ours.llama.blocks) as outputs:
        generate(pair.ours, batch, max_new_tokens=1)
    theirs = pair.theirs(**inputs(batch), output_hidden_states=True)
    for i, (out,) in enumerate(outputs):
        if i + 1 < len(outputs):
            assert_close(out, theirs.hidden_states[i + 1][batch.mask])
    assert_close(pair.ours.llama.norm(outputs[-1][0]), theirs.hidden_states[-1][batch.mask])
    assert_close(pair.ours.llama.logits(outputs[-1][0]), theirs.logits[batch.mask])


@pytest.mark.parametrize("shape", SHAPES)
def test_answers(pair: Pair, shape: str) -> None:
    batch = make_batch(pair.ours, *SHAPES[shape], seed=1)
    result = assert_same_answers(pair, batch, NEW)
    again = generate(pair.ours, batch, max_new_tokens=NEW, output_logits=True, use_cache=False)
    assert again.tokens == result.tokens
    assert_close(again.logits, result.logits)


def test_the_end_of_an_answer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stop a sample at its EOS and continue the others."""
    batch = make_batch(pair.ours, *SHAPES["padded"], seed=2)
    tokens = generate(pair.ours, batch, max_new_tokens=NEW).tokens
    ends = (tokens[0][2], tokens[3][0])
    monkeypatch.setattr(pair.ours, "config", replace(pair.ours.config, eos_token_ids=ends))
    monkeypatch.setattr(pair.theirs.generation_config, "eos_token_id", list(ends))
    result = assert_same_answers(pair, batch, NEW)
    assert result.tokens[0][-1] == ends[0]
    assert result.tokens[3] == [ends[1]]
    assert result.report.stopped[0] == result.report.stopped[3] == "eos"


# ---------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def demo() -> Pair:
    if not (DEMO / "config.json").is_file():
        pytest.skip("the demo checkpoint is not there")
    return read(DEMO)


def test_the_trained_demo(demo: Pair) -> None:
    """A padded batch of held-out scenes; one prompt has two images and one has none."""
    from weights import scenes

    model, processor = demo.ours, load(DEMO)[1]
    asked = list(scenes.held_out(5, 4))
    prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for _, example in asked]
    pictures = [[scene.image] for scene, _ in asked]
    prompts += [
        f"USER: <image><image>\n{asked[0][1].question} ASSISTANT:",
        "USER: Hello ASSISTANT:",
    ]
    pictures += [[asked[1][0].image, asked[0][0].image], []]
    batch = processor(prompts, images=pictures)
    with watching(*model.llama.blocks) as outputs:
        generate(model, batch, max_new_tokens=1)
    with torch.no_grad():
        theirs = demo.theirs(**inputs(batch), output_hidden_states=True)
    for i, (out,) in enumerate(outputs[:-1]):
        assert_close(out, theirs.hidden_states[i + 1][batch.mask])
    assert_close(model.llama.logits(outputs[-1][0]), theirs.logits[batch.mask])
    result = assert_same_answers(demo, batch, 24)
    assert "eos" in result.report.stopped
