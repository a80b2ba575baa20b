"""Methods inside the decoder against released outputs and reference_decoder.py; their budgets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import reference_decoder as reference
import tiny
import torch
import torch.nn.functional as F
from golden_cases import Golden
from torch import Tensor

import minillava
from minillava import Batch, parse_plan
from minillava.attention import attention_received, attention_weights
from minillava.generate import Result, generate
from minillava.pruning import (
    METHODS,
    dart,
    fitprune,
    load_file_method,
    parse_plan_with_files,
    sparsevlm,
)
from minillava.pruning.average import AveragePlan, average_entering, entering, leaving, variants_of
from minillava.pruning.base import Context

N = 64  # tokens per image of the model below


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model with six decoder layers, grouped-query attention and 64 tokens per image."""
    folder = tmp_path_factory.mktemp("six")
    tiny.write_hf(folder, layers=6, image_size=112, vision_layers=3, seed=1)
    return minillava.load(folder)[0]


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    return tiny.make_batch(model, "tttIttttttttt", seed=2)


def run(model: Any, batch: Batch, plan: str, n: int = 3) -> Result:
    return generate(model, batch, parse_plan(plan), n, output_logits=True)


# ---------------------------------------------------------------- released outputs


def slashes(values: list[Any]) -> str:
    return "/".join(map(str, values))


@pytest.mark.goldens("pyramiddrop/*", complete=True)
def test_pyramiddrop_is_the_released_code(golden: Golden) -> None:
    expected, meta = golden.tensors, golden.meta
    p, t = meta["parameters"], meta["checks"]["comparable_steps"]
    layers, ratios = slashes(p["layer_list"]), slashes(p["image_token_ratio_list"])
    result = golden.run(f"pyramiddrop:layers={layers},ratios={ratios}", 12)
    report, start = result.report, p["tokens_before_image"]
    assert golden.start == start
    for stage, kept in enumerate(report.kept):
        index = expected[f"stage{stage}_kept_image_index"].sort().values
        assert kept.positions[0] == (index + start).tolist()
    assert len(report.kept) == len(p["layer_list"])
    queries = expected["step_query_length"][0].tolist()
    assert [n[0] for n in report.tokens_entering] == queries
    assert [n[0] for n in report.cache_lengths] == queries
    # a new token's position in a layer is the number of rows its cache holds
    after = expected["step_last_query_position"][1].tolist()
    assert after == expected["step_cache_length_before"][1].tolist()
    assert after == [n[0] for n in report.cache_lengths]
    assert report.next_position == [after[0]]
    assert result.tokens[0][:t] == expected["generated"][0, :t].tolist()
    assert (result.logits[0, :t] - expected["step_logits"][0, :t]).abs().max() < 1e-3


