"""What rows see: the weights are those of transformers, only the rows asked for are computed, and
the pictures say what the numbers say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval import attention as command
from eval.attention import attention
from eval.attention_figure import Shown, View, draw_attention, draw_map, format_table
from eval.watch import BOS, IMAGE, KINDS, Seen, find_sinks, watch
from minillava import Batch, load, parse_plan
from minillava.generate import generate
from minillava.pruning.base import Plan
from minillava.rows import GENERATED, TEXT

DEMO = Path(__file__).parents[2] / "weights" / "demo"
NEW = 4
PROMPT = "ttItttt"  # BOS, a token, 16 patches, and 4 tokens of which the last is the newest
T = 22


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model, and transformers' module with the same weights and eager attention."""
    from transformers import LlavaForConditionalGeneration as Llava

    folder = tiny.write_folder(tmp_path_factory)
    return load(folder)[0], Llava.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def model(both: tuple[Any, Any]) -> Any:
    return both[0]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, Image.Image, Batch]:
    model, processor = load(DEMO)
    picture = Image.open(DEMO / "example.png")
    batch = processor([processor.prompt("What digit is red?", 1)], images=[[picture]])
    return model, processor, picture, batch


@torch.inference_mode()
def test_weights_equal_those_of_transformers(both: tuple[Any, Any]) -> None:
    model, reference = both
    batch = tiny.make_batch(model, PROMPT)
    rows = [2, 7, T - 1, T, T + 2]  # text, patch, newest, answer
    result, seen = watch(model, batch, [[row] for row in rows] + [rows[2:]], None, NEW)
    ids = torch.cat((batch.ids, torch.tensor(result.tokens)), 1)
    maps = reference(
        input_ids=ids, pixel_values=batch.pixels, output_attentions=True
    ).attentions  # [layer] (1, H, T + NEW, T + NEW)
    assert len(seen) == len(maps) == 4
    for layer, theirs in zip(seen, maps, strict=True):
        for group, row in zip(layer, rows, strict=False):
            torch.testing.assert_close(group.weights, theirs[0, :, row], atol=2e-6, rtol=1e-4)
            assert group.visible.tolist() == [t <= row for t in range(T + NEW)]
        mean = theirs[0][:, rows[2:]].mean(1)
        torch.testing.assert_close(layer[-1].weights, mean, atol=2e-6, rtol=1e-4)
    kinds = ["BOS", "system", *["image"] * 16, *["instruction"] * 4, *["answer"] * NEW]
    assert [KINDS[k] for k in seen[0][0].kind] == kinds


def test_the_answer_is_the_same_bit_for_bit(model: Any) -> None:
    batch, plan = tiny.make_batch(model, PROMPT), parse_plan("fastv:k=1,r=0.5")
    options = {"max_new_tokens": NEW, "output_logits": True}
    result, _ = watch(model, batch, [range(T)], plan, **options)
    assert torch.equal(result.logits, generate(model, batch, plan, **options).logits)


@pytest.mark.parametrize("text", ["fastv:k=2,r=0.5", "fastv:k=2,r=0.5,cache=all", "vtw:layer=2"])
def test_dropped_rows_are_absent(model: Any, text: str) -> None:
    batch = tiny.make_batch(model, PROMPT)
    result, seen = watch(model, batch, [[T - 1, T], [7]], parse_plan(text), 2)
    kept = result.report.kept[0].positions[0]
    for layer, (group, _) in enumerate(seen):
        left = range(2, 18) if layer < 2 else kept
        # the answer's row does not see what was cut from the cache, the newest row does
        there = group.visible & (group.kind == IMAGE)
        assert there.nonzero()[:, 0].tolist() == list(left)
        torch.testing.assert_close(group.weights.sum(1), torch.ones(4))
        grid = group.of_image(0, group.weights, float("nan"))
        assert grid.isnan().sum() == 4 * (16 - len(left))
    gone = 7 not in kept
    assert [group.n_rows for _, group in seen] == [1, 1, 1 - gone, 1 - gone]


def test_masked_weights_equal_dropped_ones(model: Any) -> None:
    batch = tiny.make_batch(model, PROMPT)
    for layer in range(4):
        drop, mask = (
            attention(model, batch, layer, plan=parse_plan(f"fastv:k=2,r=0.5{mode}")).weights
            for mode in ("", ",mode=mask")
        )
        torch.testing.assert_close(drop, mask, equal_nan=True)


