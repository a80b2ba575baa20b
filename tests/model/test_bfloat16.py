"""bfloat16 as arithmetic on CPUs that multiply it in hardware, and as storage on all others."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from minillava import load
from minillava.generate import generate
from minillava.loading import assemble, checkpoint
from minillava.pruning import METHODS
from minillava.quant import stored
from minillava.quant.cpu import multiplies_bfloat16
from minillava.quant.linear import kernel_works, weight_bytes
from minillava.quant.stored import Bfloat16Linear, WidenedLinear


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models by the patches along a side of an image."""
    return {g: tiny.write_folder(tmp_path_factory, image_size=14 * g) for g in (4, 6)}


@pytest.fixture(scope="module")
def models(folders: dict[int, Path]) -> dict[int, tuple[Any, Any]]:
    """In float32 and in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        return {
            g: (load(f)[0], load_on(True, f, patch, dtype="bfloat16")) for g, f in folders.items()
        }


@pytest.fixture
def folder(folders: dict[int, Path], request: pytest.FixtureRequest) -> Path:
    return folders[tiny.grid_for(request)]


def load_on(native: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The model as it is loaded on a CPU with or without bfloat16 multiplication."""
    for module in (assemble, checkpoint):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: native)
    return load(folder, **options)[0]


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_arithmetic_only_where_it_is_native(
    folder: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    model = load_on(native, folder, monkeypatch, dtype="bfloat16")
    layer = model.llama.blocks[0].mlp.down_proj
    assert model.dtype == (torch.bfloat16 if native else torch.float32)
    assert layer.weight.dtype == torch.bfloat16
    assert isinstance(layer, WidenedLinear) != native
    report = generate(model, tiny.make_batch(model, "tItt"), max_new_tokens=2).report
    assert report.arithmetic == ("bfloat16" if native else "weights widened from bfloat16")


@pytest.fixture
def packed() -> Bfloat16Linear:
    """A layer (70, 64) with a bias."""
    if not kernel_works("bfloat16"):
        pytest.skip("this CPU does not multiply bfloat16")
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*n, generator=generator).bfloat16() for n in ((70, 64), (70,)))
    return Bfloat16Linear(weight, bias)


def as_linear(layer: Bfloat16Linear) -> nn.Linear:
    """The same weight in float32, in torch's layer."""
    plain = nn.Linear(64, 70)
    plain.load_state_dict({"weight": layer.weight.float(), "bias": layer.bias.float()})
    return plain


@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (40,), (2, 20)])
def test_a_packed_weight_gives_the_product_rounded_once(
    packed: Bfloat16Linear, rows: tuple[int, ...]
) -> None:
    """To half of bfloat16's last digit: the bias is in the sum before that is rounded."""
    x = torch.randn(*rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y, exact = packed(x), as_linear(packed)(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2.0**-8, atol=1e-5)
    assert torch.equal(packed(x.mT.contiguous().mT), y)  # rows that are not next to each other


def test_nan_in_a_row_gives_nan_in_its_product_alone(packed: Bfloat16Linear) -> None:
    x = torch.ones(40, 64, dtype=torch.bfloat16)
    x[7, 5] = torch.nan
    assert packed(x).isnan().any(1).nonzero().flatten().tolist() == [7]


def test_a_packed_layer_can_be_copied_saved_and_moved(packed: Bfloat16Linear) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = packed(x)
    for same in (deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to(torch.bfloat16)):
        assert same.packed.is_mkldnn
        assert torch.equal(same(x), y)
    wide = deepcopy(packed).float()
    assert torch.equal(wide(x.float()), as_linear(packed)(x.float()))
    assert weight_bytes(wide) == 4 * (70 * 64 + 70)
    assert weight_bytes(packed) >= 2 * (70 * 64 + 70)  # oneDNN pads it
    assert packed.to("meta")(x.to("meta")).shape == (40, 70)


def test_gradients_reach_the_input_of_a_packed_layer(packed: Bfloat16Linear) -> None:
    x = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    # to bfloat16's last digit
    torch.testing.assert_close(
        x.grad[0].float(), packed.weight.float().sum(0), rtol=2.0**-7, atol=1e-5
    )


def test_a_packed_layer_is_torchs_on_a_cpu_that_does_not_multiply_bfloat16(
    packed: Bfloat16Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = pickle.dumps(packed)
    monkeypatch.setattr(stored, "multiplies_bfloat16", lambda: False)
    there = pickle.loads(state)
    assert not there.packed.is_mkldnn
    assert there.nbytes == 2 * 70 * 64
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.testing.assert_close(there(x), packed(x), rtol=2.0**-7, atol=1e-5)


def test_linear_layers_in_bfloat16_are_packed_unless_they_are_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "compile_decoding", lambda model: None)  # it takes a while
    if not kernel_works("bfloat16"):
        pytest.skip("this CPU does not multiply bfloat16")
    packed, compiled = (load(folder, dtype="bfloat16", compile=c)[0] for c in (False, True))
    names = set(assemble.linear_layers(compiled))
    kinds = {name: type(module) for name, module in packed.named_modules()}
    assert {name for name, kind in kinds.items() if kind is Bfloat16Linear} == names
    assert names > {"llama.lm_head", "vision.blocks.0.mlp.fc1"}
    assert weight_bytes(packed) >= weight_bytes(compiled)
    batch = tiny.make_batch(packed, "tIttt", "ttItIttt")
    a, b = (
        generate(m, batch, max_new_tokens=1, output_logits=True).logits for m in (packed, compiled)
    )
    # bfloat16 has eight bits, and few rows are summed in another order
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.02 * float(b.std()))


