"""TRIM and CDPruner, and the CLIP text tower that they use, on a small random open_clip model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference_decoder as reference
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

import minillava
from minillava import Batch, parse_plan
from minillava.generate import Result, generate
from minillava.pruning import cdpruner, trim
from minillava.pruning.clip_text import ClipText, load_clip, question

N, WIDTH = 64, 24  # patches per image, width of the vision tower
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("eight")
    tiny.write_hf(folder, layers=2, image_size=112, vision_layers=3, seed=5)
    return minillava.load(folder)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipText:
    return load_clip(str(folder), CPU)


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    return tiny.make_batch(model, "tttIttttttt", "tIIttttttttttt", seed=2)


def encoded_text(clip: ClipText, ids: list[int]) -> Tensor:
    """The text embedding (E,) of 77 ids, taken at the largest id; computed from the weights."""
    parts: Any = clip.model
    with torch.no_grad():
        x = parts.token_embedding(torch.tensor([ids])) + parts.positional_embedding
        later = torch.full((77, 77), -torch.inf).triu(1)
        x = parts.ln_final(parts.transformer(x, attn_mask=later))
        return x[0, ids.index(max(ids))] @ parts.text_projection


def common_space(clip: ClipText, features: Tensor) -> Tensor:
    """Patches (n, C) -> (n, E), computed from the weights."""
    visual: Any = clip.model.visual
    x = features - features.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + visual.ln_post.eps).sqrt()
    return (x * visual.ln_post.weight + visual.ln_post.bias) @ visual.proj


def pictures(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Patch features before the projector (images, N, C) and after it (images, N, D)."""
    assert batch.pixels is not None
    layer = model.feature_layer
    seen = model.encode(batch.pixels, {layer})[layer][:, 1:]
    return seen, model.projector(seen)


def ids_of(clip: ClipText, model: Any, batch: Batch, b: int) -> list[int]:
    """CLIP's ids, with start and end token, of the text after the last image."""
    row = batch.ids[b][batch.mask[b]].tolist()
    behind = row[len(row) - row[::-1].index(tiny.IMAGE) :]
    text = question(model.tokenizer.decode(behind))
    return [49406, *clip.tokenizer.encode(text), 49407]


def run(model: Any, batch: Batch, plan: str) -> Result:
    return generate(model, batch, parse_plan(plan), 1, output_logits=True)


def kept_patches(result: Result) -> list[list[int]]:
    """Kept patches of each image, in the order of the batch."""
    (kept,) = result.report.kept
    images = []
    for positions, starts in zip(kept.positions, result.starts, strict=True):
        images += [[p - s for p in positions if s <= p < s + N] for s in starts]
    return images


# ---------------------------------------------------------------- the methods


@pytest.mark.parametrize("keep", ["", "keep=20,", "keep=0.37,"])
def test_trim_keeps_what_is_written_out(
    model: Any, batch: Batch, clip: ClipText, keep: str
) -> None:
    result = run(model, batch, f"trim:{keep}clip={clip.source}")
    seen, _ = pictures(model, batch)
    number = {"": None, "keep=20,": 20, "keep=0.37,": 23}[keep]  # int(64 * 0.37), not round
    expected = []
    for image, b in enumerate((0, 1, 1)):
        ids = ids_of(clip, model, batch, b)
        text = encoded_text(clip, ids + [0] * (77 - len(ids)))
        expected.append(reference.trim(common_space(clip, seen[image]), text, number))
    assert kept_patches(result) == expected
    assert result.report.kept[0].extra == [1, 2]
    left = [len(expected[0]) + 1, len(expected[1]) + len(expected[2]) + 2]
    assert result.report.image_tokens_entering[0] == left
    assert result.report.next_position == result.report.tokens_entering[0]