@pytest.mark.parametrize("text", [None, "fastv:k=2,r=0.5,mode=mask", "divprune:keep=5"])
def test_a_sample_of_a_batch_is_seen_as_if_it_were_alone(model: Any, text: str | None) -> None:
    batch = tiny.make_batch(model, "tItt", "ttIItttIt", "ttt")
    alone, plan = tiny.alone(model, batch, 1), parse_plan(text)
    n = int(batch.mask[1].sum())
    groups = [[n - 1], [n, n + 1]]
    _, together = watch(model, batch, groups, plan, NEW, sample=1)
    _, single = watch(model, alone, groups, plan, NEW)
    for a, b in zip(together, single, strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one.weights, other.weights, atol=1e-5, rtol=1e-4)
            assert torch.equal(one.visible, other.visible)
            assert torch.equal(one.kind, other.kind)


def test_rows_that_a_method_added_count_for_the_image(model: Any) -> None:
    batch = tiny.make_batch(model, PROMPT)
    _, seen = watch(model, batch, [[T - 1], [T]], tiny.example("prumerge-plus"), 2)
    (newest, answer) = seen[0]
    assert [newest.n_rows, answer.n_rows] == [1, 1]
    no_patch = newest.visible & (newest.image >= 0) & (newest.patch < 0)
    assert (newest.kind[no_patch] == IMAGE).all()
    torch.testing.assert_close(answer.by_kind(answer.weights).sum(1), torch.ones(4))


def test_bos_can_be_left_out(model: Any) -> None:
    grid = attention(model, tiny.make_batch(model, PROMPT), 2)
    seen = grid.seen
    factor = (1 - seen.weights[:, BOS]).reciprocal()
    expected = grid.weights * factor[:, None, None]
    torch.testing.assert_close(grid.view(head=3, bos=False), expected[3])
    torch.testing.assert_close(grid.view(bos=False), expected.mean(0))
    assert grid.shares(bos=False)["BOS"] == 0
    assert sum(grid.shares(bos=False).values()) == pytest.approx(1)
    assert grid.shares()["BOS"] > 0


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Records the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_full_map_is_made_even_if_all_rows_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    n = 4096
    shape = {"heads": 1, "kv_heads": 1, "layers": 2, "width": 16, "positions": 2 * n}
    model = tiny.write_model(tmp_path_factory, **shape)
    batch = tiny.make_batch(model, "t" * 2000 + "I" + "t" * (n - 2016))
    with Largest() as largest:
        watch(model, batch, [range(n + 2)], None, 3)
    assert 0 < largest.elements < n * n / 4


# ---------------------------------------------------------------- sinks


def test_sinks_are_large_where_bos_is() -> None:
    x = torch.ones(5, 1000)
    x[0, 7] = x[1, 7] = x[4, 8] = 1000.0  # row 4: another dimension than BOS
    x[2, 7] = -1000.0
    x[3, 7] = 15.0
    assert find_sinks(x).tolist() == [True, True, True, False, False]
    x[0, 7] = 1.0
    assert not find_sinks(x).any()


def crafted(n: int = 144, gone: Sequence[int] = ()) -> Seen:
    """BOS, an image of n patches with weights 0, 1, 2, ..., and one more row."""
    weights = torch.arange(n + 2.0) / 100_000
    weights[0] = 0.5
    weights[-1] = 1 - weights[:-1].sum()
    visible, sinks = torch.ones(n + 2, dtype=torch.bool), torch.zeros(n + 2, dtype=torch.bool)
    visible[[g + 1 for g in gone]] = False
    weights[~visible] = 0.0
    sinks[[n - 1, n]] = True
    image = torch.tensor([TEXT, *[0] * n, GENERATED])
    patch = torch.tensor([-1, *range(n), -1])
    kind = torch.tensor([BOS, *[IMAGE] * n, 4])
    return Seen(3, 1, n, weights[None], visible, image, patch, kind, sinks)


def test_the_map_shows_weights_sinks_and_absent_patches(demo: Any) -> None:
    model, _, picture, _ = demo
    seen = crafted(gone=[5, 6])
    frame = Shown(model.config, [picture]).frame(0, 0.0)
    panel = draw_map(frame, View(seen, seen.weights[0]), 0, "row")
    boxes = [shape for shape in panel.shapes if getattr(shape, "tags", None)]
    by_class: dict[str, list[int]] = {}
    for box in boxes:
        by_class.setdefault(box.tags["class"], []).append(box.tags["data-patch"])
    assert by_class["absent"] == [5, 6]
    assert by_class["sink"] == [142, 143]
    assert by_class["seen"] == [p for p in range(144) if p not in (5, 6, 142, 143)]
    fills = {box.tags["data-patch"]: box.fill for box in boxes}
    assert (
        fills[141] == fills[142] == fills[143] == (254, 232, 56)
    )  # the scale ends below the sinks
    assert fills[0] != fills[30] != fills[141]
    words = " ".join(shape.text for shape in panel.shapes if hasattr(shape, "text"))
    assert "2 sinks" in words
    assert "0.0014" in words


