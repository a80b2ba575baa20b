"""Methods of 2026: written-out references where no released output is small enough to commit,
what they refuse, their budgets, and the baseline `border`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference_decoder
import reference_vision as reference
import tiny
import torch
from PIL import Image
from test_methods_vision import Picture, double, rows_of, same_rows

from minillava import load, parse_plan
from minillava.generate import encode_images, generate
from minillava.pruning import METHODS, PRESETS, mmtok, prunesid
from minillava.pruning.average import average_entering
from minillava.pruning.base import Context
from minillava.pruning.shared import border_lines, choose_covering

# ---------------------------------------------------------------- references


@pytest.mark.parametrize("depth", [3, 4, 7, 8])
def test_flowcut_in_towers_of_several_blocks(depth: int) -> None:
    p = Picture(6, seed=depth, depth=depth)
    for keep in (3, 20, 35):
        index, chosen, c = p.choose("flowcut", keep=keep)
        kept, rows = reference.flowcut(p.plain, double(p.hidden[0][0]), depth - 1, keep)
        assert index == kept
        same_rows(rows_of(c, chosen), rows)


@pytest.mark.parametrize("merge", [-1.0, 0.0, 0.1, 1.0])
def test_mustdrops_tower(merge: float) -> None:
    p = Picture(6)
    index, chosen, c = p.choose("mustdrop", merge=merge, key=0.3)
    first = double(p.hidden[0][0])
    names, rows, key = reference.mustdrop(p.plain, first, p.depth, merge, 0.3)
    assert {-1.0: 4, 1.0: 36}.get(merge, len(names)) == len(names)
    assert index == names
    same_rows(rows_of(c, chosen), rows)
    assert sorted(c.shared["key"].tolist()) == sorted(key)


@pytest.mark.parametrize(("share", "individual"), [(0.028, 1.0), (0.05, 0.06)])
def test_mustdrops_decoder(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, share: float, individual: float
) -> None:
    tiny.write_hf(tmp_path, layers=6, image_size=84, vision_layers=3, seed=1)
    model = load(tmp_path)[0]
    batch = tiny.make_batch(model, "tttItttt", seed=2)
    seen = tiny.choices(monkeypatch, METHODS["mustdrop"])
    plan = f"mustdrop:merge=1.0,key=0.1,layers=1/3/4,global={share},individual={individual}"
    with tiny.watching(model.projector) as (projected,):
        result = generate(model, batch, parse_plan(plan), 1, output_logits=True)
    (c, _), *_ = seen
    rows, start = projected[0], 3
    n = len(rows)
    ids = [1, *batch.ids[0][1:3].tolist(), *batch.ids[0][-4:].tolist()]
    x = model.embed(torch.tensor(ids))
    x = torch.cat((x[:start], rows, x[start:]))
    numbers = c.patches.tolist()
    key = {start + numbers.index(patch) for patch in c.shared["key"].tolist()}
    act = reference_decoder.mustdrop([1, 3, 4], key, share, individual)
    with torch.inference_mode():
        logits, entered = reference_decoder.decode(model, x, range(start, start + n), act)
    left = [len(s.visual()) for s in entered]
    assert result.report.image_tokens_entering == [[k] for k in left]
    assert len(set(left)) > 2, f"{left}: hardly anything was dropped, so nothing was compared"
    tiny.assert_close(result.logits[0, 0], logits)


def one_image(folder: Any, layers: int, side: int = 6) -> tuple[Any, Any, torch.Tensor, range]:
    """A random model, a batch of one prompt with an image, its embedded rows, and the image's."""
    tiny.write_hf(folder, layers=layers, image_size=14 * side, vision_layers=3, seed=1)
    model = load(folder)[0]
    batch = tiny.make_batch(model, "tttItttttt", seed=2)
    with tiny.watching(model.projector) as (projected,):
        generate(model, batch, None, 1)
    start, n = 3, side * side
    ids = batch.ids[0]
    text = model.embed(torch.cat((ids[:start], ids[start + n :])))
    x = torch.cat((text[:start], projected[0], text[start:]))
    return model, batch, x, range(start, start + n)