def test_trims_extra_row_is_the_mean_of_the_dropped(
    model: Any, batch: Batch, clip: ClipText, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tiny.choices(monkeypatch, trim.TRIM)
    run(model, batch, f"trim:keep=20,clip={clip.source}")
    features, _ = pictures(model, batch)
    assert len(seen) == 3
    for (_, keep), patches in zip(seen, features, strict=True):
        dropped = [patches[i] for i in range(N) if i not in keep.index.tolist()]
        assert len(dropped) == 44
        assert keep.merged is None
        assert not keep.extra_first
        assert keep.extra is not None
        tiny.assert_close(keep.extra, torch.stack(dropped).mean(0)[None])


@pytest.mark.parametrize("keep", [5, 20])
def test_cdpruner_keeps_what_is_written_out(
    model: Any, batch: Batch, clip: ClipText, keep: int
) -> None:
    result = run(model, batch, f"cdpruner:keep={keep},clip={clip.source}")
    seen, projected = pictures(model, batch)
    expected = []
    for image, b in enumerate((0, 1, 1)):
        ids = ids_of(clip, model, batch, b)
        text = encoded_text(clip, ids + [0] * (77 - len(ids)))[None]
        patches = common_space(clip, seen[image])
        expected.append(reference.cdpruner(projected[image], patches, text, keep))
    assert kept_patches(result) == expected
    assert result.report.kept[0].extra == [0, 0]
    assert result.report.next_position == result.report.tokens_entering[0]


def test_cdpruner_after_another_method(model: Any, batch: Batch, clip: ClipText) -> None:
    """The relevance of the remaining tokens is that of their own patches."""
    one = tiny.alone(model, batch, 0)
    result = run(model, one, f"random:keep=30+cdpruner:keep=9,clip={clip.source}")
    ((left,), (kept,)) = (k.positions for k in result.report.kept)
    (start,) = result.starts[0]
    rows = torch.tensor(left) - start
    seen, projected = pictures(model, one)
    ids = ids_of(clip, model, one, 0)
    text = encoded_text(clip, ids + [0] * (77 - len(ids)))[None]
    patches = common_space(clip, seen[0, rows])
    expected = reference.cdpruner(projected[0, rows], patches, text, 9)
    assert kept == [left[i] for i in expected]


def test_one_budget_over_all_pictures(model: Any, batch: Batch, clip: ClipText) -> None:
    result = run(model, batch, f"cdpruner:keep=9,scope=all,clip={clip.source}")
    assert [len(p) for p in result.report.kept[0].positions] == [9, 9]
    with pytest.raises(ValueError, match="only drops"):
        parse_plan("trim:scope=all")


def test_cdpruner_refuses_a_kernel_that_is_no_number(
    model: Any, batch: Batch, clip: ClipText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClipText, "segments", lambda self, text: torch.full((1, 12), torch.nan))
    with pytest.raises(ValueError, match="NaN in the kernel of the embed stage"):
        run(model, batch, f"cdpruner:keep=9,clip={clip.source}")


@pytest.mark.parametrize("seed", range(5))
def test_greedy_steps_are_the_largest_determinants(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, patches, text = (torch.randn(n, 24, generator=generator) for n in (30, 30, 3))
    kernel = cdpruner.relevance(patches, text)[:, None] * torch.nn.functional.normalize(rows)
    ours = cdpruner.choose_greedily(kernel @ kernel.T, 15).order.sort().values.tolist()
    assert ours == reference.cdpruner(rows, patches, text, 15)


def test_greedy_goes_on_when_the_rank_is_used_up() -> None:
    rows = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    chosen = cdpruner.choose_greedily(rows @ rows.T, 12).order
    assert sorted(chosen.tolist()) == list(range(12))
    assert sorted(i % 3 for i in chosen[:3].tolist()) == [0, 1, 2]


def test_equally_relevant_patches() -> None:
    assert torch.equal(cdpruner.relevance(torch.ones(4, 3), torch.randn(2, 3)), torch.ones(4))


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_outliers_are_counted_as_written_out(seed: int, spread: float) -> None:
    patches = spread * torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))
    text = torch.randn(8, generator=torch.Generator().manual_seed(seed + 50))
    ours, _ = trim.count_outliers(patches @ text)
    assert ours == len(reference.trim(patches, text, None))
    assert ours > 5


def test_rows_without_a_patch_have_no_relevance(model: Any, batch: Batch, clip: ClipText) -> None:
    plan = f"trim:keep=20,clip={clip.source}+cdpruner:keep=9,clip={clip.source}"
    with pytest.raises(ValueError, match=r"trim\+cdpruner: .* leaves rows that are no patches"):
        run(model, batch, plan)


# ---------------------------------------------------------------- text


def test_a_long_text_is_cut_or_taken_in_pieces(clip: ClipText) -> None:
    text = " ".join(f"word{i} and some" for i in range(60))
    ids = [49406, *clip.tokenizer.encode(text), 49407]
    assert 154 < len(ids) <= 308
    cut = encoded_text(clip, [*ids[:76], 49407])
    tiny.assert_close(clip.truncated(text), cut[None])
    pieces = [ids[i : i + 77] for i in range(0, len(ids), 77)]
    pieces[-1] += [0] * (77 - len(pieces[-1]))
    expected = torch.stack([encoded_text(clip, piece) for piece in pieces])
    tiny.assert_close(clip.segments(text), expected)
    assert not torch.allclose(expected[0], cut, atol=1e-2)  # the first piece has no end token
    tiny.assert_close(clip.segments("a red digit"), clip.truncated("a red digit"))