def test_the_table_compares_with_an_even_share() -> None:
    seen = crafted(64)
    even = View(seen, torch.full((66,), 1 / 66))
    assert format_table([even]).endswith("| 1.5 | 0.0 | 97.0 | 0.0 | 1.5 | 1.00 |")
    without = seen.without_bos(even.weights[None])[0]
    assert format_table([View(seen, without, bos=False)]).endswith("| 98.5 | 0.0 | 1.5 | 1.00 |")


def test_a_grid_draws_itself(demo: Any) -> None:
    model, _, picture, batch = demo
    grid = attention(model, batch, 4)
    assert grid.weights.shape == (4, 12, 12)
    assert grid.sinks.shape == (12, 12)
    drawn = grid.draw(picture)
    assert isinstance(drawn, Image.Image)
    assert "not cause" in drawn.info["Description"]
    assert "row 156, layer 4" in drawn.info["Description"]


def test_a_drawing_has_all_pictures_layers_and_groups(model: Any) -> None:
    batch = tiny.make_batch(model, "tIItt")
    _, seen = watch(model, batch, [[34], [33, 34]], Plan(), 1)
    views = {
        name: [View(layer[g], layer[g].weights.mean(0)) for layer in seen]
        for g, name in enumerate(("newest", "both"))
    }
    shown = Shown(model.config, [Image.new("RGB", (90, 40), c) for c in ("red", "blue")], "crop")
    svg = draw_attention(shown, views, [0, 3], [], {}).svg()
    assert len(re.findall('class="seen"', svg)) == 2 * 2 * 2 * 16  # groups, layers, pictures
    assert svg.count("by kind of token") == 2
    shares = [float(x) for x in re.findall('data-share="([^"]+)"', svg)]
    assert len(shares) > 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layer": 12}, "layer=12 must be from 0 to 11"),
        ({"layer": 1, "image": 1}, "image=1: the prompt has 1 images"),
        ({"layer": 1, "rows": []}, "must be one row or more"),
        ({"layer": 1, "rows": "answer"}, "rows='answer' must be one row or more, by numbers"),
        ({"layer": 1, "rows": -158}, "from -157"),
        ({"layer": 1, "rows": 199}, "there is no row 199: 157 are the prompt's, 1 the answer's"),
        ({"layer": 1, "sample": 1}, "sample=1 must be from 0 to 0"),
    ],
)
def test_rows_that_are_not_there_are_refused(demo: Any, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        attention(demo[0], demo[3], **given)
    with pytest.raises(ValueError, match="head=4 must be from 0 to 3"):
        attention(demo[0], demo[3], 1).view(head=4)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_command_draws_and_prints(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"a.{suffix}"
    options = ["--of", "word:red", "answer:1", "question", "4-9", "--layers", "2", "7"]
    assert command.main(["--out", str(out), *options, "--prune", "fastv:k=4,keep=9"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("answer: ")
    for name in ("token 153, ' red'", "answer token 1", "question", "tokens 4 to 9, of an image"):
        assert f"\n{name}: % of the attention, mean of all heads\n" in printed
    if suffix == "png":
        info = Image.open(out).info
        assert "--layers 2 7" in info["Command"]
        assert "not cause" in info["Description"]
    else:
        text = out.read_text("utf-8")
        # from layer 4 on there are 9 patches, in maps of 3 groups; rows 4 to 9 may be gone
        assert text.count('class="absent"') >= 3 * 135
        assert "attention, not cause" in text


def test_the_command_lists_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "1\t' USER'"
    assert "4-147\tof an image" in lines
    assert lines[-1] == "156\t':'"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--of foo", "--of 'foo' must be one of newest"),
        ("--of 157", "--of 157: the prompt's tokens are 0 to 156"),
        ("--of 9-8", "--of 9-8: the prompt's tokens"),
        ("--of word:blue", "--of word:blue: the prompt's text does not contain it"),
        ("--of answer:2", "--of answer token 2: the answer has tokens 0 to 1"),
        ("--of answer:48", "at most 48 new tokens"),
        ("--layers 12", "--layers 12: the decoder has layers 0 to 11"),
        ("--head 4", "--head 4 must be from 0 to 3"),
        ("--prune fastv:k=13", "fastv: layer=13"),
        ("--prompt x", "--prompt 'x' has no image"),
        ("--image x.png", "--image x.png has no question"),
        ("--out a.jpg", "--out a.jpg must be a file"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--out", str(tmp_path / "a.png"), *options.split()]
    assert command.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not list(tmp_path.iterdir())


def test_a_picture_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "--out FILE is missing" in capsys.readouterr().err