def check_decoder(model: Any, batch: Any, x: Any, image: range, plan: str, act: Any) -> list[int]:
    """The counts of each layer and the logits are the reference's; returns the counts."""
    result = generate(model, batch, parse_plan(plan), 1, output_logits=True)
    with torch.inference_mode():
        logits, entered = reference_decoder.decode(model, x.clone(), image, act)
    left = [len(s.visual()) for s in entered]
    assert result.report.image_tokens_entering == [[k] for k in left]
    kept = [i for i in entered[-1].origin if i in image]
    assert result.report.kept[-1].positions[0] == kept
    tiny.assert_close(result.logits[0, 0], logits)
    return left


def test_ivcprune_in_the_decoder(tmp_path: Any) -> None:
    prompt = one_image(tmp_path, layers=4)
    plan = "ivcprune:layer=2,seeds=2,foreground=7,axes=3"
    act = reference_decoder.ivcprune(prompt[0], 2, [2, 7, 3, 3])
    assert check_decoder(*prompt, plan, act)[2] < 15  # some are chosen twice


def test_ivcprunes_released_window(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins at row 5 wherever the image does: text can leave, the image's last rows stay."""
    seen = tiny.choices(monkeypatch, METHODS["ivcprune"])
    plan = parse_plan("ivcprune:layer=2,seeds=1,foreground=1,axes=1,released=1")
    for prompt, start in (("t" * 9 + "Itttt", 9), ("tttItttt", 3)):
        report = generate(model, tiny.make_batch(model, prompt), plan, 2).report
        context, keep = seen.pop()
        assert context.candidates.tolist() == list(range(5, 21))
        stay = {*range(21, start + 16), *range(start, 5)}
        stay |= {*context.candidates[keep.index].tolist()} & {*range(start, start + 16)}
        assert report.kept[0].positions == [sorted(stay)]
        left = len(prompt) + 15 - 16 + len(keep.index)
        assert [n for (n,) in report.tokens_entering] == [len(prompt) + 15] * 2 + [left] * 2
    with pytest.raises(ValueError, match="released=1 knows one image, the prompt has 2"):
        generate(model, tiny.make_batch(model, "tItIt"), plan, 1)


def test_blocks_are_written_as_ranges() -> None:
    (method,) = parse_plan("fastervlm:keep=3,blocks=14/16-22").methods
    assert method.block_numbers(24) == [14, *range(16, 23)]
    assert parse_plan("fastervlm:keep=3").methods[0].block_numbers(24) == [22]


def test_presets_of_the_latest() -> None:
    plans = {
        "vlmpruner-64": "vlmpruner:keep=64,layer=2,threshold=0.8,batch=16,pivots=4",
        "autoprune-64": "autoprune:target=64,depth=32,x0=14.9,k0=0.4,gamma=0.2",
        "ivcprune-7b": "ivcprune:layer=16,foreground=0.2,seeds=0.01,axes=0.05",
    }
    for preset, plan in plans.items():
        assert parse_plan(preset).methods == parse_plan(plan).methods
    # the released shares of tokens that are dropped
    for budget, share in {192: 0.667, 128: 0.778, 64: 0.889}.items():
        assert parse_plan(f"vlmpruner-{budget}").left(576, 1) == 576
        assert parse_plan(f"vlmpruner-{budget}").methods[0].left(576) == (round(576 * (1 - share)),)


@pytest.mark.parametrize(("keep", "threshold"), [(5, 0.8), (20, 0.5), (20, 0.05), (3, 0.8)])
def test_vlmpruner_in_the_decoder(tmp_path: Any, keep: int, threshold: float) -> None:
    prompt = one_image(tmp_path, layers=4)
    plan = f"vlmpruner:layer=2,keep={keep},threshold={threshold},batch=4,pivots=3"
    act = reference_decoder.vlmpruner(2, keep, threshold, 4, 3, 6)
    left = check_decoder(*prompt, plan, act)
    assert left[2] == keep or threshold == 0.05


@pytest.mark.parametrize(("target", "gamma"), [(10, 0.2), (10, 0.01), (14, 0.01)])
def test_autoprune_in_the_decoder(tmp_path: Any, target: int, gamma: float) -> None:
    model, batch, x, image = one_image(tmp_path, layers=7)
    encoded = encode_images(model, batch, parse_plan("fastervlm:keep=4"))
    block = len(model.vision.blocks) - 2
    q, k = model.vision.heads(block, encoded[block])
    weights = [(k[0, :, h] @ q[0, 0, h] / q.shape[3] ** 0.5).softmax(0) for h in range(q.shape[2])]
    by_class = torch.stack(weights).mean(0)[1:]
    # rows of patches begin at the pixels 0, 66, 133, 200, 266, 333; the image and its margin are
    # the pixels 83 to 316
    by_class[:12], by_class[30:] = 0.0, 0.0
    batch = replace(batch, sizes=[(400, 100, "pad")])
    plan = f"autoprune:depth=7,target={target},x0=3,gamma={gamma}"
    act = reference_decoder.autoprune(by_class.tolist(), 7, target, 3, 0.4, gamma)
    left = check_decoder(model, batch, x, image, plan, act)
    assert len({*left}) > 2
    assert abs(sum(left[1:]) + left[-1] - 7 * target) < 7 * 3


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_gprune_passes_information_along_the_graph(steps: int) -> None:
    p = Picture(5)
    x, n = double(p.projected), p.N
    shares = np.zeros((n, n))
    for i in range(n):
        near = [j for j in range(n) if reference.cosine(x[i], x[j]) >= 0.2]
        weights = [np.exp(reference.cosine(x[i], x[j]) / 0.1) for j in near]
        shares[i, near] = np.array(weights) / sum(weights)
    held = [float(np.sqrt(row @ row)) for row in x]
    for _ in range(steps):
        held = [sum(held[i] * shares[i, j] for i in range(n)) for j in range(n)]
    scores = [held[j] / int((shares[j] > 0).sum()) for j in range(n)]
    options = {"similarity": 0.2, "temperature": 0.1, "steps": steps}
    assert p.choose("gprune", keep=n, **options)[0] == reference.best(scores, n)


def test_greedy_coverage_is_the_written_out_one() -> None:
    generator = torch.Generator().manual_seed(0)
    covers = torch.rand(9, 12, generator=generator) - 0.3
    times, plus = torch.rand(12, generator=generator), torch.rand(12, generator=generator)
    best, chosen = np.zeros(9), []
    for _ in range(12):
        gain = [
            float("-inf")
            if j in chosen
            else sum(max(0.0, float(covers[i, j]) - best[i]) for i in range(9)) * float(times[j])
            + float(plus[j])
            for j in range(12)
        ]
        chosen.append(int(np.argmax(gain)))
        best = np.maximum(best, covers[:, chosen[-1]].numpy())
    assert choose_covering(covers, 12, times, plus).index.tolist() == chosen


@pytest.mark.parametrize("grid", [4, 5])
def test_the_class_tokens_attention_summed_over_blocks(grid: int) -> None:
    p = Picture(grid)
    scores = [reference.from_class_token(p.attention(b)) for b in range(6)]
    for numbers in ((2, 3, 4), (4, 0, 3), (1,)):
        total = [sum(scores[b][j] for b in numbers) for j in range(p.N)]
        index = p.choose("fastervlm", keep=5, blocks=numbers)[0]
        assert sorted(index) == sorted(reference.best(total, 5))


def test_prunesids_directions_are_torchs() -> None:
    """Up to their signs, from the same start, for more and for fewer channels than patches."""
    for shape in ((40, 16), (16, 40)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).sigmoid()
        torch.manual_seed(5)
        expected = torch.pca_lowrank(x, q=4)[2].abs()
        ours = prunesid.principal_directions(x, 4, torch.Generator().manual_seed(5)).abs()
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_prunesids_quotas_add_up() -> None:
    assert prunesid.group_quotas([10, 6, 0, 4], [7, 2, 0, 1], 10) == [5, 2, 0, 2]
    assert prunesid.group_quotas([3, 3], [1, 1], 6) == [3, 2]  # more than there are winners
    assert sum(prunesid.group_quotas([100, 40, 20, 4] * 4, [9, 3, 3, 1] * 4, 64)) == 63


def test_mmtoks_words() -> None:
    short = "Answer the question using a single word or phrase."
    assert mmtok.words_of(f"What is the color of the train's door?\n{short}") == [
        "color", "of", "train", "s", "door"
    ]  # fmt: skip
    assert mmtok.words_of("Where is it?") == ["Where", "is", "it?"]
    assert mmtok.words_of(f" {short} ") == ["see", "in", "this", "image"]


# ---------------------------------------------------------------- what the Context offers


def test_attention_row_by_row_has_the_mean_that_attention_gives(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier step hid rows, and where one added rows that have no query yet."""
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = METHODS["fastv"].choose

    def noting(self: Any, c: Context) -> Any:
        for rows, layer in ((c.text_rows, -1), (c.candidates, -1), (c.text_rows, 0)):
            by_row = torch.cat(list(c.attention_by_row(rows, layer)), dim=1)
            read.append((by_row.mean(1), c.attention(rows, layer)))
        return choose(self, c)

    monkeypatch.setattr(METHODS["fastv"], "choose", noting)
    batch = tiny.make_batch(model, "ttIttItt")
    for first in ("random:keep=9,mode=mask", "sparsevlm:layers=2,keep=7"):
        generate(model, batch, parse_plan(f"{first}+fastv:layer=2,keep=4"), 1)
    assert len(read) == 12
    for mean, expected in read:
        torch.testing.assert_close(mean, expected)


def test_rows_before_the_last_layer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = METHODS["v2drop"].choose

    def noting(self: Any, c: Context) -> Any:
        seen.append((c.before(), c.candidates))
        return choose(self, c)

    monkeypatch.setattr(METHODS["v2drop"], "choose", noting)
    batch = tiny.make_batch(model, "ttIttItt")
    with tiny.watching_inputs(model.block(1)) as entered:
        generate(model, batch, parse_plan("v2drop:layers=2,ratios=0.5"), 1)
    assert len(seen) == 2
    for rows, candidates in seen:
        assert torch.equal(rows, entered[0][candidates])


def test_added_rows_have_no_state_before(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that does not say that it needs one, a user's perhaps, is refused when it asks."""
    monkeypatch.setattr(METHODS["v2drop"], "check_order", lambda *given: None)
    plan = parse_plan("sparsevlm:layers=2,keep=7+v2drop:layers=2,ratios=0.5")
    with pytest.raises(ValueError, match="v2drop: rows that were added since have no state"):
        generate(model, tiny.make_batch(model, "ttItt"), plan, 1)


# ---------------------------------------------------------------- sizes and borders


def test_the_processor_says_how_large_the_pictures_were(tmp_path: Any) -> None:
    tiny.write_hf(tmp_path)
    _, processor = load(tmp_path)
    pictures = [[Image.new("RGB", (40, 90))], [], [Image.new("L", (7, 7))]]
    batch = processor(["<image>a", "b", "<image>c"], pictures, image_aspect="pad")
    assert batch.sizes == [(40, 90, "pad"), (7, 7, "pad")]
    assert processor(["b"]).sizes is None


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([(10, 10, "pad")], "'1 entries'; give .* each of 2 images"),
        ([(10, 10, "pad"), (10, 0, "pad")], r"\(10, 0, 'pad'\)"),
        ([(10, 10, "pad"), (10, 10, "stretch")], "stretch"),
        ([(10, 10), (10, 10, "pad")], r"\(10, 10\); give \(width, height"),
        ([(10.5, 10, "pad"), (10, 10, "pad")], "10.5"),
    ],
)
def test_sizes_that_do_not_fit(model: Any, sizes: Any, said: str) -> None:
    batch = replace(tiny.make_batch(model, "ttIttItt"), sizes=sizes)
    with tiny.watching(model.vision) as (forwards,), pytest.raises(ValueError, match=said):
        generate(model, batch, max_new_tokens=1)
    assert not forwards


