"""weights.quantise stores what load() would make, and can be interrupted and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import refusal

from minillava import load, parse_plan
from minillava.generate import generate
from minillava.loading.tensor_files import INDEX, SINGLE
from minillava.quant.integer import FbgemmLinear, Int8Linear
from minillava.quant.linear import kernel_works, weight_bytes
from weights import files as writer
from weights import quantise as module
from weights.files import PART
from weights.quantise import main, quantise

DEMO = Path(__file__).parents[2] / "weights" / "demo"
FORMS = {"int8": "int8", "int8-dynamic": "int8", "int4": "int4", "nf4": "nf4"}  # -> as stored
OPTIONS = {"int8": ["--bits", "8"], "int4": ["--bits", "4"], "nf4": ["--nf4"]}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with rows of 64 columns, which the kernels of all forms support."""
    folder = tmp_path_factory.mktemp("quantise") / "src"
    tiny.write_hf(folder, width=64, vision_layers=3)
    return folder


@pytest.fixture(scope="module")
def stored(src: Path) -> dict[str, Path]:
    folders = {form: src.with_name(form) for form in ("int8", "int4", "nf4")}
    for form, folder in folders.items():
        quantise(src, folder, form)
    return folders


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize(("form", "digits"), [("int8", 2), ("int8-dynamic", 1)])
def test_the_digits_of_activations(
    src: Path, stored: dict[str, Path], form: str, digits: int
) -> None:
    if not kernel_works("fbgemm"):
        pytest.skip("this torch lacks the kernel")
    for folder in (src, stored["int8"]):
        model = load(folder, quantize=form)[0]
        kinds = (Int8Linear, FbgemmLinear)
        layers = [m for m in model.llama.blocks.modules() if isinstance(m, kinds)]
        assert {layer.digits for layer in layers} == {digits}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_what_load_makes(src: Path, stored: dict[str, Path], form: str) -> None:
    at_load = load(src, quantize=form)[0]
    as_stored = load(stored[FORMS[form]], quantize=form)[0]
    batch = tiny.make_batch(at_load, "tttIttttt")
    a, b = (generate(m, batch, max_new_tokens=3, output_logits=True) for m in (at_load, as_stored))
    assert a.tokens == b.tokens
    assert a.logits is not None
    assert b.logits is not None
    assert torch.equal(a.logits, b.logits)
    named = load(stored[FORMS[form]])[0]  # the files determine the form
    assert type(named.llama.blocks[0].mlp.up_proj) is type(at_load.llama.blocks[0].mlp.up_proj)


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_gives_the_same_alone_and_in_a_batch(src: Path, form: str) -> None:
    model = load(src, quantize=form)[0]
    batch = tiny.make_batch(model, "tttIttttt", "tt", "ttIIt")
    plan = parse_plan("fastv:k=2,keep=5")
    together = generate(model, batch, plan, 3, output_logits=True)
    for b in range(3):
        alone = generate(model, tiny.alone(model, batch, b), plan, 3, output_logits=True)
        assert alone.tokens[0] == together.tokens[b]
        assert alone.logits is not None
        assert together.logits is not None
        # Attention, and layers that are widened, sum floats in another order in a batch, and that
        # can change the last digit of an activation by one.
        last_digit = 1 / 127 if form != "int8" else 1 / 127**2
        tiny.assert_close(together.logits[b], alone.logits[0], max(4 * last_digit, 5e-3))


@pytest.mark.parametrize("form", FORMS)
def test_dropped_rows_change_no_others(src: Path, form: str) -> None:
    model = load(src, quantize=form)[0]
    batch = tiny.make_batch(model, "tttIttttt")
    drop, mask = (
        generate(model, batch, parse_plan(f"divprune:keep=6,positions=original,mode={mode}"), 1,
                 output_logits=True).logits
        for mode in ("drop", "mask")
    )  # fmt: skip
    assert drop is not None
    assert mask is not None
    tiny.assert_close(drop, mask, 5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_nan(src: Path, form: str) -> None:
    model = load(src, quantize=form)[0]
    batch = tiny.make_batch(model, "tttIttttt")
    assert batch.pixels is not None
    batch.pixels[0, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="logits are not numbers"):
        generate(model, batch, max_new_tokens=1)


@pytest.mark.parametrize("form", FORMS)
def test_the_demo_answers_nearly_as_well(form: str, plain: float) -> None:
    assert accuracy(form) >= plain - 5


@pytest.fixture(scope="module")
def plain() -> float:
    return accuracy(None)


def accuracy(form: str | None) -> float:
    from eval import demo

    model, processor = load(DEMO, quantize=form)
    groups = demo.questions(processor, 7, 40, ["digit", "where", "count", "shape"])
    return demo.measure(model, processor, groups, "").scores()["all"].value


# ---------------------------------------------------------------- errors


def shard_with_index(folder: Path, **renamed: str) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    where = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    where[next(iter(where))] = renamed["file"]
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-100]), "is truncated"
    ),
    "outside": (lambda f: shard_with_index(f, file="../x.safetensors"), "'../x.safetensors'"),
    "missing": (lambda f: shard_with_index(f, file="gone.safetensors"), "names gone.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model"),
    "settings": (lambda f: (f / "preprocessor_config.json").write_text("{"), "is not valid json"),
    "sums": (
        lambda f: (f / "SHA256SUMS").write_text(f"{'0' * 64}  {SINGLE}\n"),
        f"{SINGLE} has SHA-256",
    ),
    "original": (
        lambda f: (f / "config.json").write_text('{"mm_hidden_size": 24}'),
        "write that with `python -m weights.convert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_broken_sources_are_one_line_and_nothing_is_written(
    src: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(src, tmp_path / "src")
    break_source, message = BAD[case]
    break_source(tmp_path / "src")
    capsys.readouterr()
    before = contents(tmp_path / "src")
    assert main([str(tmp_path / "src"), str(tmp_path / "dst"), "--bits", "8"]) == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "dst").exists()
    assert contents(tmp_path / "src") == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", OPTIONS)