def test_patches_in_the_common_space(clip: ClipText) -> None:
    x = torch.randn(7, WIDTH)
    tiny.assert_close(clip.patches(x), common_space(clip, x))


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("\nWhat digit is red? ASSISTANT:", "What digit is red?"),
        ("What digit is red? ASSISTANT: ", "What digit is red?"),
        ("What digit is red?", "What digit is red?"),
        ("\nIs it? Answer the question using a single word or phrase. ASSISTANT:", "Is it?"),
        ("Is it?\nAnswer the question using a single word or phrase.", "Is it?"),
        ("ASSISTANT: is a word. ASSISTANT:", "ASSISTANT: is a word."),
    ],
)
def test_the_question_is_what_stands_in_the_template(text: str, asked: str) -> None:
    assert question(text, cdpruner.BRIEF) == asked
    assert (question(text) == asked) == ("Answer" not in text)


@pytest.mark.parametrize(
    ("plan", "asked"),
    [
        ("trim:keep=5", "Is it?\nAnswer the question using a single word or phrase."),
        ("cdpruner:keep=5", "Is it?"),
    ],
)
def test_the_template_is_not_asked(
    model: Any, batch: Batch, clip: ClipText, monkeypatch: pytest.MonkeyPatch, plan: str, asked: str
) -> None:
    texts: list[str] = []

    def noting(self: ClipText, text: str) -> Tensor:
        texts.append(text)
        return torch.ones(1, 12)

    monkeypatch.setattr(ClipText, "truncated", noting)
    monkeypatch.setattr(ClipText, "segments", noting)
    behind = "\nIs it?\nAnswer the question using a single word or phrase. ASSISTANT:"
    monkeypatch.setattr(type(model.tokenizer), "decode", lambda self, ids: behind)
    run(model, tiny.alone(model, batch, 0), f"{plan},clip={clip.source}")
    assert texts == [asked]


# ---------------------------------------------------------------- where the weights come from


def test_keeping_everything_needs_no_clip(model: Any, batch: Batch) -> None:
    plain = generate(model, batch, None, 1, output_logits=True)
    for name in ("trim", "cdpruner"):
        for keep in ("1.0", N):
            kept = run(model, batch, f"{name}:keep={keep},clip=gone")
            assert torch.equal(kept.logits, plain.logits)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gone", "clip=gone is not a folder, file or model of open_clip; give clip=FOLDER"),
        ("ViT-Z/openai", "is not a folder, file or model of open_clip"),
        ("ViT-L-14-336/nonsense", "is not a known tag or valid file path"),
        ("hf-hub:org/none", "cannot load clip=hf-hub:org/none ("),
    ],
)
def test_weights_that_cannot_be_had(
    model: Any,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    caplog: Any,
    source: str,
    said: str,
) -> None:
    """The error is one line and comes before any forward; nothing is printed or logged."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for plan in (f"trim:clip={source}", f"cdpruner:keep=5,clip={source}"):
        with (
            tiny.watching(model.vision) as (forwards,),
            pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error,
        ):
            run(model, batch, plan)
        assert said in str(error.value)
        assert "; give clip=FOLDER" in str(error.value)
        assert not forwards
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_file_of_weights(
    folder: Path, clip: ClipText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of weights has the architecture ViT-L/14; a small one stands in for it here."""
    import open_clip

    shape = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-of-tests.json").write_text(json.dumps(shape))
    open_clip.add_model_config(tmp_path / "tiny-of-tests.json")
    monkeypatch.setattr("minillava.pruning.clip_text.ARCHITECTURE", "tiny-of-tests")
    loaded = load_clip(str(folder / "open_clip_model.safetensors"), CPU)
    assert torch.equal(loaded.truncated("a red digit"), clip.truncated("a red digit"))
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    for source, said in ((tmp_path, "config file missing"), (other, "Error(s) in loading")):
        with pytest.raises(ValueError, match=r"\Acannot load clip=[^\n]*\Z") as error:
            load_clip(str(source), CPU)
        assert said in str(error.value)


def test_another_models_clip(model: Any, batch: Batch, tmp_path: Path) -> None:
    source = tiny.write_clip(tmp_path, 2 * WIDTH)
    with pytest.raises(ValueError, match="image tower of width 48, this model's is 24 wide"):
        run(model, batch, f"trim:keep=5,clip={source}")


def test_weights_are_read_once(folder: Path, clip: ClipText) -> None:
    assert load_clip(str(folder), CPU) is load_clip(str(folder), CPU)
    assert sum(p.numel() for p in clip.model.parameters()) > 49408 * 16
