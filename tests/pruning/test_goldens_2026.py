"""Methods of 2026 against the outputs of their released code.

tests/goldens/methods2026 holds the cases of the smaller model; `--goldens` names the whole set.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from golden_cases import Golden

from minillava.generate import Result
from minillava.llava import LLaVA
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


@pytest.mark.goldens("methods2026/nuwa/tiny*", complete=True)
def test_nuwa(golden: Golden) -> None:
    check_features(golden)


@pytest.mark.goldens("methods2026/apet/tiny*", complete=True)
def test_apet(golden: Golden) -> None:
    p, model = golden.meta["parameters"], golden.model
    block = model.block(p["layer_list"][0])
    with tiny.watching(model.projector) as (projected,), tiny.watching_inputs(block) as entered:
        check_run(golden, f"{p['plan']},first={'/'.join(map(str, p['first_basis']))}")
    golden.assert_close(projected[0], "projected_features", 0)
    rows = slice(golden.start, golden.start + p["image_token_list"][0])
    golden.assert_close(entered[0][rows], "stage1_rows", 0)