def test_the_border_is_where_a_padded_picture_shows_nothing() -> None:
    """Pixel by pixel: a white picture on a black square of the longer side."""
    config = tiny_config()
    for width, height in ((400, 300), (300, 400), (100, 400), (401, 77), (640, 427), (9, 9)):
        side = max(width, height)
        square = np.zeros((side, side), dtype=bool)
        left, top = (side - width) // 2, (side - height) // 2
        square[top : top + height, left : left + width] = True
        edges = [side * i / 24 for i in range(25)]
        lines = square.any(1) if width > height else square.any(0)
        empty = [not lines[int(a) : int(np.ceil(b))].any() for a, b in pairwise(edges)]
        first, last = border_lines(width, height, config)
        assert empty == [i < first or i >= 24 - last for i in range(24)]
    assert border_lines(400, 300, config) == (3, 3)


def tiny_config() -> Any:
    return replace(Picture(2).model.config.vision, image_size=336, patch_size=14)


def test_border_drops_what_lies_in_it(model: Any) -> None:
    batch = tiny.make_batch(model, "ttIttItItt")
    across, along = [0, 1, 2, 3, 12, 13, 14, 15], [0, 3, 4, 7, 8, 11, 12, 15]
    N, starts = 16, (2, 20, 37)
    for sizes, gone in (
        ([(400, 100, "pad"), (100, 400, "pad"), (5, 5, "pad")], [across, along, []]),
        ([(400, 100, "crop"), (100, 400, "pad"), (2, 8, "pad")], [[], along, along]),
        (None, [[], [], []]),
    ):
        expected = [
            start + p for start, out in zip(starts, gone, strict=True) for p in range(N)
            if p not in out
        ]  # fmt: skip
        for scope in ("image", "all"):
            plan = parse_plan(f"border:scope={scope}")
            result = generate(model, replace(batch, sizes=sizes), plan, 1)
            assert result.report.kept[0].positions == [expected]


