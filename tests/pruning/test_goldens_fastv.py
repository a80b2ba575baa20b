"""FastV against outputs of all its released implementations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import LLAVA_IMAGE_ID, Golden
from tiny import (
    alone,
    assert_close,
    assert_same_weights,
    pad_left,
    watching,
    watching_inputs,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillava import Batch, parse_plan
from minillava.generate import Result, generate
from minillava.pruning import METHODS
from minillava.pruning.base import Context, Keep, Plan

FastV: Any = METHODS["fastv"]


@dataclass(frozen=True)
class Spy(FastV):
    """FastV that records the chosen tokens and their scores at every forward."""

    chosen: list[list[int]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def choose(self, c: Context) -> Keep:
        keep = super().choose(c)
        self.chosen.append(sorted(c.patches[keep.index].tolist()))
        self.scores.append(c.attention(c.newest).mean(0))
        return keep


class KeyCounts(TorchFunctionMode):
    """Records the number of keys of each attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.counts.append(args[1].shape[-2])
        return func(*args, **(kwargs or {}))


def batch_of(golden: Golden) -> Batch:
    """The prompt and image of an input file."""
    before, after = golden["ids_before_image"].tolist(), golden["ids_after_image"].tolist()
    return pad_left([golden.widened([*before, LLAVA_IMAGE_ID, *after])], golden.pixels)


def method_of(golden: Golden) -> Spy:
    """FastV with the options in the file name and meta.json; `rank` is a number of tokens."""
    p = golden.meta["parameters"]
    amount = {"keep": p["rank"]} if "_hf_" not in golden.path.name else {"r": p["R"]}
    return Spy(layer=p["K"], mode="mask" if "_mask_" in golden.path.name else "drop", **amount)


def run(golden: Golden, method: Spy) -> tuple[Result, list[int], list[list[Tensor]], list[int]]:
    """The result, ids before the image, outputs of all layers, number of keys of each layer."""
    source = golden.beside(golden.meta["parameters"]["input"])
    n = max(1, golden["generated"].shape[1])
    with watching(*golden.model.llama.blocks) as outputs, KeyCounts() as keys:
        result = generate(
            golden.model,
            batch_of(source),
            Plan((method,)),
            max_new_tokens=n,
            use_cache=golden.path.stem.endswith("_cache"),
            output_logits=True,
        )
    towers = golden.model.feature_layer  # attention calls of the vision tower come first
    return result, source["ids_before_image"].tolist(), outputs, keys.counts[towers:]


@dataclass(frozen=True)
class SpyAtAll(Spy):
    """Keeps everything and records the scores of every layer except the first."""

    layers: int = 0

    def stages(self) -> Any:
        return tuple(("decoder", layer) for layer in range(1, self.layers))


@pytest.mark.goldens("fastv/*/input*")
def test_nothing_pruned(golden: Golden) -> None:
    method = SpyAtAll(keep=1.0, layers=golden.model.config.text.num_hidden_layers)
    result = generate(golden.model, batch_of(golden), Plan((method,)), 1, output_logits=True)
    golden.assert_close(result.logits[:, 0], "unpruned_last_logits")
    start, N = len(golden["ids_before_image"]), golden.model.config.vision.num_patches
    expected = golden["unpruned_last_query_attention"][: method.layers - 1, start : start + N]
    assert_same_weights(torch.stack(method.scores), expected)


