"""Simignore against outputs of its released code: the walk, and the pipeline with FastV."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import LLAVA_IMAGE_ID, Golden
from tiny import assert_same_weights, pad_left, watching
from torch import Tensor

from minillava import parse_plan
from minillava.generate import generate
from minillava.pruning import METHODS
from minillava.pruning.base import Plan
from minillava.pruning.simignore import similarity, walk

MARK = -500  # encloses the options in prompts of the 13B pipeline


@pytest.mark.goldens("simignore/select*")
def test_the_walk(golden: Golden) -> None:
    p = golden.meta["parameters"]
    pairs = similarity(golden["image_embeds"], golden["text_embeds"], "cosine")
    found = walk(pairs, p["simignore_k2"], p["simignore_step"], p["simignore_i_index"]).tolist()
    assert found == golden["kept_in_order_found"].tolist()
    assert sorted(found) == golden["kept_sorted"].tolist()
    dropped = [i for i, seen in enumerate(golden["attention_mask"].tolist()) if not seen]
    assert sorted(set(range(576)) - set(found)) == [i - 35 for i in dropped]


def prompt_and_focus(golden: Golden) -> tuple[list[int], Tensor]:
    """Split released ids: 13B marks the options, 7B appends them after a second BOS."""
    ids = golden["input_ids"].tolist()
    if golden.meta["parameters"]["variant"] == "7b":
        at = ids.index(1, 1)
        ids, focus = ids[:at], ids[at:]
    else:
        first = ids.index(MARK)
        focus = ids[first + 1 : ids.index(MARK, first + 1)]
    return [i for i in ids if i != MARK], torch.tensor(focus)


@pytest.mark.goldens("simignore/pipeline*")
@pytest.mark.parametrize("spelling", ["preset", "long form"])
def test_the_released_pipeline(golden: Golden, spelling: str) -> None:
    model, p = golden.model, golden.meta["parameters"]
    N, K = model.config.vision.num_patches, p["fast_v_agg_layer"]
    prompt, focus = prompt_and_focus(golden)
    start, ids = prompt.index(LLAVA_IMAGE_ID), golden.widened(prompt)
    batch = pad_left([ids], golden.pixels, [focus])
    plan = parse_plan(
        f"simignore-{p['variant']}:released=1"
        if spelling == "preset"
        else f"simignore:keep={p['simignore_k2']},step={p['simignore_step']},"
        f"i_index={p['simignore_i_index']},mode=mask,until={K}"
        f"+fastv:layer={K},keep={p['fast_v_attention_rank']},released=1"
    )
    scores: list[Tensor] = []
    with watching(*model.llama.blocks) as outputs:
        result = generate(
            model,
            batch,
            Plan(tuple(noting_scores(m, scores) for m in plan.methods)),
            max_new_tokens=golden["generated"].shape[1],
            use_cache=False,
            output_logits=True,
        )

    by_similarity, by_attention = result.report.kept
    assert [i - start for i in by_similarity.positions[0]] == (
        golden["similarity_kept_image_index"].tolist()
    )
    survivors = golden["kept_positions_after_layer_K"].tolist()
    assert by_attention.positions[0] == [i for i in survivors if start <= i < start + N]
    entering = [n for (n,) in result.report.tokens_entering]
    assert entering == [len(ids)] * K + [len(survivors)] * (len(entering) - K)
    golden.assert_close(model.embed(focus), "options_text_embeds")
    assert_same_weights(scores[0], golden["fastv_scores"])

    for name in golden.tensors:
        if name.startswith("layer_output_last8."):
            golden.assert_close(outputs[int(name.split(".")[1])][0][-8:], name, 0)
    golden.assert_close(model.llama.logits(outputs[-1][0][-8:]), "prefill_tail_logits", 0)
    steps = golden.meta["checks"]["comparable_steps"]
    assert result.tokens[0][:steps] == golden["generated"][0, :steps].tolist()
    part = (slice(None), slice(steps))
    golden.assert_close(result.logits[part], "step_logits", *part)
    golden.assert_close(result.logits[:, 0], "prefill_last_logits")


def noting_scores(method: Any, scores: list[Tensor]) -> Any:
    """FastV that also records the attention of its window; other methods are unchanged."""
    if method.name != "fastv":
        return method

    class Noting(METHODS["fastv"]):  # type: ignore[misc]
        def choose(self, c: Any) -> Any:
            assert len(c.candidates) == c.n_tokens
            scores.append(c.attention(c.newest).mean(0))
            return super().choose(c)

    return Noting(layer=method.layer, keep=method.keep, released=method.released)