def test_mmtok_takes_the_border_last(model: Any) -> None:
    batch = replace(tiny.make_batch(model, "ttItt"), sizes=[(400, 100, "pad")])
    inside = {2 + p for p in range(4, 12)}
    for keep in (5, 8, 11):
        result = generate(model, batch, parse_plan(f"mmtok:keep={keep}"), 1)
        kept = set(result.report.kept[0].positions[0])
        assert len(kept) == keep
        assert kept <= inside if keep <= 8 else inside <= kept


# ---------------------------------------------------------------- options and refusals


def test_published_counts() -> None:
    def left(plan: str) -> tuple[int, ...]:
        return parse_plan(plan).methods[0].left(576)

    assert left("v2drop") == (288, 144, 1)
    assert left("nuwa-64") == (112, 16)
    assert left("nuwa-128") == (224, 32)
    assert left("nuwa-192") == (336, 48)
    assert left("nuwa:keep=200,cell=1") == (144, 21)  # a cell gives one
    assert left("apet-64") == (96, 32)
    assert left("apet:keep=192") == (192, 64)
    for budget, keep in ((192, (300, 200, 118)), (128, (238, 108, 60)), (64, (66, 34, 20))):
        assert left(f"sparsevlm-plus-{budget}") == keep
    assert left("sparsevlm:version=2") == (300, 200, 118)
    solved = parse_plan("v2drop:average=192").resolve(32, 576).methods[0]
    assert solved.left(576) == (270, 126, 1)  # the last ratio stays 0
    assert abs(average_entering(solved, 32, 576) - 192) < 0.2
    assert left("ivcprune") == (6 + 115 + 29 + 29,)  # at most
    assert left("autoprune:depth=3") == (160, 160)  # at most
    assert left("vlmpruner") == (128,)
    assert left("gprune:keep=0.23")[0] == 132  # cut, not rounded
    for name in ("nuwa-64", "nuwa-128", "nuwa-192", "apet-64"):
        (method,) = parse_plan(name).methods
        assert average_entering(method, 32, 576) == int(name.rpartition("-")[2])
        assert PRESETS[name].source


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("sparsevlm:heads=3", "heads=3 is an option of version=2"),
        ("sparsevlm:version=3", "version=3 must be from 1 to 2"),
        ("v2drop:layers=2/4,ratios=0.5", "give one for each layer"),
        ("v2drop:layers=2,ratios=1.5", "ratios=1.5 must be from 0 to 1"),
        ("mustdrop:layers=4/2", "layers=4/2 must ascend"),
        ("mustdrop:merge=2", "merge=2 must be from -1 to 1"),
        ("mustdrop:mode=mask", "needs a method that only drops"),
        ("fastervlm:keep=3,blocks=3-", "must be a whole number"),
        ("fastervlm:keep=3,blocks=5-3", "5-3 must ascend"),
        ("vlmpruner:pivots=0", "pivots=0 must be 1 or more"),
        ("vlmpruner:mode=mask", "needs a method that only drops"),
        ("ivcprune:layer=0", "layer=0 must be 1 or more"),
        ("ivcprune:foreground=2.5", "a share from 0.0 to 1.0"),
        ("autoprune:depth=1", "depth=1 must be 2 or more"),
        ("scope:keep=3,combine=max", "must be one of multi, add"),
        ("fastv:mode=mask,cache=all", "mode=mask drops nothing; use cache=drop"),
        ("fastv:cache=some", "must be one of drop, all"),
    ],
)
def test_what_a_plan_cannot_say(plan: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        parse_plan(plan)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("sparsevlm:version=2,layers=1/2/3,keep=9/8/7", "heads=14 heads, but the decoder has 4"),
        ("sparsevlm:version=2,layers=1/2/3,keep=9/8/7,heads=5", "heads=5 heads"),
        ("mustdrop:layers=1/2", "windows of 3 x 3 patches, but there are 4 x 4"),
        ("prunesid:keep=3", "keep=3 is 3 rows with the class token; give at least 4"),
        ("apet:keep=9,layer=2,final=3", "basis=10 rows take the places of 9 that stay"),
        ("apet:keep=9,layer=2,final=3,basis=2,first=3", "must name a row for each of 2 stages"),
        ("apet:keep=9,layer=2,final=3,basis=2,first=3/9", "there are 9 rows in stage 1"),
        ("apet:keep=9", "apet: layer=16, but the decoder has layers 0 to 3"),
        ("nuwa:keep=9,layer=0,final=3", "nuwa: layer=0 must be 1 or more"),
        ("nuwa:keep=4,layer=2,final=5", "final=5 is more than the 4 tokens of keep"),
        ("fastervlm:keep=3,blocks=4-11", "blocks names 11, but the vision tower has blocks 0 to 9"),
        ("uniform:keep=3,cache=all", "cache=all is for methods inside the decoder"),
        ("v2drop", "layer=17, but the decoder has layers 0 to 3"),
        ("v2drop:layers=1/2/3,average=3", "the nearest is average=4.8 (ratios=0.0078/0.0078/0.0"),
        ("ivcprune:layer=2,average=9", "depends on the images; python -m eval.fit ivcprune:aver"),
        ("prumerge:average=9", "average=9 depends on the images"),
        ("autoprune", "depth=32, but the decoder has 4 layers; give depth=4"),
        ("autoprune:depth=4,target=17", "target=17, but there are 16 image tokens"),
        ("ivcprune:layer=4", "layer=4, but the decoder has layers 0 to 3"),
        ("vlmpruner:layer=2,keep=17", "keep=17, but there are 16 image tokens"),
    ],
)
def test_what_a_model_cannot_do(model: Any, plan: str, said: str) -> None:
    with (
        tiny.watching(model.vision) as (forwards,),
        pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error,
    ):
        generate(model, tiny.make_batch(model, "ttItt"), parse_plan(plan), 1)
    assert said in str(error.value)
    assert not forwards