def test_without_the_kernel_layers_stay_torchs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "kernel_works", lambda kind: False)
    model = load_on(True, folder, monkeypatch, dtype="bfloat16")
    assert type(model.llama.blocks[0].mlp.down_proj) is nn.Linear
    assert model.dtype == torch.bfloat16


def test_the_default_and_float16_stay_float32(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({}, {"dtype": "float16"}):
        assert load_on(True, folder, monkeypatch, **options).dtype == torch.float32


@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4"])
def test_integer_weights_are_multiplied_in_float32(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    model = load_on(True, folder, monkeypatch, dtype="bfloat16", quantize=form)
    assert model.dtype == torch.float32
    assert model.llama.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_the_fastest_16_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    model = load_on(native, folder, monkeypatch, dtype="auto")
    assert model.llama.embed_tokens.weight.dtype == dtype


def test_logits_in_bfloat16_are_those_of_float32_to_its_precision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as transformers' own bfloat16 comes to its float32, within a factor of 1.5."""
    from transformers import LlavaForConditionalGeneration

    exact = load(folder)[0]
    model = load_on(True, folder, monkeypatch, dtype="bfloat16")
    batch = tiny.make_batch(exact, "tIttt")
    ours = [
        generate(m, batch, max_new_tokens=1, output_logits=True).logits[:, 0]
        for m in (exact, model)
    ]
    theirs = []
    for dtype in (torch.float32, torch.bfloat16):
        reference = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        with torch.inference_mode():
            logits = reference(input_ids=batch.ids, pixel_values=batch.pixels.to(dtype)).logits
        theirs.append(logits[:, -1].float())
    error, allowed = ((a - b).norm() for a, b in (ours, theirs))
    assert 0 < error <= 1.5 * allowed


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_chooses_in_bfloat16(
    models: dict[int, tuple[Any, Any]], request: pytest.FixtureRequest, name: str
) -> None:
    """It keeps as many tokens as in float32, and no intermediate value overflows or is NaN."""
    plan, (exact, model) = tiny.example(name), models[tiny.grid_for(request)]
    batch = tiny.make_batch(model, "tIttt", "ttItIttt")
    wanted, found = (
        generate(m, batch, plan, max_new_tokens=2, output_logits=True) for m in (exact, model)
    )
    assert found.logits.isfinite().all()
    assert found.report.tokens_entering[0] == wanted.report.tokens_entering[0] or name in ADAPTIVE
    assert [len(kept.positions) for kept in found.report.kept] == [
        len(kept.positions) for kept in wanted.report.kept
    ]


ADAPTIVE = ("prumerge", "prumerge-plus", "mustdrop")  # the number of tokens follows from the scores


@pytest.mark.slow
def test_onednn_without_bfloat16_is_noticed() -> None:
    """oneDNN then does as on a CPU without the instructions. A process reads it once."""
    code = "from minillava.quant.cpu import multiplies_bfloat16; print(multiplies_bfloat16())"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.split() == ["False"], out.stderr
    assert multiplies_bfloat16() in (True, False)
