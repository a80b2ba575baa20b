"""What a report says about the reasons of a choice: scores, margins, picks, merges, digests."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from minillava import Batch, parse_plan
from minillava.generate import Result, generate
from minillava.pruning import METHODS
from minillava.pruning.base import Context, Keep, Method, Plan
from minillava.pruning.margins import Picks, distance_to, lead, least, least_gap
from minillava.report import Kept

PROMPTS = ("tItIttt", "tttt", "tIItt")

# What each method tells. ToMe and DART compare in many rounds and have no single score.
SCORING = {
    "fastv", "simignore", "sparsevlm", "pyramiddrop", "fitprune", "visionzip", "prumerge",
    "prumerge-plus", "fastervlm", "hired", "vispruner", "divprune", "trim", "cdpruner", "holov",
    "hiprune", "vscan", "scope", "gprune", "mmtok", "v2drop", "nuwa", "apet",
    "autoprune", "ivcprune", "flowcut", "prunesid", "border",
}  # fmt: skip
PICKING = {"divprune", "cdpruner", "dart", "scope", "mmtok", "vlmpruner"}
MERGING = {
    "visionzip", "prumerge", "prumerge-plus", "sparsevlm", "trim", "tome", "vscan", "pool", "apet",
    "vlmpruner", "autoprune",
}  # fmt: skip
HERE = sorted(METHODS.keys() - tiny.GRIDS.keys())  # methods that can run on the model below
UNTOLD = {"flowcut", "prunesid"}  # how close their choices were is not known
# the others do not look at the picture
READING = (SCORING | PICKING | MERGING) - {"pool"} - UNTOLD


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    return tiny.make_batch(model, *PROMPTS)


def explained(model: Any, batch: Batch, name: str) -> Iterator[tuple[Kept, int]]:
    """Each step of a method's example and each sample with images."""
    report = generate(model, batch, tiny.example(name), max_new_tokens=1).report
    for kept in report.kept:
        for b, prompt in enumerate(PROMPTS):
            if "I" in prompt:
                yield kept, b