def test_small_towers_and_models_without_words_are_refused(tmp_path: Any) -> None:
    tiny.write_hf(tmp_path, vision_layers=2, image_size=84)
    model = load(tmp_path)[0]
    batch, model.tokenizer = tiny.make_batch(model, "ttItt"), None
    for plan, said in (
        ("flowcut:keep=4", "flowcut drops after a block that another one follows"),
        ("mmtok:keep=4", "mmtok reads the question's words"),
    ):
        with pytest.raises(ValueError, match=said):
            generate(model, batch, parse_plan(plan), 1)
    one = load(write_one_block(tmp_path))[0]
    with pytest.raises(ValueError, match="mustdrop needs a vision tower that goes on"):
        generate(one, tiny.make_batch(one, "ttItt"), parse_plan("mustdrop:layers=1"), 1)


def write_one_block(folder: Any) -> Any:
    tiny.write_hf(folder, vision_layers=1, image_size=84)
    tiny.rewrite_config(folder, lambda config: config.update(vision_feature_layer=-1))
    return folder


def test_more_directions_than_channels_are_refused(tmp_path: Any) -> None:
    tiny.write_hf(tmp_path, image_size=168)  # 144 tokens, 24 channels
    model = load(tmp_path)[0]
    with pytest.raises(ValueError, match="keep=100 needs 25 groups, but the features have 24"):
        generate(model, tiny.make_batch(model, "ttItt"), parse_plan("prunesid:keep=100"), 1)