@pytest.mark.goldens("sparsevlm/*", complete=True)
def test_sparsevlm_is_the_released_code(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, p = golden.tensors, golden.meta["parameters"]
    assert golden.start == p["tokens_before_image"]
    seen = tiny.choices(monkeypatch, sparsevlm.SparseVLM)
    rated: list[Any] = []
    select_raters = sparsevlm.select_raters

    def noting(image: Tensor, text: Tensor) -> Any:
        rated.append(select_raters(image, text))
        return rated[-1]

    monkeypatch.setattr(sparsevlm, "select_raters", noting)
    layers = [layer + 1 for layer in p["pruning_layers"]]
    keep = p["kept_list"][: len(layers)]
    result = golden.run(f"sparsevlm:layers={slashes(layers)},keep={slashes(keep)}", 1)
    assert len(seen) == len(rated) == len(layers)
    for stage, ((_, chosen), (raters, _)) in enumerate(zip(seen, rated, strict=True)):
        assert raters.tolist() == expected["text_rater_offset"].tolist()
        mask = expected[f"stage{stage}_keep_mask"][0].bool()
        assert sorted(chosen.index.tolist()) == mask.nonzero()[:, 0].tolist()
        merged = expected[f"stage{stage}_cluster_out"][0]
        assert chosen.extra is not None
        assert (chosen.extra - merged).abs().max() < 1e-4
        assert result.report.kept[stage].extra[0] >= len(merged)
    queries = expected["layer_query_length"].tolist()
    assert [n[0] for n in result.report.tokens_entering] == queries
    last = expected["layer_last_position"].tolist()
    assert last == [n - 1 for n in queries]  # renumbered from 0 in each layer
    assert (result.logits[0, 0] - expected["prefill_last_logits"][0]).abs().max() < 1e-3


def means(x: Tensor, n: int) -> Tensor:
    """Of SparseVLM's clusters."""
    return sparsevlm.cluster_means(x, sparsevlm.cluster_rows(x, n, "here")[0], n)


@pytest.mark.goldens("sparsevlm/*")
def test_sparsevlms_clusters_are_the_released_ones(golden: Golden) -> None:
    expected = golden.tensors
    for stage in range(2):
        rows, merged = (
            expected[f"stage{stage}_cluster_in"][0],
            expected[f"stage{stage}_cluster_out"][0],
        )
        mask = expected[f"stage{stage}_keep_mask"][0].bool()
        assert len(rows) == sparsevlm.count_merged(int((~mask).sum()))
        assert len(merged) == sparsevlm.count_clusters(len(rows))
        assert (means(rows, len(merged)) - merged).abs().max() < 1e-4


# ---------------------------------------------------------------- references


def acts(model: Any, x: Tensor, image: range) -> dict[str, reference.Act]:
    """Plans, each with an independent implementation of what it does."""
    uneven = [9, 0, 7, 4, 3, 0]
    return {
        "pyramiddrop:layers=1/3/4,ratios=0.6/0.3/0.15": reference.pyramiddrop(
            model, [1, 3, 4], [0.6, 0.3, 0.15], N
        ),
        "vtw:layer=2": reference.vtw(2),
        "dart:keep=32": reference.dart(model, 2, 32),
        "dart:keep=21,layer=4": reference.dart(model, 4, 21),
        f"fitprune:delete={slashes(uneven)}": reference.fitprune(uneven),
        "sparsevlm:layers=1/2/5,keep=30/20/11": reference.sparsevlm(
            x, image, [1, 2, 5], [30, 20, 11]
        ),
        "sparsevlm:layers=2/4/5,keep=8/30/60": reference.sparsevlm(
            x, image, [2, 4, 5], [8, 30, 60]
        ),
    }


@pytest.mark.parametrize("number", range(7))
def test_choices_are_those_of_the_written_out_method(model: Any, batch: Batch, number: int) -> None:
    assert batch.pixels is not None
    ids = batch.ids[0]
    image = range(int((ids == tiny.IMAGE).nonzero()[0]), int((ids == tiny.IMAGE).nonzero()[-1]) + 1)
    encoded = model.encode(batch.pixels, {model.feature_layer})
    x = model.embed(ids)
    x[image.start : image.stop] = model.projector(encoded[model.feature_layer][0, 1:])
    plan, act = list(acts(model, x, image).items())[number]

    with torch.inference_mode():
        logits, entered = reference.decode(model, x, image, act)
        result = run(model, batch, plan)
    steps = {kept.layer: kept for kept in result.report.kept}
    assert len(steps) == len(result.report.kept) > 0
    for s, rows, visual in zip(
        entered, result.report.tokens_entering, result.report.image_tokens_entering, strict=True
    ):
        assert rows == [len(s.x)]
        assert visual == [len(s.visual())]
        if s.layer in steps:
            assert steps[s.layer].positions[0] == [s.origin[i] for i in s.rows("image")]
            assert steps[s.layer].extra == [len(s.rows("merged"))]
    tiny.assert_close(result.logits[0, 0], logits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "n"), [(47, 5), (16, 2), (11, 2)])  # two peaks may tie
def test_cluster_means_are_the_written_out_ones(seed: int, rows: int, n: int) -> None:
    x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed)) * 3
    expected = reference.clusters(list(x), n)
    tiny.assert_close(means(x, n), torch.stack(expected))


def test_rows_that_coincide_have_themselves_as_mean() -> None:
    x = torch.ones(12, 3)
    assert torch.equal(means(x, 2), torch.ones(2, 3))


