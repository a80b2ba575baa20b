"""bfloat16 as arithmetic on CPUs that multiply it in hardware, and as storage on all others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from minillava import load
from minillava.generate import generate
from minillava.loading import assemble, checkpoint
from minillava.pruning import METHODS
from minillava.quant.cpu import multiplies_bfloat16
from minillava.quant.stored import WidenedLinear


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