@pytest.mark.goldens("fastv/*/case*")
def test_the_released_code(golden: Golden) -> None:
    method = method_of(golden)
    result, before, outputs, key_counts = run(golden, method)
    report, name, checks = result.report, golden.path.name, golden.meta["checks"]

    # the kept tokens and their scores
    expected = [len(before) + i for i in golden["kept_image_index"].tolist()]
    assert report.kept[0].positions == [expected]
    if "scores_layer_K_minus_1" in golden:
        assert_same_weights(method.scores[0], golden["scores_layer_K_minus_1"])

    # hidden states of the prefill; rows are numbered as in the sequence of that layer
    for tensor in golden.tensors:
        if tensor.startswith("layer_output."):
            layer = int(tensor.split(".")[1])
            rows = golden[f"layer_output_rows.{layer}"]
            golden.assert_close(outputs[layer][0][rows], tensor, 0)
    if "prefill_logits_rows" in golden:
        ours = golden.model.llama.logits(outputs[-1][0][golden["row_index"]])
        golden.assert_close(ours, "prefill_logits_rows", 0)

    # tokens and logits, as far as meta.json calls them comparable
    steps = checks.get("comparable_steps", golden["generated"].shape[1])
    golden.assert_close(result.logits[:, 0], "prefill_last_logits")
    assert result.tokens[0][:steps] == golden["generated"][0, :steps].tolist()
    part = (slice(None), slice(steps))
    if "step_logits" in golden:
        golden.assert_close(result.logits[part], "step_logits", *part)
    elif "step_top8_ids" in golden:
        best = golden["step_top8_ids"][part]
        golden.assert_close(result.logits[part].gather(-1, best), "step_top8_values", *part)

    # tokens are chosen once, or again for every new token
    if "_hf_cache" in name or "_lmms_" in name:
        assert len(method.chosen) == 1
    elif "step_kept_image_index" in golden:
        assert len(method.chosen) == golden["generated"].shape[1]
        assert method.chosen[:steps] == golden["step_kept_image_index"][:steps].tolist()

    # number of rows and keys of every layer for every new token
    if "step_query_length" in golden:
        entering = torch.tensor([[len(x) for x in layer] for layer in outputs]).T
        assert torch.equal(entering, golden["step_query_length"])
    if "step_cache_length_after" in golden and name.endswith("_cache.safetensors"):
        after = golden["step_cache_length_after"]
        assert [n for (n,) in report.cache_lengths] == after[0].tolist()
        counts = torch.tensor(key_counts[-(len(after) - 1) * len(outputs) :])
        assert torch.equal(counts.view(-1, len(outputs)), after[1:])
    if "step_last_query_position" in golden:
        assert report.next_position[0] == golden["step_last_query_position"][0, 0] + 1


@pytest.mark.goldens("fastv/*/case*_lmms_cache")
def test_the_layer_that_runs_twice_changes_nothing(golden: Golden) -> None:
    """In the lmms-eval add-on, layer K-1 caches every key twice, which changes no result."""
    twice = golden["call_cache_length_before"][1]
    K, T = golden.meta["parameters"]["K"], golden.meta["parameters"]["rank"]
    result = run(golden, method_of(golden))[0]
    ours = [n for (n,) in result.report.cache_lengths]
    assert golden["call_layer"][0].tolist().count(K - 1) == 2
    assert len(twice) == len(ours) + 1
    assert ours[K] == ours[0] - 576 + T
    golden.assert_close(result.logits, "step_logits")
    assert result.tokens == golden["generated"].tolist()


@pytest.mark.goldens("fastv/tiny-a/batch2*")
def test_each_sample_of_a_batch_is_ranked_by_itself(golden: Golden) -> None:
    """The released code ranks all samples by the first one; ours gives each its own result."""
    model, p = golden.model, golden.meta["parameters"]
    N, image = model.config.vision.num_patches, model.config.image_token_id
    start, embedding = p["sys_length"], model.llama.embed_tokens.weight
    rows = []
    for x in golden["inputs_embeds"]:
        found = torch.cdist(x, embedding).argmin(1).tolist()  # text rows are embeddings
        rows.append([*found[:start], *[image] * N, *found[start + N :]])
    pixels = torch.cat([golden.beside(f"input{i}").pixels for i in range(2)])
    batch = pad_left(rows, pixels)
    plan = parse_plan(f"fastv:k={p['K']},keep={p['rank']}")

    with watching_inputs(model.llama.blocks[0]) as entering:
        result = generate(model, batch, plan, max_new_tokens=1, output_logits=True)
    assert_close(torch.stack(entering[0].split(32)), golden["inputs_embeds"])
    names = ("last_logits_first_row_alone", "last_logits_second_row_alone")
    for b, name in enumerate(names):
        golden.assert_close(result.logits[b], name)
        single = generate(model, alone(model, batch, b), plan, 1, output_logits=True)
        golden.assert_close(single.logits[0], name)
    kept = ("kept_positions_used_for_both_rows", "kept_positions_second_row_alone")
    for positions, name in zip(result.report.kept[0].positions, kept, strict=True):
        assert positions == [i for i in golden[name].tolist() if start <= i < start + N]
    official = golden["last_logits_batch"][1]
    assert (result.logits[1, 0] - official).abs().max() > 0.1