def test_sparsevlm_refuses_scores_that_are_no_numbers(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores alone: the rows that it merges are as usual."""
    attention = Context.attention
    monkeypatch.setattr(Context, "attention", lambda c, rows: attention(c, rows) * torch.nan)
    with pytest.raises(ValueError, match="NaN among the rows of layer 2"):
        run(model, batch, "sparsevlm:layers=2/3,keep=30/20")


def test_a_single_text_row_rates() -> None:
    """Its relevance is 1, which equals the mean, so no row is above the mean."""
    image, text = torch.randn(5, 3), torch.randn(1, 3)
    assert sparsevlm.select_raters(image, text)[0].tolist() == [0]
    assert sparsevlm.select_raters(image, text.expand(4, 3))[0].tolist() == [0, 1, 2, 3]


def test_a_text_row_at_the_mean_does_not_rate() -> None:
    """Four image rows give all their weight to the text rows 0, 0, 1, 2: 0.5, 0.25, 0.25, 0."""
    text = torch.eye(4)
    image = 1000 * text[[0, 0, 1, 2]]
    assert sparsevlm.select_raters(image, text)[0].tolist() == [0]


@pytest.mark.parametrize("seed", range(8))
def test_dart_walks_its_pivots_as_the_released_code(seed: int) -> None:
    """Row numbers as in a full prompt; some of them collide in the hash table of the set."""
    generator = torch.Generator().manual_seed(seed)
    n, start = 200, 35
    x = torch.randn(start + n + 40, 8, generator=generator)
    image = torch.arange(start, start + n)
    heads = (torch.randperm(n, generator=generator)[:4] + start).tolist()
    behind = range(start + n, len(x))
    text = [i for i in behind if i % 32 == heads[0] % 32][:1]  # collides with a head
    text += [i for i in behind if i not in text][3:24:7][: 4 - len(text)]
    assert reference.walked(heads + text) == list(set(heads + text).copy())
    pool, kept = [i for i in image.tolist() if i not in heads], list(heads)
    for pivot in reference.walked(heads + text):
        unlike = {i: -float(torch.cosine_similarity(x[pivot], x[i], dim=0)) for i in pool}
        taken = reference.best(unlike, 5)
        kept += taken
        pool = [i for i in pool if i not in taken]
    keys = torch.zeros(len(x), 2, 4)
    for order in (heads, text):
        keys[order] = torch.arange(len(order), 0, -1.0)[:, None, None]
    choice = SimpleNamespace(
        n_tokens=n,
        candidates=image,
        text_rows=torch.tensor(behind),
        keys=lambda: keys,
        sequence=lambda: x,
        model=SimpleNamespace(llama=SimpleNamespace(norm=torch.nn.Identity())),
        where="DART",
    )
    found = dart.DART(keep=4 + 8 * 5).choose(cast(Context, choice))
    assert image[found.index].tolist() == kept


def test_weights_row_by_row_and_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(50, heads, 8, generator=generator) for heads in (6, 2))
    at, hidden = torch.arange(50), torch.arange(50) % 7 == 3
    blocks = [F.pad(w, (0, 50 - w.shape[2])) for w in attention_weights(q, k, at, hidden)]
    ours = torch.cat(blocks, dim=1)  # (H, r, S)
    assert len(blocks) > 1
    tiny.assert_close(attention_received(q, k, at, hidden), ours.mean(1))
    for row in range(50):
        scores = torch.stack([k[:, head // 3] @ q[row, head] / 8**0.5 for head in range(6)])
        scores[:, (at > row) | hidden] = -torch.inf
        tiny.assert_close(ours[:, row], scores.softmax(-1).nan_to_num(0.0))


# ---------------------------------------------------------------- counts and refusals


def test_published_counts() -> None:
    """Image tokens left by the released settings for 576 image tokens and 32 layers."""

    def left(plan: str) -> tuple[int, ...]:
        (method,) = parse_plan(plan).methods
        return method.left(576)

    assert left("pyramiddrop") == (288, 144, 72)
    assert [left(f"dart:keep={k}")[0] for k in (192, 128, 64, 0, 576)] == [196, 132, 68, 0, 576]
    assert left("sparsevlm-192") == (309, 204, 113)
    assert left("sparsevlm-128") == (312, 117, 39)
    assert left("sparsevlm-96") == (249, 55, 27)
    assert left("sparsevlm-64") == (82, 32, 18)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("pyramiddrop:layers=2/4", "layers=2/4 has 2 numbers, but ratios=0.5/0.25/0.125 has 3"),
        ("pyramiddrop:layers=4/2/5", "layers=4/2/5 must ascend"),
        ("pyramiddrop:layers=2/2/5", "layers=2/2/5 must ascend"),
        ("pyramiddrop:ratios=0.5/0.7/0.1", "none larger than the one before"),
        ("pyramiddrop:ratios=1.5/0.7/0.1", "from 0.0 to 1.0"),
        ("pyramiddrop:layers=2/x/5", "layers=2/x/5: must be a whole number"),
        ("sparsevlm:layers=2/4,keep=3", "give one for each layer"),
        ("sparsevlm:mode=mask", "use mode=drop"),
        ("sparsevlm:scope=all", "only drops"),
        ("fitprune:budget=65", "there are tables for 0, 10, 20"),
        ("fitprune:delete=1/-2/0", "delete=1/-2/0 must be 0 or more"),
        ("dart:keep=1.5", "keep=1.5 must be a whole number of tokens, or a share"),
        ("vtw:layer=2,average=3", "average and layer say the same"),
        ("fastv:average=3,scope=all", "average=3 counts one image"),
        ("sparsevlm:layers=0/2/3,keep=9/8/7", "layers=0/2/3 must be 1 or more"),
        ("dart:layer=0,keep=8", "layer=0 must be 1 or more (layer whose input is pruned; it needs"),
        ("sparsevlm:layers=3/2/5,average=40", "layers=3/2/5 must ascend"),
        ("pyramiddrop:layers=3/2,average=40", "layers=3/2 must ascend"),
        ("trim:keep=-1", "keep=-1 must be"),
    ],
)
def test_what_a_plan_cannot_say(plan: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        parse_plan(plan)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("pyramiddrop:layers=2/4/6", "layer=6, but the decoder has layers 0 to 5"),
        ("sparsevlm", "layer=7, but the decoder has layers 0 to 5"),
        ("sparsevlm:layers=1/2,average=40", "for 3 layers, layers=1/2 are 2; give keep="),
        ("sparsevlm:layers=1/2/3,keep=90/8/7", "keep=90, but there are 64 image tokens"),
        ("dart:keep=65", "keep=65, but there are 64 image tokens"),
        ("vtw", "layer=15, but the decoder has layers 0 to 5"),
        ("fitprune", "was fitted for 32 layers and 576 image tokens, this model has 6 and 64"),
        ("fitprune:delete=1/2/0", "delete has 3 counts, but must have one for each of the 6"),
        ("fitprune:delete=1/2/0/0/0/1", "the last 0"),
        ("fitprune:delete=50/20/0/0/0/0", "delete drops 70 of 64"),
        ("fastv:average=9", "out of reach with 6 layers and 64 image tokens; the nearest is"),
        ("pyramiddrop:layers=3/4/5,average=20", "the nearest is average=32.2"),
        ("fastv:average=40+random:keep=0.5", "solved for one method alone, this plan has 2"),
    ],
)
def test_what_a_model_cannot_do(model: Any, batch: Batch, plan: str, said: str) -> None:
    with (
        tiny.watching(model.vision) as (forwards,),
        pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error,
    ):
        run(model, batch, plan)
    assert said in str(error.value)
    assert not forwards


# ---------------------------------------------------------------- budgets


def resolved(plan: str, n_layers: int = 32, n_tokens: int = 576) -> Any:
    (method,) = parse_plan(plan).resolve(n_layers, n_tokens).methods
    return method


def test_visionzips_averages_are_the_papers() -> None:
    for dominant, contextual in ((54, 10), (108, 20), (162, 30)):
        plan = f"visionzip-64:average={dominant + contextual}"
        method = resolved(plan)
        assert (method.dominant, method.contextual) == (dominant, contextual)
    with pytest.raises(ValueError, match=r"577\.0 \(dominant=487, contextual=90\)"):
        resolved("visionzip-64:average=600")


def test_fastv_averages_are_the_papers() -> None:
    assert [resolved(f"fastv:k=2,average={a}").keep for a in (192, 128, 64)] == [166, 98, 30]
    assert [resolved(f"fastv:k=3,average={a}").keep for a in (192, 128, 64)] == [152, 82, 11]
    with pytest.raises(ValueError, match=r"the nearest is average=90\.8 \(keep=1\)"):
        resolved("fastv:k=5,average=64")
    small = resolved("fastv:k=2,average=32", 8, 64)
    assert average_entering(small, 8, 64) == 31.75  # the README says so
    assert resolved("fastv:k=5,average=90.8").keep == 1  # what the error names is accepted


@pytest.mark.parametrize("average", [150, 192, 300.5])
@pytest.mark.parametrize(
    "options",
    ["fastv:k=2", "dart:layer=2", "vtw:", "pyramiddrop:", "sparsevlm:", "fitprune:"],
)
def test_no_variant_is_nearer(options: str, average: float) -> None:
    plan = f"{options}{'' if options.endswith(':') else ','}average={average}"
    (asked,) = parse_plan(plan).methods
    chosen = resolved(plan)
    reached = average_entering(chosen, 32, 576)
    every = [average_entering(v, 32, 576) for v in variants_of(asked, 32, 576)]
    assert abs(reached - average) == min(abs(r - average) for r in every)
    assert len(every) > 1
    limit = {"vtw": 9.0, "fitprune": 40.0, "dart": 4.0}.get(chosen.name, 0.6)
    assert abs(reached - average) <= limit


def mean_entering(layers: list[int], left: list[int], n_layers: int, n_tokens: int) -> float:
    """Mean over layers: n_tokens enter before the first of `layers`, then what each one left."""
    total = 0
    for layer in range(n_layers):
        passed = [n for at, n in zip(layers, left, strict=True) if at <= layer]
        total += passed[-1] if passed else n_tokens
    return total / n_layers


@pytest.mark.parametrize(
    ("layers", "n_layers", "n_tokens", "averages"),
    [
        ([8, 16, 24], 32, 576, [150, 192, 300.5]),
        ([8, 16, 24], 40, 576, [128, 150, 192]),
        ([2, 4, 6], 32, 576, [64, 128, 192]),
        ([4], 32, 576, [100, 192]),
        ([2, 4, 6, 8, 10], 32, 576, [64, 100, 128]),
        ([2, 4, 6], 8, 64, [16.5, 24, 32, 48]),
    ],
)
def test_pyramiddrops_ratios_are_the_nearest_of_their_curve(
    layers: list[int], n_layers: int, n_tokens: int, averages: list[float]
) -> None:
    stages = range(1, len(layers) + 1)
    steps = {tuple(int(n_tokens * (s / 9000) ** i) for i in stages) for s in range(1, 9001)}
    curve = {mean_entering(layers, [*left], n_layers, n_tokens) for left in steps if left[0]}
    for average in averages:
        plan = f"pyramiddrop:layers={slashes(layers)},average={average}"
        method = resolved(plan, n_layers, n_tokens)
        reached = mean_entering(layers, [*method.left(n_tokens)], n_layers, n_tokens)
        assert abs(reached - average) <= min(abs(a - average) for a in curve) + 1e-9


@pytest.mark.parametrize(("n_layers", "average"), [(32, 64), (32, 192), (40, 128), (40, 192)])
def test_sparsevlms_list_is_the_nearest_in_its_proportions(n_layers: int, average: float) -> None:
    nearest = 576.0
    for keep in {tuple(max(1, round(s / 9000 * k)) for k in (570, 380, 209)) for s in range(9000)}:
        n, left = 576, []
        for k in keep:
            kept = min(k, n - 1)
            n = kept + int((int((n - kept) * 0.3) + 1) / 10) + 1
            left.append(n)
        reached = mean_entering([3, 7, 16], left, n_layers, 576)
        nearest = min(nearest, abs(reached - average))
    method = resolved(f"sparsevlm:average={average}", n_layers)
    assert abs(average_entering(method, n_layers, 576) - average) <= nearest + 1e-9


def test_darts_least_are_its_pivots() -> None:
    assert resolved("dart:average=19", 8, 64).left(64) == (4,)
    with pytest.raises(ValueError, match=r"the nearest is average=19\.0 \(keep=1\)"):
        resolved("dart:average=16", 8, 64)


@pytest.mark.parametrize(("n_layers", "n_tokens"), [(8, 64), (32, 64), (40, 576)])
def test_fitprunes_tables_are_for_one_model(n_layers: int, n_tokens: int) -> None:
    """Elsewhere average= has nothing to choose from but budget=0, which keeps everything."""
    with pytest.raises(ValueError, match=rf"the nearest is average={n_tokens}\.0 \(budget=0\)"):
        resolved("fitprune:average=30", n_layers, n_tokens)


def test_the_last_layer_is_as_far_as_vtw_goes() -> None:
    assert resolved("vtw:average=558").layer == 31
    with pytest.raises(ValueError, match=r"the nearest is average=558\.0 \(layer=31\)"):
        resolved("vtw:average=570")


def test_defaults_lie_on_their_own_curve() -> None:
    """average= scales the published lists, so asking for their own average returns them."""
    assert resolved("pyramiddrop:average=270").left(576) == (288, 144, 72)
    assert resolved("sparsevlm:average=206.5").keep == (300, 200, 110)
    assert resolved("vtw:average=270").layer == 15
    assert resolved("vscan:average=64").left(576) == (96, 32)
    assert resolved("vscan:average=64,final=0").left(576) == (64,)
    assert resolved("vscan:average=64,final=40").left(576) == (88, 40)
    assert resolved("fitprune:average=187.9").budget == 70


@pytest.mark.parametrize(
    "plan",
    [
        "fastv:k=2,average=40",
        "dart:average=40",
        "vscan:layer=2,average=30",
        "vtw:average=40",
        "pyramiddrop:layers=1/2/4,average=25",
        "sparsevlm:layers=1/2/4,average=30",
    ],
)
def test_the_report_has_the_average_that_was_solved(model: Any, batch: Batch, plan: str) -> None:
    asked = parse_plan(plan)
    assert isinstance(asked, AveragePlan)
    (method,) = asked.resolve(6, N).methods
    (counted,) = entering(run(model, batch, plan, 1).report.image_tokens_entering)
    assert counted == pytest.approx(average_entering(method, 6, N))
    assert abs(counted - asked.average) <= {"vtw": 6, "dart": 3}.get(method.name, 0.7)


def test_sparsevlms_own_counter() -> None:
    """Its counter reports 192.0, the name of the list; 206.5 tokens enter a layer on average."""
    counts = [[576]] * 3 + [[309]] * 4 + [[204]] * 9 + [[113]] * 16
    assert entering(counts) == [206.5]
    assert leaving(counts) == [192.03125]


def test_several_samples_are_averaged_apart() -> None:
    assert entering([[4, 0], [2, 0]]) == [3.0, 0.0]
    assert leaving([[4, 8], [2, 6]]) == [2.0, 6.0]


def test_a_plan_without_average_is_itself() -> None:
    plan = parse_plan("fastv:k=2,keep=4+random:keep=0.5")
    assert plan.resolve(32, 576) is plan


# ---------------------------------------------------------------- fitprune's tables


def test_fitprune_tables() -> None:
    """Every table has 32 counts, and each drops more tokens than the one before."""
    sums = [sum(table) for table in fitprune.TABLES.values()]
    assert list(fitprune.TABLES) == [10, 20, 30, 40, 50, 55, 60, 70, 80, 90]
    assert all(len(table) == 32 and not table[-1] for table in fitprune.TABLES.values())
    assert sums == sorted(sums)


@pytest.mark.parametrize(
    ("budget", "digest"),
    [
        (10, "0124f7b4784d76c8"),
        (20, "2569dfe396215b91"),
        (30, "9e73d53477aca358"),
        (40, "b1e1816e7abe7ce2"),
        (50, "f15cf98dd9e942a2"),
        (55, "af994b0728641ae2"),
        (60, "95619090f7265db4"),
        (70, "a1d2ce4ae87e915a"),
        (80, "c00ebb9145d350cf"),
        (90, "afb6309394edbed3"),
    ],
)
def test_fitprune_tables_are_the_released_ones(budget: int, digest: str) -> None:
    """The digests are of `delete_scheme` in the released modeling_llama.py (ywh187/FitPrune
    d28e418), computed from that file: SHA-256 of its 32 counts, layer by layer, as "0/0/1/2/...".
    """
    counts = slashes([*fitprune.TABLES[budget]])
    assert hashlib.sha256(counts.encode()).hexdigest().startswith(digest)


# ---------------------------------------------------------------- methods from a user's file

OWN = """
from dataclasses import dataclass

from minillava.pruning import Keep, Method


@dataclass(frozen=True)
class Longest(Method):
    keep: int = 5

    def stages(self):
        return (("decoder", 2),)

    def choose(self, c):
        return Keep(c.features().norm(dim=-1).argsort(descending=True)[: self.keep])


class Bare(Method):
    pass


NUMBER = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return file


def test_a_method_of_ones_own_runs(model: Any, batch: Batch, own: Path) -> None:
    for plan, kept in ((f"{own}:Longest", 5), (f"{own}:Longest:keep=7,positions=compact", 7)):
        result = generate(model, batch, parse_plan_with_files(plan), 1)
        assert [k.rule for k in result.report.kept] == ["longest"]
        assert len(result.report.kept[0].positions[0]) == kept
    both = parse_plan_with_files(f"random:keep=0.5 + {own}:Longest:keep=3")
    assert [m.name for m in both.methods] == ["random", "longest"]
    assert load_file_method(f"{own}:Longest").name == "longest"
    assert "longest" not in METHODS


def test_only_the_command_line_runs_files(own: Path) -> None:
    trap = own.with_name("trap.py")
    trap.write_text(f"open({str(own.with_name('sprung'))!r}, 'w')\n")
    for plan in (f"{trap}:Longest", f"random:keep=1+{trap}:A:keep=2"):
        with pytest.raises(ValueError, match="only the command line runs it, with --prune"):
            parse_plan(plan)
    assert not own.with_name("sprung").exists()


@pytest.mark.parametrize(
    ("spec", "text", "said"),
    [
        ("gone.py:A", None, "there is no file"),
        ("mine.py:Shortest", OWN, "has no method Shortest; its methods: Longest, Bare"),
        ("mine.py:NUMBER", OWN, "has no method NUMBER"),
        ("mine.py:Method", OWN, "has no method Method"),
        ("mine.py:Bare", OWN, "put @dataclass(frozen=True) above class Bare"),
        ("mine.py:A", "x = 1\nx = (", "mine.py, line 2 does not run: SyntaxError: '(' was never"),
        ("mine.py:A", "x = 1\n1 / 0", "line 2 does not run: ZeroDivisionError: division by zero"),
        ("mine.py:A", "\n\nimport nothing_here", "mine.py, line 3 does not run: ModuleNotFoundE"),
        ("mine.py:A", "raise OSError('one\\ntwo')", "line 1 does not run: OSError: one"),
        ("mine.py:A", "", "its methods: none; derive one from minillava.pruning.Method"),
        ("mine.py:Longest:size=3", OWN, "longest has no option 'size'; it has: keep, mode"),
        ("mine.py:Longest:keep=x", OWN, "longest: keep=x: must be a whole number"),
    ],
)
def test_a_file_that_will_not_do(tmp_path: Path, spec: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        parse_plan_with_files(f"{tmp_path}/{spec}")
    assert said in str(error.value)


@pytest.mark.parametrize("spec", ["mine.py", "Longest", "mine.py:Longest:keep=3", "mine.py:1st"])
def test_what_names_no_class_in_a_file(spec: str) -> None:
    with pytest.raises(ValueError, match="is not a method in a file; write FILE"):
        load_file_method(spec)
