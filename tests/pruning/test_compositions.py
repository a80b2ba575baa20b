"""Plans of several rules on prompts of any shape; what FastV and Simignore choose, recomputed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference import Reference, picture_rows
from test_properties import assert_equals_reference, run
from tiny import IMAGE, alone, assert_close, make_batch
from torch import Tensor

from minillava import parse_plan

N, LAYERS = 16, 4
examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def reference(model: Any) -> Reference:
    return Reference(model)


# ---------------------------------------------------------------- plans and prompts of any kind

amounts = st.sampled_from(["0", "1", "3", "8", "15", "16", "0.0", "0.3", "0.5", "1.0"])


@st.composite
def rules(draw: Any) -> str:
    name = draw(st.sampled_from(["fastv", "simignore", "random", "uniform"]))
    options = {"keep": draw(amounts), "scope": draw(st.sampled_from(["image", "all"]))}
    first = 0
    if name == "fastv":
        first = draw(st.integers(0, LAYERS - 1))
        options["layer"] = str(first)
    if name == "simignore":
        options["step"] = str(draw(st.integers(1, 3)))
        options["i_index"] = str(draw(st.integers(0, 3)))
        options["measure"] = draw(st.sampled_from(["cosine", "euclidean", "manhattan"]))
    if draw(st.booleans()):
        options["mode"] = "mask"
        if draw(st.booleans()):
            options["until"] = str(draw(st.integers(first + 1, LAYERS)))
    return name + ":" + ",".join(f"{k}={v}" for k, v in options.items())


plans = st.lists(rules(), min_size=1, max_size=3).map("+".join)
prompts = st.text("ttI", min_size=1, max_size=5).map(lambda s: f"t{s}t")
batches = st.lists(prompts, min_size=1, max_size=3)


@examples
@given(plan=plans, shape=batches)
def test_any_plan_equals_a_decoder_that_removes_nothing(
    model: Any, reference: Reference, plan: str, shape: list[str]
) -> None:
    parsed = parse_plan(plan)
    again = any(m.mode == "mask" and m.newest_row for m in parsed.methods)
    batch = make_batch(model, *shape)
    assert_equals_reference(model, reference, batch, parsed, n=1 if again else 3)


@examples
@example("fastv:layer=0,keep=4,mode=mask", ["tIt", "tIIt"], True)  # drawn anew at every token
@given(plan=plans, shape=st.lists(prompts, min_size=2, max_size=3), use_cache=st.booleans())
def test_any_batch_gives_what_each_prompt_gives_alone(
    model: Any, plan: str, shape: list[str], use_cache: bool
) -> None:
    batch, parsed = make_batch(model, *shape), parse_plan(plan)
    together = run(model, batch, parsed, use_cache=use_cache, seed=1)
    for b in range(len(shape)):
        single = run(model, alone(model, batch, b), parsed, use_cache=use_cache, seed=1 + b)
        assert single.tokens[0] == together.tokens[b]
        assert_close(together.logits[b], single.logits[0])
        assert [k.positions[b] for k in together.report.kept] == [
            k.positions[0] for k in single.report.kept
        ]


# ---------------------------------------------------------------- rules that read the newest row


@dataclass(frozen=True)
class Rule:
    layer: int
    keep: int
    until: int = LAYERS
    joint: bool = False  # one budget over all pictures
    shift: int = 0  # the released window begins one row late
    coming: bool = False  # ranked by its own layer's attention, not by that of the layer before


class Ranking:
    """Such rules on one sample as the reference sees it.

    `choices[t][i]` (S,): columns that rule i hides when token t is the newest (0: the prompt's).
    way: whose choice a row is under: the prompt's ("static"), the newest token's ("re-prune"), or
    its own ("re-mask"). ignored (T,): columns that another rule hides below a layer.
    """

    def __init__(
        self,
        reference: Reference,
        is_image: Tensor,
        rules: list[Rule],
        way: str,
        ignored: tuple[Tensor, int] | None = None,
    ) -> None:
        self.reference, self.is_image, self.rules, self.way = reference, is_image, rules, way
        self.ignored = ignored
        self.choices: list[list[Tensor]] = []

    def step(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All rows x (T + t, D) so far: logits (V,) of the next token, and visible picture columns
        after each rule, for the newest row."""
        T, S, L = len(self.is_image), len(x), LAYERS
        t = S - T
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        token = (torch.arange(S) - T + 1).clamp(min=0)  # a row's own: 0 for those of the prompt
        fresh = not self.choices or self.way != "static"
        if fresh:
            self.choices.append([])
        under = {"static": 0 * token, "re-prune": 0 * token + t, "re-mask": token}[self.way]
        visible: list[Tensor] = []

        def see(layer: int, entering: Tensor, attention: list[Tensor]) -> Tensor:
            for i, rule in enumerate(self.rules):
                if rule.layer == layer and fresh:
                    before = hidden(layer, i, t)
                    if rule.coming:
                        seen = causal & ~before
                        weights = self.reference.attention(layer, entering, torch.arange(S), seen)
                    else:
                        weights = attention[-1]
                    score = weights[:, -1].mean(0)
                    self.choices[-1].append(self.choose(rule, score, before))
                if rule.layer == layer:
                    seen = ~hidden(layer, i + 1, t)[:T] & self.is_image
                    visible.append(seen.nonzero()[:, 0])
            rows = [hidden(layer, len(self.rules), int(u)) for u in under]
            return causal & ~torch.stack(rows)

        def hidden(layer: int, n_rules: int, t: int) -> Tensor:
            columns = torch.zeros(S, dtype=torch.bool)
            if self.ignored and layer < self.ignored[1]:
                columns[:T] |= self.ignored[0]
            made = self.choices[0 if self.way == "static" else t][:n_rules]
            for rule, choice in zip(self.rules, made, strict=False):
                if rule.layer <= layer < rule.until:
                    columns[: len(choice)] |= choice
            return columns

        traced = self.reference(x, [torch.arange(S)] * L, see)
        return traced.logits[-1], visible

    def choose(self, rule: Rule, score: Tensor, hidden: Tensor) -> Tensor:
        places = self.is_image.nonzero()[:, 0].split(N)
        groups = [torch.cat(places)] if rule.joint else list(places)
        result = torch.zeros_like(hidden)
        for group in groups:
            window = group + rule.shift
            window = window[~hidden[window]]
            best = score[window].sort(descending=True, stable=True).indices[: rule.keep]
            result[window] = True
            result[window[best]] = False
        return result


STORIES = {
    "fastv:layer=1,keep=4": [Rule(1, 4)],
    "fastv:layer=3,keep=1": [Rule(3, 1)],
    "fastv:layer=2,keep=5,scope=all": [Rule(2, 5, joint=True)],
    "fastv:layer=1,keep=9+fastv:layer=3,keep=3": [Rule(1, 9), Rule(3, 3)],
    "fastv:layer=3,keep=3+fastv:layer=1,keep=9": [Rule(1, 9), Rule(3, 3)],
    "fastv:layer=2,keep=9+fastv:layer=2,keep=3": [Rule(2, 9), Rule(2, 3)],
    "fastv:layer=2,keep=4,released=1": [Rule(2, 4, shift=1)],
    "pyramiddrop:layers=1/3,ratios=0.5/0.25,positions=original": [
        Rule(1, 8, coming=True),
        Rule(3, 4, coming=True),
    ],
}
MASKED_STORIES = STORIES | {
    "fastv:layer=1,keep=4,until=3": [Rule(1, 4, until=3)],
    "fastv:layer=1,keep=3,until=2+fastv:layer=2,keep=6": [Rule(1, 3, until=2), Rule(2, 6)],
}
WAYS = [
    *((plan, rules, "drop", True, "static") for plan, rules in STORIES.items()),
    *((plan, rules, "drop", False, "re-prune") for plan, rules in STORIES.items()),
    *((plan, rules, "mask", True, "re-mask") for plan, rules in MASKED_STORIES.items()),
    *((plan, rules, "mask", False, "re-prune") for plan, rules in MASKED_STORIES.items()),
]


@pytest.mark.parametrize(("plan", "rules", "mode", "use_cache", "way"), WAYS)
def test_every_way_of_decoding(
    model: Any,
    reference: Reference,
    plan: str,
    rules: list[Rule],
    mode: str,
    use_cache: bool,
    way: str,
) -> None:
    shapes = ["tttItttt", "ttt", "Itt"] + ([] if "released" in plan else ["ttItItt"])
    batch = make_batch(model, *shapes)
    pictures = picture_rows(model, batch)
    spelled = "+".join(f"{part},mode={mode}" for part in plan.split("+"))
    result = run(model, batch, parse_plan(spelled), n=4, use_cache=use_cache)
    for b, (ids, mask) in enumerate(zip(batch.ids, batch.mask, strict=True)):
        ids = ids[mask]
        is_image = ids == IMAGE
        n = int(is_image.sum())
        mine, pictures = pictures[:n], pictures[n:]
        new = torch.tensor(result.tokens[b][:-1])
        x = reference.embed(torch.cat((ids, new)), mine, IMAGE)
        ranking = Ranking(reference, is_image, rules if n else [], way)
        for t in range(4):
            logits, visible = ranking.step(x[: len(ids) + t])
            assert_close(result.logits[b, t], logits)
            if t == 0 and n:
                for kept, seen in zip(result.report.kept, visible, strict=True):
                    assert kept.positions[b] == seen.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("seed", "text_stays"), [(0, True), (1, True), (6, False)])