def test_values_that_integers_cannot_represent_are_refused(
    src: Path, tmp_path: Path, value: float, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = shutil.copytree(src, tmp_path / "src"), tmp_path / "dst"
    state = load_file(src / SINGLE)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    state[name][5, 3] = value
    save_file(state, src / SINGLE, {"format": "pt"})
    capsys.readouterr()
    assert main([str(src), str(dst), *OPTIONS[form]]) == 2
    assert f"{name} has values that are not finite" in refusal(capsys)
    assert not list(dst.glob("*.safetensors*"))
    assert not (dst / "config.json").exists()
    with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
        load(src, quantize=form)


def test_rows_of_odd_length_stay_in_8_bits(src: Path, tmp_path: Path) -> None:
    shutil.copytree(src, tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 31
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    cut = {"up_proj": (31, 64), "gate_proj": (31, 64), "down_proj": (64, 31)}
    state = {
        name: tensor[tuple(map(slice, cut.get(name.split(".")[-2], tensor.shape)))].clone()
        if name.startswith("language_model.model.layers.")
        else tensor
        for name, tensor in load_file(tmp_path / "src" / SINGLE).items()
    }
    save_file(state, tmp_path / "src" / SINGLE, {"format": "pt"})
    quantise(tmp_path / "src", tmp_path / "dst", "int4")
    kinds = {n: t.dtype for n, t in load_file(tmp_path / "dst" / SINGLE).items()}
    layer = "language_model.model.layers.0.mlp"
    assert kinds[f"{layer}.up_proj.weight"] == torch.uint8
    assert kinds[f"{layer}.down_proj.weight"] == torch.int8
    at_load, stored = load(tmp_path / "src", quantize="int4")[0], load(tmp_path / "dst")[0]
    batch = tiny.make_batch(at_load, "tttIttttt")
    a, b = (generate(m, batch, max_new_tokens=8, output_logits=True) for m in (at_load, stored))
    assert a.tokens == b.tokens
    assert torch.equal(a.logits, b.logits)


def test_other_refusals(
    src: Path, stored: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "photo.png").touch()
    for words, message in (
        ([stored["int8"], tmp_path / "x", "--bits", 4], "is quantised already"),
        ([src, tmp_path / "taken", "--bits", 4], "contains other files (photo.png)"),
        ([src, stored["int8"], "--bits", 4], "was written from other files or with other options"),
        ([src, src / "inside", "--bits", 4], "is inside"),
    ):
        assert main([str(word) for word in words]) == 2
        assert message in refusal(capsys)
    config = json.loads((stored["int8"] / "config.json").read_text())
    del config["quantization_config"]
    shutil.copytree(stored["int8"], tmp_path / "unmarked")  # the weights are still integers
    (tmp_path / "unmarked" / "config.json").write_text(json.dumps(config))
    assert main([str(tmp_path / "unmarked"), str(tmp_path / "x"), "--bits", "8"]) == 2
    assert "is quantised already" in refusal(capsys)
    for has, form in (("int8", "int4"), ("int4", "int8"), ("nf4", "int4"), ("int4", "nf4")):
        with pytest.raises(ValueError, match=f"quantize='{form}', but .* stored in {has}"):
            load(stored[has], quantize=form)


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("place", ["fsync", "replace", "integers"])
def test_an_interrupted_run_leaves_no_partial_files_and_can_be_resumed(
    src: Path, tmp_path: Path, place: str, nth: int, error: BaseException,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before, limit = contents(src), 60_000
    complete = src.with_name("complete")
    if not complete.exists():
        quantise(src, complete, "int8", limit)
    owner: Any = module if place == "integers" else writer.os
    original, calls = getattr(owner, place), iter(range(10**6))

    def interrupted(*args: Any) -> Any:
        if next(calls) == nth:
            raise error
        return original(*args)

    dst = tmp_path / "dst"
    monkeypatch.setattr(module.quantise, "__defaults__", (limit,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, place, interrupted)
        code = main([str(src), str(dst), "--bits", "8"])
    assert code == (2 if isinstance(error, OSError) else 130)
    assert code == 130 or "No space left on device" in refusal(capsys)
    left = contents(dst)
    assert not [name for name in left if name.endswith(PART)]
    expected = contents(complete)
    shards = [name for name in left if name.endswith(".safetensors")]
    assert all(left[name] == expected[name] for name in shards)
    if "config.json" not in left:
        with pytest.raises(ValueError, match=r"config.json"):
            load(dst)
    assert main([str(src), str(dst), "--bits", "8"]) == 0
    assert contents(dst) == expected
    assert contents(src) == before


@pytest.mark.parametrize("form", OPTIONS)
def test_stored_weights_take_the_memory_of_those_made_at_load(form: str, tmp_path: Path) -> None:
    """Embeddings too: the scales are float32, but do not decide how embeddings are stored."""
    assert main([str(DEMO), str(tmp_path / "q"), *OPTIONS[form]]) == 0
    stored, made = load(tmp_path / "q")[0], load(DEMO, quantize=form)[0]
    assert stored.llama.embed_tokens.weight.dtype == torch.float16
    assert weight_bytes(stored) == weight_bytes(made)
