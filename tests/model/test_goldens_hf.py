"""The plain model against outputs of transformers, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from golden_cases import Golden
from reference import Reference
from tiny import assert_same_weights, pad_left, watching, watching_inputs
from torch import Tensor

from minillava import Batch
from minillava.generate import generate
from minillava.pruning.base import Context, Keep, Method, Plan, Stage

ATTENTION = "last_query_attention_mean_over_heads"
DECISIVE = 2e-3  # from this margin between the two best logits on, the best token must agree


def batch_of(golden: Golden) -> Batch:
    prompts = golden["prompt_compact"].tolist()
    rows = [golden.widened([token for token in row if token >= 0]) for row in prompts]
    pixels = None
    if "pixel_u8_index" in golden:
        pixels = golden.beside("vision").pixels[golden["pixel_u8_index"]]
    return pad_left(rows, pixels, pad=golden.model.config.image_token_id)


@pytest.mark.goldens("hf/*/vision")
def test_vision_tower_and_projector(golden: Golden) -> None:
    model, pixels = golden.model, golden.pixels
    L, patches = model.config.vision.num_hidden_layers, golden["token_index"]
    states = model.vision(pixels, range(L + 1))
    for i, state in states.items():
        if f"vision_hidden.{i}" in golden:
            golden.assert_close(state, f"vision_hidden.{i}")
        else:
            golden.assert_close(state[:, 1 + patches], f"vision_hidden_sub.{i}")
    golden.assert_close(states[L - 1][:, 0], "vision_cls_layer_minus2")
    golden.assert_close(states[L - 1][:, 1 + patches], "vision_hidden_layer_minus2")
    golden.assert_close(model.projector(states[L - 1][:, 1:])[:, patches], "image_features")
    if "vision_pooler_output" in golden:
        golden.assert_close(model.vision.norm_post(states[L][:, 0]), "vision_pooler_output")


@pytest.mark.goldens("hf/*/[!v]*")
def test_every_layer_of_the_prompt(golden: Golden) -> None:
    model, batch = golden.model, batch_of(golden)
    blocks = model.llama.blocks
    with watching_inputs(blocks[0]) as first, watching(*blocks) as outputs:
        report = generate(model, batch, max_new_tokens=1).report
    hidden = torch.stack([first[0], *(out[0] for out in outputs)])  # (L + 1, R, D)
    logits = model.llama.logits(hidden[-1])  # (R, V)
    assert report.prompt_tokens == golden["attention_mask"].sum(1).tolist()
    lengths = report.prompt_tokens
    parts = zip(hidden.split(lengths, 1), logits.split(lengths), strict=True)
    for b, (states, ours) in enumerate(parts):
        padding = int((golden["attention_mask"][b] == 0).sum())
        there = (golden["positions"] >= padding).nonzero()[:, 0]
        rows = golden["positions"][there] - padding
        if "hidden_states" in golden:
            golden.assert_close(states[:-1, rows], "hidden_states", slice(-1), b, there)
            last = model.llama.norm(states[-1, rows])
            golden.assert_close(last, "hidden_states", -1, b, there)
        compare_logits(golden, ours[rows], "prefill", b, there)
        decisive = golden["prefill_margin"][b, padding:] > DECISIVE
        best = golden["prefill_argmax"][b, padding:]
        assert torch.equal(ours.argmax(-1)[decisive], best[decisive])


@pytest.mark.goldens("hf/*/[!v]*")
def test_answers(golden: Golden) -> None:
    batch, n = batch_of(golden), golden["generated"].shape[1]
    result = generate(golden.model, batch, max_new_tokens=n, output_logits=True)
    assert result.tokens == golden["generated"].tolist()
    compare_logits(golden, result.logits, "step")
    few = 3
    anew = generate(golden.model, batch, max_new_tokens=few, output_logits=True, use_cache=False)
    assert anew.tokens == golden["generated"][:, :few].tolist()
    compare_logits(golden, anew.logits, "step", slice(None), slice(few))


def compare_logits(golden: Golden, ours: Tensor, name: str, *index: Any) -> None:
    """Compare all logits, or those columns and top eight logits that the file holds."""
    if f"{name}_logits" in golden:
        golden.assert_close(ours, f"{name}_logits", *index)
        return
    golden.assert_close(ours[..., golden["vocab_index"]], f"{name}_logits_sub", *index)
    best = golden[f"{name}_top8_ids"][index]
    golden.assert_close(ours.gather(-1, best), f"{name}_top8_values", *index)


@dataclass(frozen=True)
class Spy(Method):
    """Keeps everything; records the newest row's attention and the keys of every layer."""

    layers: int = 0
    seen: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "spy"

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return tuple(("decoder", layer) for layer in range(self.layers))

    def choose(self, c: Context) -> Keep:
        layer = c.stage_index
        self.seen[layer, "coming"] = c.attention(c.newest, layer=0).mean(0)
        if layer:
            self.seen[layer - 1, "past"] = c.attention(c.newest).mean(0)
            self.seen[layer - 1, "keys"] = c.keys()
        return Keep(torch.arange(len(c.candidates)))


@pytest.mark.goldens("hf/*/single")
def test_attention_and_keys_asked_for_later(golden: Golden) -> None:
    model = golden.model
    spy = Spy(layers=model.config.text.num_hidden_layers)
    batch = batch_of(golden)
    generate(model, batch, Plan((spy,)), max_new_tokens=1)
    is_image = batch.ids[0] == model.config.image_token_id  # (T,): only these are candidates
    for layer in range(spy.layers):
        for when in ("past", "coming") if layer < spy.layers - 1 else ("coming",):
            expected = golden[ATTENTION][layer, 0][is_image]
            assert_same_weights(spy.seen[layer, when], expected)
    if "keys_layer0" in golden:
        golden.assert_close(spy.seen[0, "keys"].transpose(0, 1), "keys_layer0", 0)


@pytest.mark.goldens("hf/*/single")
def test_the_reference_decoder_is_theirs_too(golden: Golden) -> None:
    """Other tests compare with reference.py; here it is itself compared with transformers."""
    batch, reference = batch_of(golden), Reference(golden.model)
    with watching(golden.model.projector) as (outputs,):
        generate(golden.model, batch, max_new_tokens=1)
    x = reference.embed(batch.ids[0], outputs[0].flatten(0, -2), golden.model.config.image_token_id)
    T = len(x)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    positions = [torch.arange(T)] * golden.model.config.text.num_hidden_layers
    traced = reference(x, positions, lambda *_: causal)
    compare_logits(golden, traced.logits[golden["positions"]].float(), "prefill", 0)
    weights = torch.stack([a[:, -1].mean(0) for a in traced.attention])
    assert_same_weights(weights.float(), golden[ATTENTION][:, 0])