def test_the_released_simignore_with_fastv(
    model: Any, reference: Reference, seed: int, text_stays: bool, use_cache: bool
) -> None:
    """Its mask ends where FastV's layer begins, and FastV's window begins one row late: the first
    picture token comes back where it was ignored, and the first text row can be dropped."""
    batch = make_batch(model, "tttIttt", seed=seed)
    plan = "simignore:keep=4,step=2,i_index=1,mode=mask,until=2+fastv:layer=2,keep=2,released=1"
    result = run(model, batch, parse_plan(plan), n=3, use_cache=use_cache)
    ids = batch.ids[0]
    is_image = ids == IMAGE
    similar, attended = result.report.kept
    ignored = is_image.clone()
    ignored[similar.positions[0]] = False
    x = torch.cat((ids, torch.tensor(result.tokens[0][:-1])))
    x = reference.embed(x, picture_rows(model, batch), IMAGE)
    way = "static" if use_cache else "re-prune"
    ranking = Ranking(reference, is_image, [Rule(2, 2, shift=1)], way, (ignored, 2))
    for t in range(3):
        logits, visible = ranking.step(x[: len(ids) + t])
        assert_close(result.logits[0, t], logits)
        if t == 0:
            assert attended.positions[0] == visible[0].tolist()
    assert ignored[3]
    assert attended.positions[0][0] == 3
    assert ranking.choices[0][0][19] != text_stays
    assert [n for (n,) in result.report.tokens_entering] == [len(ids)] * 2 + [len(ids) - 14] * 2
    assert len(attended.positions[0]) == 1 + 2 - text_stays


