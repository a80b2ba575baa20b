"""Methods before the decoder against released outputs and against reference_vision.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference_vision as reference
import torch
from contexts import make_context, make_model
from golden_cases import Golden
from tiny import make_batch, watching
from torch import Tensor

from minillava import parse_plan
from minillava.generate import encode_images, generate
from minillava.pruning import METHODS, PRESETS, divprune, holov, prumerge, shared, vispruner
from minillava.pruning.base import Context, Keep, Method, Plan
from minillava.pruning.grid import middle_patches, row_widths
from minillava.pruning.pool import patches_of_cells

# ---------------------------------------------------------------- released outputs


def check_run(golden: Golden, plan: str, patches: list[int], extra: int) -> None:
    result, start = golden.run(plan, golden["generated"].shape[1]), golden.start
    (kept,) = result.report.kept
    assert [p - start for p in kept.positions[0]] == sorted(patches)
    assert kept.extra == [extra]
    rows = len(patches) + extra
    assert result.report.image_tokens_entering[0] == [rows]
    # compact positions: the next token follows the rows that are left
    assert result.report.next_position == [result.report.tokens_entering[0][0]]
    expected, t = golden.tensors, golden.meta["checks"].get("comparable_steps", 12)
    assert result.tokens[0][:t] == expected["generated"][0, :t].tolist()
    assert (result.logits[0, :t] - expected["step_logits"][0, :t]).abs().max() < 1e-3


@pytest.mark.goldens("visionzip/*", complete=True)
def test_visionzip_is_the_released_code(golden: Golden) -> None:
    expected, p = golden.tensors, golden.meta["parameters"]
    patches = expected["dominant_index_sorted"].tolist()
    patches += expected["contextual_target_patch_index"].tolist()
    plan = f"visionzip:dominant={p['dominant']},contextual={p['contextual']}"
    check_run(golden, plan, patches, extra=1)


@pytest.mark.goldens("visionzip/*", complete=True)
def test_visionzips_merged_rows_are_the_released_ones(golden: Golden) -> None:
    p, expected = golden.meta["parameters"], golden.tensors["merged_features"][0]
    model, pixels = golden.model, golden.pixels
    with torch.inference_mode():
        depth = model.config.vision.num_hidden_layers
        hidden = model.vision(pixels, range(depth))
        method = METHODS["visionzip"](dominant=p["dominant"], contextual=p["contextual"])
        c = make_context(model, method, hidden)
        torch.testing.assert_close(rows_of(c, method.choose(c)), expected, atol=1e-4, rtol=0)


@pytest.mark.goldens("divprune/pipeline*", complete=True)
def test_divprune_is_the_released_code(golden: Golden) -> None:
    plan = f"divprune:keep={golden.meta['parameters']['subset_ratio']}"
    check_run(golden, plan, golden.tensors["selected_sorted"].tolist(), extra=0)


@pytest.mark.goldens("divprune/select*")
def test_divprunes_order_is_the_released_one(golden: Golden) -> None:
    t, ratio = golden.tensors, golden.meta["parameters"]["subset_ratio"]
    method = METHODS["divprune"](keep=ratio)
    c = plain_context(method, t["features"])
    assert c.n_tokens == len(t["features"])
    assert method.choose(c).index.tolist() == t["selected_in_order"].tolist()
    assert method.left(len(t["features"])) == (golden.meta["parameters"]["count"],)


# ---------------------------------------------------------------- a random image


class Picture:
    """A random tower and the hidden states of a random image: all that a method can see."""

    def __init__(self, grid: int, seed: int = 0, depth: int = 6) -> None:
        self.grid, self.N = grid, grid * grid
        self.model = make_model(grid, depth)
        self.tower = self.model.vision
        self.generator = torch.Generator().manual_seed(seed)
        for name, p in self.tower.named_parameters():
            noise = torch.randn(p.shape, generator=self.generator)
            if p.ndim == 1:
                p.copy_(noise * 0.2 + ("norm" in name and name.endswith("weight")))
            else:
                spread = 2.5 if "q_proj" in name or "k_proj" in name else 1.0
                p.copy_(noise * spread / math.sqrt(p[0].numel()))
        pixels = torch.randn(1, 3, 2 * grid, 2 * grid, generator=self.generator)
        self.hidden = self.tower(pixels, range(depth))
        self.depth = depth
        self.features = self.hidden[depth - 1][0, 1:]
        weight = torch.randn(40, 24, generator=self.generator)
        self.projected = self.features @ weight.T
        epsilon = self.tower.config.layer_norm_eps
        self.plain = reference.Tower(self.tower.state_dict(), 3, epsilon)

    def context(self, method: Method, **options: Any) -> Context:
        ((stage, _), *_) = method.stages()
        rows = self.projected if stage == "embed" else None
        return make_context(self.model, method, self.hidden, features=rows, **options)

    def attention(self, block: int) -> Any:
        return self.plain.attention(block, double(self.hidden[block][0]))

    def choose(self, name: str, **options: Any) -> tuple[list[int], Keep, Context]:
        method = METHODS[name](**options)
        c = self.context(method)
        keep = method.choose(c)
        index = keep.index.tolist()
        assert len(set(index)) == len(index)
        added = 0 if keep.extra is None else len(keep.extra)
        assert len(index) + added <= method.left(self.N)[0]
        return index, keep, c


def plain_context(method: Method, features: Tensor) -> Context:
    """The context of an embed-stage method that reads only the features (n, D)."""
    model = make_model(math.ceil(len(features) ** 0.5))
    hidden = {model.feature_layer: torch.zeros(1, 1 + model.config.vision.num_patches, 24)}
    return make_context(model, method, hidden, features=features, n=len(features))


def rows_of(c: Context, keep: Keep) -> Tensor:
    """All rows that remain, in the order in which they continue."""
    index = keep.index if keep.ordered else keep.index.sort().values
    kept = c.features()[index] if keep.merged is None else keep.merged
    if keep.extra is None:
        return kept
    return torch.cat((keep.extra, kept) if keep.extra_first else (kept, keep.extra))


def double(x: Tensor) -> Any:
    return x.double().numpy()


def same_rows(ours: Tensor, theirs: Any) -> None:
    expected = torch.tensor(np.array(theirs), dtype=torch.float32)
    assert ours.shape == expected.shape
    error = (ours - expected).abs().max()
    assert error <= 1e-4 * expected.square().mean().sqrt()


SIZES = [4, 5, 8]  # 16, 25 and 64 patches; 576 have a test of their own


@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize(("dominant", "contextual"), [(1, 2), (6, 3), (9, 2), (12, 4)])
def test_visionzip(grid: int, dominant: int, contextual: int) -> None:
    p = Picture(grid)
    block = p.depth - 2
    index, keep, c = p.choose("visionzip", dominant=dominant, contextual=contextual)
    score = [x * 3 for x in reference.from_class_token(p.attention(block))]
    _, keys, _ = p.plain.qkv(block, double(p.hidden[block][0]))
    kept, rows = reference.visionzip(
        score, keys[1:], double(p.hidden[p.depth - 1][0]), dominant, contextual
    )
    assert index == kept
    same_rows(rows_of(c, keep), rows)


@pytest.mark.parametrize("grid", [4, 5, 8])
def test_visionzip_without_contextual_tokens_only_drops_and_adds_the_class_token(grid: int) -> None:
    p = Picture(grid)
    index, keep, c = p.choose("visionzip", dominant=5, contextual=0)
    score = reference.from_class_token(p.attention(p.depth - 2))
    assert index == sorted(reference.best(score, 4))
    rows = rows_of(c, keep)
    assert torch.equal(rows[0], p.hidden[p.depth - 1][0, 0])
    assert torch.equal(rows[1:], p.features[index])


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("grid", "seed"), [(5, 3), (8, 0), (8, 1), (9, 2)])
def test_prumerge(grid: int, seed: int, plus: bool) -> None:
    p = Picture(grid, seed)
    index, keep, c = p.choose("prumerge-plus" if plus else "prumerge")
    last = p.depth - 1
    q, k, _ = p.plain.qkv(last, double(p.hidden[last][0]))
    kept, rows, extra = reference.prumerge(
        q[0].ravel(), k.reshape(len(k), -1), double(p.features), plus
    )
    assert kept, "a picture without outliers shows nothing"
    assert index == kept
    assert keep.ordered
    same_rows(rows_of(c, keep), [*rows, extra])


def test_prumerge_counts_outliers_as_released() -> None:
    """int(N * (k / N)) is k - 1 for those k whose quotient was rounded down."""
    score = torch.linspace(1, 1.5, 576)
    for k in (0, 1, 29, 57, 100):
        some = score.clone()
        some[:k] += 10.0
        assert prumerge.outlier_share(some) == k / 576
    assert prumerge.regular_patches(576, 32 / 576).tolist() == list(range(0, 575, 6))
    assert prumerge.regular_patches(576, 0.0).tolist() == list(range(0, 575, 192))


def test_prumerge_without_outliers_leaves_the_sum_and_plus_a_grid() -> None:
    p = Picture(4)
    for block in p.tower.blocks:
        block.attn.k_proj.weight.zero_()  # every patch receives the same attention
    index, keep, c = p.choose("prumerge")
    assert index == []
    same_rows(rows_of(c, keep), double(p.features).sum(0)[None] / 17)
    assert p.choose("prumerge-plus")[0] == [0, 5, 10]


@pytest.mark.parametrize("grid", SIZES)
def test_fastervlm_and_hired(grid: int) -> None:
    p = Picture(grid)
    score = reference.from_class_token(p.attention(p.depth - 2))
    for keep in (1, 7, p.N):
        expected = sorted(reference.best(score, keep))
        for name in ("fastervlm", "hired"):
            assert sorted(p.choose(name, keep=keep)[0]) == expected


def test_hired_cuts_a_share_and_the_others_round() -> None:
    amounts = {name: METHODS[name](keep=0.23).left(16) for name in ("hired", "fastervlm")}
    assert amounts == {"hired": (3,), "fastervlm": (4,)}


@pytest.mark.parametrize(
    ("n", "surplus"), [(24, 7), (30, 22), (288, 200), (512, 96), (63, 40), (574, 571), (46, 39)]
)
def test_vispruner_thins_out_as_released(n: int, surplus: int) -> None:
    """The order of one round decides the next. Both sides use one matrix, to avoid rounding."""
    g = torch.Generator().manual_seed(n)
    likeness = torch.rand(600, 600, generator=g)
    order = torch.randperm(600, generator=g)[:n]
    ours, _ = vispruner.thin_out(likeness, order, n - surplus)
    assert ours.tolist() == reference.thin_out(likeness.tolist(), order.tolist(), n - surplus)


def test_vispruner_ends_where_the_released_code_breaks() -> None:
    likeness = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    for n in range(1, 40):
        for keep in range(n + 1):
            left, _ = vispruner.thin_out(likeness, torch.arange(n), keep)
            assert len(left) == keep == len(set(left.tolist()))


@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("important", [0.0, 0.3, 0.5, 1.0])
def test_vispruner(grid: int, important: float) -> None:
    p = Picture(grid)
    for keep in (9, 12):
        index, _, _ = p.choose("vispruner", keep=keep, important=important)
        if important == 1.0 or (p.N - int(keep * important)) % 2 == 0:
            score = reference.from_class_token(p.attention(p.depth - 2))
            if important == 1.0:
                assert sorted(index) == sorted(reference.best(score, keep))
            else:
                expected = reference.vispruner(score, double(p.features), keep, important)
                assert sorted(index) == expected
        assert len(index) == keep


@pytest.mark.parametrize(("n", "keep"), [(16, 16), (25, 7), (64, 40), (576, 40)])
def test_divprune(n: int, keep: int) -> None:
    g = torch.Generator().manual_seed(n)
    points = torch.randint(0, 1000, (n, 3), generator=g).double()
    distance = torch.cdist(points, points).float()  # the same numbers for both
    ours = divprune.choose_farthest(distance, keep).order.tolist()
    assert ours == reference.divprune(distance.tolist(), keep)


@pytest.mark.parametrize(
    ("rows", "first"), [([0, 0, 1, 1, 1, 2], [5, 0, 2]), ([2, 0, 0, 1, 1, 1], [0, 1, 3])]
)
def test_divprune_never_takes_a_token_twice(rows: list[int], first: list[int]) -> None:
    features = torch.eye(4)[torch.tensor(rows)]
    method = METHODS["divprune"](keep=6)
    index = method.choose(plain_context(method, features)).index.tolist()
    assert index[:3] == first
    assert sorted(index) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("grid", [3, 4, 5, 8, 9])
def test_holov(grid: int) -> None:
    p = Picture(grid)
    score = reference.from_class_token(p.attention(p.depth - 2))
    for keep in (1, grid, p.N // 2, p.N):
        index, chosen, c = p.choose("holov", keep=keep)
        kept, zeros = reference.holov(double(p.projected), score, keep)
        assert index == kept
        rows = rows_of(c, chosen)
        assert torch.equal(rows[: len(kept)], p.projected[index])
        assert torch.equal(rows[len(kept) :], torch.zeros(zeros, 40))


def test_holovs_variance_counts_next_to_nothing_but_counts() -> None:
    """It is scaled to the mean attention and cancels, except for the 1e-6 of the released code."""
    features = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(9, generator=torch.Generator().manual_seed(1)) / 576
    score = holov.run_score(features, attention)
    assert abs(float(score / attention.mean()) - 1090) < 0.1
    alike = holov.run_score(torch.ones(9, 8), attention)  # variance 1/9 / (1 - 1/9) of the own 0
    assert abs(float(alike / attention.mean()) - 1090) < 0.1
    flat = holov.run_score(torch.zeros(9, 8), attention)
    assert abs(float(flat / attention.mean()) - 1000) < 0.1


def test_holov_fills_up_with_zeros_what_a_run_cannot_spend() -> None:
    features = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    attention = torch.full((32,), 0.001)
    attention[4] = 0.9
    sizes = holov.run_lengths(32)
    scores = [
        holov.run_score(f, a)
        for f, a in zip(features.split(sizes), attention.split(sizes), strict=True)
    ]
    given, _ = holov.run_budgets(torch.stack(scores), 16)
    kept, zeros = reference.holov(double(features), attention.tolist(), 16)
    assert given[2] == 16
    assert sum(min(a, b) for a, b in zip(given, sizes, strict=True)) == len(kept) == 16 - zeros
    assert zeros == 14


@pytest.mark.parametrize("grid", SIZES)
def test_hiprune(grid: int) -> None:
    p = Picture(grid)
    blocks = (p.depth // 3, p.depth - 2)
    middle, deep = (reference.from_all_tokens(p.attention(b)) for b in blocks)
    for keep, alpha in ((3, 0.1), (10, 0.5), (12, 1.0), (15, 0.9), (p.N, 0.1)):
        expected = reference.hiprune(middle, deep, keep, alpha, grid)
        assert sorted(p.choose("hiprune", keep=keep, alpha=alpha)[0]) == expected
    deepest = [reference.from_all_tokens(p.attention(b)) for b in (5, 4)]
    expected = reference.hiprune(*deepest, 10, 0.5, grid)
    assert sorted(p.choose("hiprune", keep=10, alpha=0.5, block=5)[0]) == expected


def test_hiprunes_neighbours_are_of_the_same_image() -> None:
    """On grids of 4 x 4, of two images: the patches 0 and 6 of the first, 1 and 15 of the second.
    Beyond the first and the last patch of an image that patch itself stands in."""
    buffers = shared.with_neighbours(torch.tensor([0, 6, 17, 31]), 4).view(5, 4)
    assert buffers.T.tolist() == [
        [0, 0, 1, 0, 4],
        [6, 5, 7, 2, 10],
        [17, 16, 18, 16, 21],
        [31, 30, 31, 27, 31],
    ]


@pytest.mark.parametrize("grid", [4, 8, 12])
def test_vscan(grid: int) -> None:
    p = Picture(grid)
    blocks = (5 * p.depth // 24, p.depth - 2)
    shallow, deep = (reference.from_class_token(p.attention(b)) for b in blocks)
    for keep in (5, p.N // 2, p.N // 2 + 1, p.N - 1):
        index, chosen, c = p.choose("vscan", keep=keep)
        kept, rows = reference.vscan(shallow, deep, double(p.projected), keep, grid)
        assert index == kept
        same_rows(rows_of(c, chosen), rows)


def test_vscans_second_part_is_a_pyramiddrop(model: Any) -> None:
    """PyramidDrop is compared with its released code in test_methods_decoder.py."""
    batch = make_batch(model, "ttItttt", "tIttItt")
    alone, composed = (
        generate(model, batch, parse_plan(plan), max_new_tokens=3, output_logits=True)
        for plan in (
            "vscan:keep=8,layer=2,final=3",
            "vscan:keep=8,final=0+pyramiddrop:layers=2,ratios=0.1875",
        )
    )
    assert alone.report.kept[0].positions == composed.report.kept[0].positions
    assert alone.report.kept[1].positions == composed.report.kept[1].positions
    assert alone.report.image_tokens_entering == [[8, 16], [8, 16], [3, 6], [3, 6]]
    assert torch.equal(alone.logits, composed.logits)
    default = generate(model, batch, parse_plan("vscan:keep=8,layer=2"), max_new_tokens=1)
    assert default.report.kept[1].positions == alone.report.kept[1].positions


@pytest.mark.parametrize("grid", SIZES)
def test_tome(grid: int) -> None:
    p = Picture(grid)
    first = double(p.hidden[0][0])
    for r in (1, 2, 40):
        index, chosen, c = p.choose("tome", r=r)
        names, rows = reference.tome(p.plain, first, [r] * (p.depth - 1))
        assert index == names
        assert chosen.ordered
        same_rows(rows_of(c, chosen), rows)
    for keep in (p.N - 1, p.N // 2, 3):
        surplus, blocks = p.N - keep, p.depth - 1
        merges = [surplus // blocks + (1 if i < surplus % blocks else 0) for i in range(blocks)]
        if keep == 3:
            merges = METHODS["tome"](keep=3).merges(p.N, blocks)
        index, chosen, c = p.choose("tome", keep=keep)
        names, rows = reference.tome(p.plain, first, merges)
        assert index == names
        assert len(index) == keep
        same_rows(rows_of(c, chosen), rows)


def test_tome_reaches_whatever_can_be_reached() -> None:
    for total, blocks in ((16, 1), (16, 3), (25, 2), (64, 5), (576, 23)):
        reachable = []
        for keep in range(1, total + 1):
            try:
                plan = METHODS["tome"](keep=keep).merges(total, blocks)
            except ValueError:
                continue
            tokens = total + 1
            for r in plan:
                assert 0 <= r <= (tokens - 1) // 2
                tokens -= r
            assert tokens == keep + 1
            reachable.append(keep)
        least = total + 1
        for _ in range(blocks):
            least -= (least - 1) // 2
        assert reachable == list(range(least - 1, total + 1))
    assert METHODS["tome"](keep=192).merges(576, 23) == [17] * 16 + [16] * 7


def test_tome_says_what_its_blocks_can_reach() -> None:
    p = Picture(4, depth=3)
    with pytest.raises(ValueError, match=r"tome: keep=2 cannot be reached .* use keep=4$"):
        p.choose("tome", keep=2)
    assert len(p.choose("tome", keep=4)[0]) == 4


@pytest.mark.parametrize(
    ("plan", "runs"),
    [
        ("tome:r=2", 0),
        ("tome:keep=9", 0),
        ("tome:r=0", 1),
        ("tome:keep=1.0", 1),
        ("tome:r=2+uniform:keep=3", 1),
        ("tome:r=2+visionzip:dominant=3,contextual=1", 1),
    ],
)
def test_tome_alone_runs_in_the_towers_place(model: Any, plan: str, runs: int) -> None:
    batch = make_batch(model, "ttItttt", "tIttItt", "ttt")
    everything = encode_images(model, batch, parse_plan("tome:r=1+fastervlm:keep=4"))
    expected = generate(model, batch, parse_plan(plan), 2, output_logits=True, encoded=everything)
    with watching(*model.vision.blocks[: model.feature_layer]) as outputs:
        result = generate(model, batch, parse_plan(plan), 2, output_logits=True)
    assert [len(calls) for calls in outputs] == [runs] * model.feature_layer
    assert torch.equal(result.logits, expected.logits)
    assert result.report.kept == expected.report.kept


@pytest.mark.parametrize(
    ("h", "w", "grid"), [(1, 1, 4), (2, 3, 5), (3, 5, 8), (8, 8, 8), (12, 16, 24)]
)
def test_grid_and_pool(h: int, w: int, grid: int) -> None:
    p = Picture(grid, depth=2)
    expected = reference.grid(h, w, grid)
    assert p.choose("grid", h=h, w=w)[0] == expected
    index, chosen, c = p.choose("pool", h=h, w=w)
    assert index == expected
    same_rows(rows_of(c, chosen), reference.pool(double(p.projected), h, w, grid))


@pytest.mark.parametrize("grid", [1, 2, 5, 8, 24])
def test_a_grid_of_any_number_is_spread_over_the_picture(grid: int) -> None:
    for keep in [*range(min(65, grid * grid + 1)), *range(65, grid * grid + 1, 73)]:
        widths = row_widths(keep, grid)
        assert sum(widths) == keep
        assert not widths or max(widths) - min(widths) <= 1
        assert max([len(widths), *widths], default=0) <= grid
        where = middle_patches(widths, grid).tolist()
        assert where == sorted(set(where))
        if keep:
            covered = patches_of_cells(widths, grid)
            assert covered.any(0).all()
            assert covered[torch.arange(keep), torch.tensor(where)].all()
    assert [len(row_widths(k, 24)) for k in (64, 128, 192, 576)] == [8, 8, 12, 24]


# ---------------------------------------------------------------- at full size


@pytest.fixture(scope="module")
def large() -> Picture:
    return Picture(24, seed=5, depth=3)


@pytest.mark.parametrize("name", ["fastervlm", "hired", "hiprune", "holov"])
def test_at_576_patches(large: Picture, name: str) -> None:
    first, last = (large.attention(block) for block in (0, large.depth - 2))
    score = reference.from_class_token(last)
    if name == "fastervlm":
        index, expected = large.choose(name, keep=64)[0], reference.best(score, 64)
    elif name == "hired":
        index, expected = large.choose(name, keep=0.2)[0], reference.best(score, 115)
    elif name == "holov":
        index = large.choose(name, keep=64)[0]
        expected = reference.holov(double(large.projected), score, 64)[0]
    else:
        both = [reference.from_all_tokens(weights) for weights in (first, last)]
        index = sorted(large.choose(name, keep=64, block=0)[0])
        expected = reference.hiprune(*both, 64, 0.1, 24)
    assert index == expected


BUDGETED = ["fastervlm", "hired", "vispruner", "divprune", "holov", "hiprune", "vscan", "grid"]


@pytest.mark.parametrize("name", [*BUDGETED, "pool"])
def test_a_budget_of_nothing_and_of_one(name: str) -> None:
    p = Picture(4)
    for keep in (0, 1, 0.001):
        (method,) = parse_plan(f"{name}:keep={keep}" + ",layer=1" * (name == "vscan")).methods
        method.check(4, p.N, (2,))
        index, chosen, c = p.choose(name, keep=keep)
        assert len(index) == len(rows_of(c, chosen)) == (1 if keep else 0)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("plan", "tower", "message"),
    [
        ("fastervlm:keep=4", 1, "fastervlm reads the vision tower's second last block"),
        ("hiprune:keep=4,block=9", 6, "block=9, but the vision tower has blocks 0 to 5; .*block=2"),
        ("vscan:keep=4,block=6", 6, "block=6, but the vision tower has blocks 0 to 5; .*block=1"),
    ],
)
def test_what_the_tower_does_not_have(plan: str, tower: int, message: str) -> None:
    (method,) = parse_plan(plan).methods
    with pytest.raises(ValueError, match=message):
        method.vision_layers(tower)


def check(plan: Plan, n_layers: int, per_image: int, starts: tuple[int, ...]) -> None:
    """What a request checks of a plan, for a prompt with images at these places."""
    for method in plan.methods:
        n_tokens = per_image * (len(starts) if method.scope == "all" else 1)
        method.check(n_layers, n_tokens, starts)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("vscan:keep=4", r"layer=16, but the decoder has layers 0 to 3; .*layer=2, or final=0"),
        ("vscan:keep=4,layer=2,final=5", "final=5 is more than the 4 tokens of keep"),
        ("hiprune:keep=3,alpha=1.0", "alpha=1.0 takes 1 anchors with 4 neighbours"),
        ("visionzip:dominant=12,contextual=9", "want more than the 16 image tokens"),
        ("divprune:keep=17", "keep=17, but there are 16 image tokens"),
        ("grid:h=5,w=2", "h=5 must be from 1 to 4"),
        ("tome:keep=17", "keep=17, but there are 16"),
    ],
)
def test_what_the_prompt_does_not_have(plan: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(parse_plan(plan), 4, 16, (2,))


def test_visionzip_may_keep_every_patch() -> None:
    check(parse_plan("visionzip:dominant=9,contextual=8"), 4, 16, (2,))  # with the class token


def test_vscan_needs_whole_windows() -> None:
    with pytest.raises(ValueError, match="cuts the image into 4 x 4 windows; its 5 x 5 patches"):
        check(parse_plan("vscan:keep=4,final=0"), 4, 25, (2,))


@pytest.mark.parametrize("scope", ["image", "all"])
def test_a_grids_sides_are_those_of_one_image(scope: str) -> None:
    check(parse_plan(f"grid:h=4,w=4,scope={scope}"), 4, 16, (2, 20))
    with pytest.raises(ValueError, match="w=5 must be from 1 to 4"):
        check(parse_plan(f"grid:h=4,w=5,scope={scope}"), 4, 16, (2, 20))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("grid", "grid needs keep=, or h= and w="),
        ("pool:h=3", "pool needs keep=, or h= and w="),
        ("grid:keep=4,h=2", "grid: h and keep say the same"),
        ("tome", "tome needs r="),
        ("tome:r=1,keep=3", "tome: keep and r say the same"),
        ("visionzip:dominant=0,contextual=1", "visionzip: dominant=0 must be 1 or more"),
        ("vispruner:keep=4,important=1.5", "important=1.5 must be from 0 to 1"),
        ("visionzip:dominant=6,contextual=3,mode=mask", "needs a method that only drops"),
    ],
)
def test_what_no_model_could_do(plan: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_plan(plan)


def test_rows_without_a_patch_are_not_ranked_by_the_tower() -> None:
    p, fastervlm = Picture(4), METHODS["fastervlm"](keep=3)
    with pytest.raises(ValueError, match="put what adds them last"):
        fastervlm.choose(p.context(fastervlm, patches=torch.arange(-1, 15)))


@pytest.mark.parametrize("plan", ["tome:r=1", "grid:keep=2", "pool:h=1,w=2"])
def test_some_methods_need_all_patches(plan: str) -> None:
    p, (method,) = Picture(4), parse_plan(plan).methods
    said = (
        f"{method.name} needs every patch of the image, 3 of 16 are left; put {method.name} first"
    )
    with pytest.raises(ValueError, match=said):
        method.choose(p.context(method, n=3))


WITH_NAN = ["divprune", "vispruner", "prumerge", "visionzip", "tome", "simignore", "vscan"]


@pytest.mark.parametrize("name", WITH_NAN)
def test_what_is_not_a_number_is_refused(name: str) -> None:
    p = Picture(4)
    for i, state in p.hidden.items():
        p.hidden[i] = state.clone()
        p.hidden[i][0, 3, 1] = float("nan")
    p.features[2, 1] = p.projected[2, 1] = float("nan")
    options = {"visionzip": {"dominant": 4, "contextual": 2}, "prumerge": {}, "tome": {"r": 2}}
    with pytest.raises(ValueError, match="NaN among"):
        p.choose(name, **options.get(name, {"keep": 4}))


@pytest.mark.parametrize("name", ["divprune", "vispruner", "vscan"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_cannot_be_compared_are_refused(name: str, value: float) -> None:
    """Their attention is as usual."""
    p = Picture(4)
    p.features[2, 1] = p.projected[2, 1] = value
    with pytest.raises(ValueError, match="NaN among"):
        p.choose(name, keep=4)


def test_presets_are_what_they_are_called() -> None:
    for name in ("visionzip-64", "visionzip-128", "visionzip-192", "divprune-56"):
        plan = parse_plan(name)
        assert plan.left(576, 1) == int(name.rsplit("-", 1)[1])
        assert PRESETS[name].source
    assert parse_plan("vscan-64").left(576, 1) == 96


def test_a_merging_method_may_leave_more_rows_than_the_image_had() -> None:
    assert parse_plan("visionzip:dominant=17,contextual=0").left(16, 2) == 34
    assert parse_plan("prumerge-plus").left(16, 1) == 17
    assert parse_plan("uniform:keep=4+divprune:keep=8").left(16, 2) == 8