@pytest.mark.parametrize(
    "plan", ["scope:keep=0", "mmtok:keep=0", "flowcut:keep=0", "nuwa:keep=0,final=0"]
)
def test_keeping_nothing_is_the_plain_text(model: Any, plan: str) -> None:
    batch = tiny.make_batch(model, "ttItt", "tIttIt")
    expected = generate(model, batch, parse_plan("uniform:keep=0"), 2, output_logits=True)
    result = generate(model, batch, parse_plan(plan + ",positions=original"), 2, output_logits=True)
    assert result.report.kept[0].positions == [[], []]
    tiny.assert_close(result.logits, expected.logits)


def test_apets_basis_rows_have_no_error_and_stay_in_reading_order(model: Any) -> None:
    """What rounding leaves of their errors differs from machine to machine."""
    plan = parse_plan("apet:keep=14,basis=4,first=5,final=0")
    (kept,) = generate(model, tiny.make_batch(model, "ttItt"), plan, 1).report.kept
    basis = [2 + i for i, score in enumerate(kept.scores[0]) if score == 0.0]
    assert len(basis) == 4
    assert sorted({*range(2, 18)} - {*kept.positions[0]}) == basis[2:]


@pytest.mark.parametrize("plan", ["prunesid:keep=12", "apet:keep=6,basis=2,final=0"])
def test_draws_come_from_the_seed_or_from_what_is_given(model: Any, plan: str) -> None:
    batch = tiny.make_batch(model, "ttItt")
    encoded = encode_images(model, batch, parse_plan(plan))

    def kept(options: str, seed: int) -> Any:
        result = generate(model, batch, parse_plan(plan + options), 1, encoded, seed=seed)
        return result.report.kept[0].positions

    given = ",seed=3" if plan.startswith("prunesid") else ",first=7"
    assert kept(given, 0) == kept(given, 1)
    assert len({str(kept("", seed)) for seed in range(12)}) > 1
