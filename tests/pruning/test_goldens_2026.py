"""Methods of 2026 against the outputs of their released code.

tests/goldens/methods2026 holds the cases of the smaller model; `--goldens` names the whole set.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from golden_cases import Golden

from minillava.generate import Result
from minillava.llava import LLaVA
from minillava.pruning import flowcut
from minillava.pruning.mustdrop import MustDrop
from minillava.pruning.prunesid import PruneSID


def check_run(golden: Golden, plan: str = "", **batch: Any) -> Result:
    """Run the plan that the case states: kept sets, logits and tokens are the released ones."""
    expected, t = golden.tensors, golden.meta["comparable_steps"]
    plan = plan or golden.meta["parameters"]["plan"]
    result = golden.run(plan, expected["generated"].shape[1], **batch)
    kept = [[p - golden.start for p in step.positions[0]] for step in result.report.kept]
    stages = [name for name in expected if name.endswith("kept_image_index")]
    stages = [name for name in stages if name.startswith("stage")] or stages
    assert kept == [expected[name].tolist() for name in sorted(stages)]
    golden.assert_close(result.logits[:, :t], "step_logits", slice(None), slice(t))
    assert result.tokens[0][:t] == expected["generated"][0, :t].tolist()
    numbering, report = golden.meta["numbering"], result.report
    first = len(golden.prompt) if numbering == "original" else report.tokens_entering[0][0]
    assert report.next_position == [first]
    return result


# Methods whose cases need nothing but their plan.
PLAIN = [f"methods2026/{name}/tiny*" for name in ("scope", "gprune", "sparsevlm2", "v2drop")]


@pytest.mark.goldens(*PLAIN, complete=True)
def test_kept_sets_logits_and_tokens_are_the_released_ones(golden: Golden) -> None:
    check_run(golden)


def check_features(golden: Golden, plan: str = "") -> Result:
    """The same, and the rows that the projector gets are the released ones, in their order."""
    with tiny.watching_inputs(golden.model.projector) as projected:
        result = check_run(golden, plan)
    golden.assert_close(projected[0], "features", 0)
    return result


@pytest.mark.goldens("methods2026/prunesid/tiny*", complete=True)
def test_prunesid(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, p = tiny.choices(monkeypatch, PruneSID), golden.meta["parameters"]
    result = check_features(golden, f"{p['plan']},seed={p['seed']}")
    ((_, keep),) = seen
    assert keep.index.tolist() == golden["kept_in_sequence_order"].tolist()
    assert result.report.kept[0].extra == [1]


@pytest.mark.goldens("methods2026/mmtok/tiny*", complete=True)
def test_mmtok(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    p, seen = golden.meta["parameters"], []
    embed = LLaVA.embed
    monkeypatch.setattr(LLaVA, "embed", lambda m, ids: seen.append(ids.tolist()) or embed(m, ids))
    size = p["original_size_width_height"]
    sizes = [(*size, "pad")] if size else None
    plan = p["plan"].partition(" ")[0]
    check_run(golden, plan, focus=[golden["focus_ids"]], sizes=sizes)
    assert golden["word_ids"].tolist() in seen


@pytest.mark.goldens(*[f"methods2026/{name}/tiny*" for name in ("nuwa", "flowcut")], complete=True)
def test_rows_before_the_projector_are_the_released_ones(golden: Golden) -> None:
    check_features(golden)


@pytest.mark.goldens("methods2026/flowcut/adaptive")
def test_flowcuts_numbers_are_the_released_ones(golden: Golden) -> None:
    for row, n in enumerate(golden["patches"].tolist()):
        attention, keep = golden["class_attention"][row, :n], int(golden["target"][row])
        pruned = flowcut.count_pruned(attention, keep, int(golden["remaining"][row]))
        assert pruned == golden["pruned"][row]


@pytest.mark.goldens("methods2026/apet/tiny*", complete=True)
def test_apet(golden: Golden) -> None:
    p, model = golden.meta["parameters"], golden.model
    block = model.block(p["layer_list"][0])
    with tiny.watching(model.projector) as (projected,), tiny.watching_inputs(block) as entered:
        check_run(golden, f"{p['plan']},first={'/'.join(map(str, p['first_basis']))}")
    golden.assert_close(projected[0], "projected_features", 0)
    rows = slice(golden.start, golden.start + p["image_token_list"][0])
    golden.assert_close(entered[0][rows], "stage1_rows", 0)


@pytest.mark.goldens("methods2026/mustdrop/tiny*", complete=True)
def test_mustdrop(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, p = tiny.choices(monkeypatch, MustDrop), golden.meta["parameters"]
    with tiny.watching_inputs(golden.model.projector) as projected:
        result = golden.run(p["plan"], golden["generated"].shape[1])
    (_, first), *stages = seen
    # a window's number is there that of its last patch
    places, merged = golden["stage_tower_place"], golden["stage_tower_patches_in_row"] == 9
    grid = golden.model.config.vision.grid
    assert first.index.tolist() == (places - merged * (2 * grid + 2)).tolist()
    assert int(merged.sum()) == p["windows_merged"]
    golden.assert_close(projected[0], "features", 0)
    rows = torch.arange(p["rows_after_tower"])  # that the released code counts
    for stage, (_, keep) in enumerate(stages):
        rows = rows[keep.index]
        assert rows.tolist() == golden[f"stage{stage}_kept_image_index"].tolist()
    t, report = golden.meta["comparable_steps"], result.report
    golden.assert_close(result.logits[:, :t], "step_logits", slice(None), slice(t))
    assert result.tokens[0][:t] == golden["generated"][0, :t].tolist()
    whole, final = report.tokens_entering[0][0], report.tokens_entering[-1][0]
    first_cut = p["pruning_layers"][0]
    assert [n for (n,) in report.cache_lengths] == [
        whole if layer < first_cut else final for layer in range(len(report.cache_lengths))
    ]