@pytest.mark.parametrize("name", HERE)
def test_every_method_explains_its_choice(model: Any, batch: Batch, name: str) -> None:
    T = [int(mask.sum()) for mask in batch.mask]
    steps = tiny.example(name).steps
    told = set()
    for number, (kept, b) in enumerate(explained(model, batch, name)):
        step = steps[number // 2]
        assert (kept.rule, kept.stage, kept.layer) == (name, step.stage, step.layer)
        candidates, positions = kept.candidates[b], set(kept.positions[b])
        assert positions <= set(candidates)
        assert len(set(candidates)) == len(candidates)
        assert len(kept.scores[b]) in (0, len(candidates))
        assert set(kept.order[b]) <= positions
        assert len(set(kept.order[b])) == len(kept.order[b])
        assert len(kept.merged_into[b]) in (0, len(candidates))
        for row, into in zip(candidates, kept.merged_into[b], strict=False):
            assert into == -1 or (row not in positions and (into in positions or into >= T[b]))
        added = {into for into in kept.merged_into[b] if into >= T[b]}
        assert len(added) <= kept.extra[b]
        assert (kept.within_rounding[b] is None) == (kept.closest[b] is None)
        told |= {"scores"} if kept.scores[b] else set()
        told |= {"order"} if kept.order[b] else set()
        told |= {"merged"} if kept.merged_into[b] else set()
        told |= {"closest"} if kept.closest[b] is not None else set()
    assert ("scores" in told) == (name in SCORING)
    assert ("order" in told) == (name in PICKING)
    assert ("merged" in told) == (name in MERGING)
    assert ("closest" in told) == (name in READING)


@pytest.mark.parametrize("name", HERE)
def test_a_report_is_json_and_says_nothing_of_a_prompt_without_images(
    model: Any, batch: Batch, name: str
) -> None:
    report = generate(model, batch, tiny.example(name), max_new_tokens=2).report
    told = dataclasses.asdict(report)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    for kept in report.kept:
        for field in ("positions", "candidates", "scores", "order", "merged_into"):
            assert getattr(kept, field)[1] == []
        assert kept.margin[1] is kept.closest[1] is kept.within_rounding[1] is None
        for positions, digest in zip(kept.positions, kept.digest, strict=True):
            assert digest == hashlib.sha256(json.dumps(positions).encode()).hexdigest()


@pytest.mark.parametrize("name", HERE)
def test_a_batch_says_what_each_prompt_says_alone(model: Any, batch: Batch, name: str) -> None:
    plan = tiny.example(name)
    together = generate(model, batch, plan, max_new_tokens=1).report.kept
    for b in (0, 2):
        alone = generate(model, tiny.alone(model, batch, b), plan, max_new_tokens=1, seed=b)
        for ours, theirs in zip(together, alone.report.kept, strict=True):
            for field in ("digest", "candidates", "order", "merged_into", "within_rounding"):
                assert getattr(ours, field)[b] == getattr(theirs, field)[0], field
            # ApET's basis rows have an error of 0, up to rounding
            assert ours.scores[b] == pytest.approx(theirs.scores[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", sorted(SCORING))
def test_the_margin_is_that_of_the_scores(model: Any, batch: Batch, name: str) -> None:
    """The smallest of the images': the last kept above all dropped ones, less the first dropped."""
    for kept, b in explained(model, batch, name):
        if tiny.example(name).methods[0].scope == "all":
            continue
        start = {0: (1, 18), 2: (1, 17)}[b]  # where the two images begin
        bounds = [range(start[0], start[1]), range(start[1], start[1] + 16)]
        margins = []
        for image in bounds:
            scored = {
                row: score
                for row, score in zip(kept.candidates[b], kept.scores[b], strict=True)
                if row in image
            }
            dropped = [s for row, s in scored.items() if row not in kept.positions[b]]
            above = [
                s
                for row, s in scored.items()
                if row in kept.positions[b] and s >= max(dropped, default=math.inf)
            ]
            margins += [min(above) - max(dropped)] if above else []
        if name not in ("sparsevlm", "autoprune"):  # added rows compete from the second stage on
            assert kept.margin[b] == pytest.approx(min(margins))


def test_scores_rank_what_is_kept(model: Any, batch: Batch) -> None:
    for name in ("fastv", "pyramiddrop", "fitprune", "fastervlm", "hired", "simignore", "trim"):
        for kept, b in explained(model, batch, name):
            assert kept.margin[b] is not None
            assert kept.closest[b] is not None


def test_divprunes_picks_are_the_farthest_and_their_scores_say_how_far(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Keep]] = []
    choose = METHODS["divprune"].choose

    def noting(self: Method, c: Context) -> Keep:
        x = torch.nn.functional.normalize(c.features().double(), dim=-1)
        seen.append((1 - x @ x.T, choose(self, c)))
        return seen[-1][1]

    monkeypatch.setattr(METHODS["divprune"], "choose", noting)
    generate(model, batch, tiny.example("divprune"), max_new_tokens=1)
    assert len(seen) == 4
    for distance, keep in seen:
        order = keep.order.tolist()
        for n, pick in enumerate(order[1:], 1):
            gaps = distance[order[:n]].amin(0)
            assert float(keep.scores[pick]) == pytest.approx(float(gaps[pick]), abs=1e-5)
        last = distance[order[:-1]].amin(0)
        for row in set(range(len(distance))) - set(order):
            assert float(keep.scores[row]) == pytest.approx(float(last[row]), abs=1e-5)


def test_pool_merges_each_patch_into_its_own_cell(model: Any) -> None:
    kept = generate(
        model, tiny.make_batch(model, "tItt"), parse_plan("pool:h=2,w=2"), 1
    ).report.kept
    middle = {(x // 2, y // 2): 0 for x in range(4) for y in range(4)}
    for row in kept[0].positions[0]:
        middle[(row - 1) % 4 // 2, (row - 1) // 4 // 2] = row
    for row, into in zip(kept[0].candidates[0], kept[0].merged_into[0], strict=True):
        mine = middle[(row - 1) % 4 // 2, (row - 1) // 4 // 2]
        assert into == (-1 if row == mine else mine)


def test_tomes_targets_are_means_of_what_went_into_them(model: Any, monkeypatch: Any) -> None:
    """One block that merges: a merged row is the mean of its members, seen before the MLP."""
    from minillava.pruning import tome

    calls: list[tuple[Any, Any]] = []
    merge = tome.merge

    def noting(tokens: Any, *more: Any) -> Any:
        calls.append((tokens, merge(tokens, *more)))
        return calls[-1][1]

    monkeypatch.setattr(tome, "merge", noting)
    generate(model, tiny.make_batch(model, "tItt"), parse_plan("tome:keep=5"), 1)
    assert len(calls) > 2
    for before, after in calls:
        for token in range(len(after.x)):
            members = (after.of == token).nonzero()[:, 0]
            parts = before.of[members].unique()
            sizes = before.size[parts]
            mean = (before.x[parts] * sizes[:, None]).sum(0) / sizes.sum()
            tiny.assert_close(after.x[token], mean)
            assert int(after.size[token]) == len(members)


# ---------------------------------------------------------------- chosen again


def test_masks_say_what_they_left_at_every_token(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tiny.choices(monkeypatch, METHODS["fastv"])
    plan = parse_plan("uniform:keep=9,mode=mask+fastv:k=2,keep=4,mode=mask")
    report = generate(model, batch, plan, max_new_tokens=5).report
    assert len(report.chosen_again) == 5
    prompt, *later = report.chosen_again
    assert [kept.rule for kept in prompt] == ["uniform", "fastv"]
    assert [k.positions for k in prompt] == [k.positions for k in report.kept]
    assert [k.digest for k in prompt] == [k.digest for k in report.kept]
    assert [[k.rule for k in token] for token in later] == [["fastv"]] * 4
    images = 4  # of the samples 0 and 2
    assert len(seen) == 5 * images
    starts = [[1, 18], [], [1, 17]]
    for t, token in enumerate(report.chosen_again):
        chosen = iter(seen[t * images : (t + 1) * images])
        for b, firsts in enumerate(starts):
            expected = []
            for first in firsts:
                context, keep = next(chosen)
                kept = context.candidates[keep.index] - first
                expected += [first + p for p in sorted(kept.tolist())]
            assert token[-1].positions[b] == expected
        assert token[-1].scores == token[-1].candidates == [[], [], []]  # it would be a lot
    assert len({tuple(token[-1].digest) for token in report.chosen_again}) > 1


def test_without_a_cache_each_token_has_the_choice_of_its_own_prompt(model: Any) -> None:
    """FastV reads the newest row alone: it chooses as for the prompt with the answer so far."""
    batch, plan = tiny.make_batch(model, "ttItttt"), parse_plan("fastv:k=2,keep=4")
    result = generate(model, batch, plan, max_new_tokens=5, use_cache=False)
    assert len(result.report.chosen_again) == 5
    for t, token in enumerate(result.report.chosen_again):
        ids = torch.cat((batch.ids[0], torch.tensor(result.tokens[0][:t], dtype=torch.long)))[None]
        longer = Batch.from_padded(ids, None, batch.pixels)
        expected = generate(model, longer, plan, max_new_tokens=1).report.kept
        assert token[0].positions == expected[0].positions


@pytest.mark.parametrize("plan", ["", "divprune:keep=5", "uniform:keep=5,mode=mask", "vtw:layer=2"])
def test_choices_that_stand_are_not_repeated(model: Any, batch: Batch, plan: str) -> None:
    assert generate(model, batch, parse_plan(plan), 4).report.chosen_again == []


# ---------------------------------------------------------------- a user's own method


@dataclass(frozen=True)
class Told(Method):
    """Keeps three candidates and says what `tell` holds."""

    def stages(self) -> Any:
        return (("embed", 0),)

    def choose(self, c: Context) -> Keep:
        return Keep(torch.tensor([2, 5, 7]), **TELL)


TELL: dict[str, Any] = {}


def tell(model: Any, **what: Any) -> Result:
    TELL.clear()
    TELL.update(what)
    batch = tiny.make_batch(model, "tItt")
    return generate(model, batch, Plan((Told(),)), max_new_tokens=2, output_logits=True)


def given(*high: int) -> Tensor:
    """Scores (16,) that are 1 or 2 for these and below 0.5 for the others."""
    scores = torch.linspace(0.1, 0.4, 16)
    scores[list(high)] = torch.linspace(1, 2, len(high))
    return scores


def test_explanations_change_nothing(model: Any) -> None:
    bare = tell(model)
    told = tell(
        model,
        scores=given(2, 5, 7),
        order=torch.tensor([7, 2]),
        merged_into=torch.tensor([-1, 0, -1, 1, 1] + [-1] * 11),
    )
    assert torch.equal(bare.logits, told.logits)
    (kept,) = told.report.kept
    assert kept.positions == bare.report.kept[0].positions == [[3, 6, 8]]
    assert kept.order == [[8, 3]]
    assert kept.merged_into[0][:6] == [-1, 3, -1, 6, 6, -1]
    assert kept.margin[0] == pytest.approx(1 - 0.4)
    assert kept.closest[0] == pytest.approx(0.6)  # of the lowest that is kept
    assert kept.within_rounding == [False]
    assert bare.report.kept[0].scores == bare.report.kept[0].order == [[]]
    assert bare.report.kept[0].within_rounding == [None]


def test_scores_that_are_negative_are_measured_by_the_largest(model: Any) -> None:
    (kept,) = tell(model, scores=given(2, 5, 7) - 3).report.kept
    assert kept.margin[0] == pytest.approx(0.6)
    assert kept.closest[0] == pytest.approx(0.6 / 2.9)


def test_scores_that_do_not_explain_the_choice_have_a_margin_alone(model: Any) -> None:
    """2 and 7 are above all that were dropped, 5 is not."""
    (kept,) = tell(model, scores=given(2, 7)).report.kept
    assert kept.margin[0] == pytest.approx(1 - 0.4)
    assert kept.closest == kept.within_rounding == [None]
    (kept,) = tell(model, scores=given(0, 1)).report.kept
    assert kept.margin == [None]


def test_the_closest_decision_decides_whether_it_is_within_rounding(model: Any) -> None:
    limit = 2 * torch.finfo(torch.float32).eps ** 0.5
    for closest, within in ((0.9 * limit, True), (1.1 * limit, False), (math.inf, None)):
        (kept,) = tell(model, scores=given(2, 5, 7), closest=torch.tensor(closest)).report.kept
        assert kept.within_rounding == [within]
        assert kept.closest[0] == (None if within is None else pytest.approx(closest))


def test_scores_that_are_not_finite_are_left_out(model: Any) -> None:
    for odd in (math.nan, math.inf, -math.inf):
        scores = given(2, 5, 7)
        scores[4] = odd
        (kept,) = tell(model, scores=scores).report.kept
        assert kept.scores == [[]]
        assert kept.margin == [None]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"scores": torch.rand(3, 16)}, r"Keep.scores must be \(16\) floats, not \(3, 16\)"),
        ({"scores": torch.rand(15)}, r"Keep.scores must be \(16\) floats, not \(15,\)"),
        ({"scores": torch.arange(16)}, r"Keep.scores must be \(16\) floats"),
        ({"scores": [0.5] * 16}, "Keep.scores must be .* not list"),
        ({"order": torch.rand(2)}, r"Keep.order must be \(k\) integers"),
        ({"merged_into": torch.zeros(3, dtype=torch.long)}, r"must be \(16\) integers, not \(3,\)"),
        ({"order": torch.tensor([16])}, "told: Keep.order or merged_into names no row"),
        ({"order": torch.tensor([-1])}, "names no row"),
        ({"merged_into": torch.full((16,), 3)}, "names no row"),
        ({"merged_into": torch.full((16,), -2)}, "names no row"),
    ],
)
def test_explanations_that_do_not_fit_are_refused(
    model: Any, what: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tell(model, **what)


def test_the_released_window_of_fastv_counts_the_row_behind_the_image(model: Any) -> None:
    batch = tiny.make_batch(model, "tItt")
    (kept,) = generate(model, batch, parse_plan("fastv:k=2,keep=4,released=1"), 1).report.kept
    assert kept.candidates == [list(range(2, 18))]  # 17 is text
    assert len(kept.scores[0]) == 16


# ---------------------------------------------------------------- margins


def test_a_lead_is_the_gap_at_the_cut() -> None:
    scores = torch.tensor([0.1, 0.8, 0.5, 0.4])
    assert float(lead(scores, 2)) == pytest.approx(0.1 / 0.5)
    assert float(lead(scores, 2, scale=1.0)) == pytest.approx(0.1)
    assert float(lead(scores - 0.2, 2)) == pytest.approx(
        0.1 / (scores - 0.2).square().mean().sqrt().item()
    )
    assert float(lead(torch.tensor([1.0, 1.0, 0.0]), 1)) == 0.0
    for k in (0, 4, 5):
        assert float(lead(scores, k)) == math.inf
    masked = torch.tensor([0.8, -math.inf, 0.4])
    assert float(lead(masked, 1)) == pytest.approx(0.5)


def test_the_least_gap_is_that_of_neighbours_in_the_order() -> None:
    assert float(least_gap(torch.tensor([0.1, 0.8, 0.5, 0.4]))) == pytest.approx(0.1 / 0.5)
    assert float(least_gap(torch.tensor([0.3, 0.1, 0.32]), 1.0)) == pytest.approx(0.02)
    assert float(least_gap(torch.tensor([0.3]))) == math.inf
    assert float(distance_to(torch.tensor(0.5), torch.tensor([0.1, 0.6]))) == pytest.approx(0.2)
    assert float(least(torch.tensor(3.0), torch.tensor(math.inf), torch.tensor(2.0))) == 2.0


def test_picks_note_their_order_worth_and_the_closest_one() -> None:
    picks = Picks(4, 2, torch.device("cpu"))
    assert picks.take(0, torch.tensor([0.2, 0.9, 0.7, 0.1])).tolist() == [1]
    assert picks.take(1, torch.tensor([0.15, -math.inf, 0.3, 0.25])).tolist() == [2]
    keep = picks.keep(scale=0.5)
    assert keep.index.tolist() == keep.order.tolist() == [1, 2]
    assert keep.scores.tolist() == pytest.approx([0.15, 0.9, 0.3, 0.25])
    assert keep.closest.tolist() == pytest.approx([0.2 / 0.5, 0.05 / 0.5])


@pytest.fixture(scope="module")
def noisy(model: Any) -> Any:
    """The model with weights that differ by a part in a million."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for p in other.parameters():
        p.data *= 1 + 1e-6 * torch.randn(p.shape, generator=generator)
    return other


@pytest.mark.parametrize("name", sorted(READING - {"trim", "cdpruner"}))
def test_a_choice_that_is_not_within_rounding_survives_noise(
    model: Any, noisy: Any, name: str
) -> None:
    batch = tiny.make_batch(model, *["tItt"] * 12)
    here, there = (
        generate(m, batch, tiny.example(name), max_new_tokens=1).report.kept for m in (model, noisy)
    )
    for b in range(12):
        for ours, theirs in zip(here, there, strict=True):
            if ours.within_rounding[b] or theirs.within_rounding[b]:
                break  # later steps may differ too
            assert ours.digest[b] == theirs.digest[b]


def test_fields_of_kept_are_lists_by_sample(model: Any, batch: Batch) -> None:
    (kept,) = generate(model, batch, parse_plan("fastv:k=2,keep=3"), 1).report.kept
    for field in dataclasses.fields(kept):
        if field.name not in ("rule", "stage", "layer"):
            assert len(getattr(kept, field.name)) == len(PROMPTS), field.name
    assert replace(kept, rule="x") != kept