def test_the_ways_of_decoding_differ(model: Any) -> None:
    """Otherwise the tests above would hold without saying anything."""
    batch = make_batch(model, "tttItttt")
    answers = [
        run(model, batch, parse_plan(f"fastv:layer=1,keep=4,mode={mode}"), 4, use_cache=use_cache)
        for mode, use_cache in (("drop", True), ("drop", False), ("mask", True))
    ]
    first, second, third = (answer.logits[0, -1] for answer in answers)
    for a, b in ((first, second), (second, third), (first, third)):
        assert (a - b).abs().max() > 1e-2


# ---------------------------------------------------------------- Simignore's choice


def pairs_by_hand(image: Tensor, text: Tensor, measure: str) -> list[tuple[float, int]]:
    """(similarity, picture row) of all pairs, best first."""
    image, text = image.double(), text.double()
    pairs = []
    for i, a in enumerate(image):
        for b in text:
            if measure == "cosine":
                value = float(a @ b / (a.norm() * b.norm()))
            else:
                value = -float((a - b).norm(p=2 if measure == "euclidean" else 1))
            pairs.append((value, i))
    return sorted(pairs, key=lambda pair: -pair[0])


@pytest.mark.parametrize("measure", ["cosine", "euclidean", "manhattan"])
@pytest.mark.parametrize("keep", [1, 5, 16])
@pytest.mark.parametrize(("step", "i_index"), [(1, 0), (1, 1), (2, 0), (3, 4)])
def test_simignore_walks_the_sorted_pairs(
    model: Any, measure: str, keep: int, step: int, i_index: int
) -> None:
    given = torch.tensor([40, 41, 42])
    batch = make_batch(model, "ttItttt", "tttI", "tItIt", focus=[None, None, given])
    texts = [batch.ids[0][-4:], batch.ids[1][batch.mask[1]][1:3], given]  # of each prompt
    plan = f"simignore:keep={keep},step={step},i_index={i_index},measure={measure}"
    report = run(model, batch, parse_plan(plan), n=1).report
    rows = list(picture_rows(model, batch).split(N))
    for b, starts in enumerate(([2], [3], [1, 18])):
        expected = []
        for start in starts:
            text = model.llama.embed_tokens.weight[texts[b]]
            found: list[int] = []
            for _, row in pairs_by_hand(rows.pop(0), text, measure)[i_index::step]:
                if row not in found and len(found) < keep:
                    found.append(row)
            expected += sorted(start + row for row in found)
        assert report.kept[0].positions[b] == expected


# ---------------------------------------------------------------- the baselines' choice


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 7, 15])
def test_uniform_is_evenly_spaced(model: Any, keep: int) -> None:
    report = run(model, make_batch(model, "ttItt"), parse_plan(f"uniform:keep={keep}"), n=1).report
    expected = [2 + math.floor((i + 0.5) * N / keep) for i in range(keep)]
    assert report.kept[0].positions == [expected]


def test_random_draws_by_seed_without_putting_back(model: Any) -> None:
    batch, plan = make_batch(model, "ttItt"), parse_plan("random:keep=8")
    drawn = [
        run(model, batch, plan, n=1, seed=seed).report.kept[0].positions[0] for seed in range(99)
    ]
    assert drawn[0] == run(model, batch, plan, n=1, seed=0).report.kept[0].positions[0]
    assert all(len(set(positions)) == 8 for positions in drawn)
    often = torch.tensor(drawn).flatten().bincount(minlength=18)[2:]
    assert len(often) == N
    assert 25 < often.min() < often.max() < 75  # each 99 / 2 times, give or take five deviations
