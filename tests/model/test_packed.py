"""Weights that a CPU holds in the order in which oneDNN multiplies them."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from minillava import load
from minillava.generate import generate
from minillava.loading import assemble, checkpoint
from minillava.pruning import METHODS
from minillava.quant import stored
from minillava.quant.cpu import fewest_rows
from minillava.quant.linear import kernel_works, weight_bytes
from minillava.quant.stored import PackedLinear

# By which share of itself and by how much a result may differ from the exact one.
ROUNDING = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 1e-5},  # half of the last digit
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=ROUNDING, ids=name_of)
def packed(request: pytest.FixtureRequest) -> PackedLinear:
    """A layer (70, 64) with a bias."""
    if not kernel_works(name_of(request.param)):
        pytest.skip(f"this CPU does not multiply {request.param}")
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*n, generator=generator) for n in ((70, 64), (70,)))
    return PackedLinear(weight.to(request.param), bias.to(request.param))


def as_linear(layer: PackedLinear) -> nn.Linear:
    """The same weight in float64, in torch's layer."""
    assert layer.bias is not None
    plain = nn.Linear(64, 70, dtype=torch.float64)
    plain.load_state_dict({"weight": layer.weight.double(), "bias": layer.bias.double()})
    return plain


def inputs(layer: PackedLinear, *rows: int) -> Tensor:
    x = torch.randn(*rows, 64, generator=torch.Generator().manual_seed(1))
    return x.to(layer.packed.dtype)


@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (40,), (2, 20)])
def test_the_product_is_exact_and_rounded_once(packed: PackedLinear, rows: tuple[int, ...]) -> None:
    """The bias is in the sum before that is rounded."""
    x = inputs(packed, *rows)
    y, exact = packed(x), as_linear(packed)(x.double())
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), exact, **ROUNDING[x.dtype])
    assert torch.equal(packed(x.mT.contiguous().mT), y)  # rows that are not next to each other


@pytest.mark.parametrize("fewest", [1, 5])
def test_few_rows_are_padded_where_that_is_faster(
    packed: PackedLinear, monkeypatch: pytest.MonkeyPatch, fewest: int
) -> None:
    multiplied = []
    kernel = torch.ops.mkldnn._linear_pointwise

    def spy(x: Tensor, *rest: Any) -> Tensor:
        multiplied.append(len(x))
        return kernel(x, *rest)

    monkeypatch.setattr(stored, "fewest_rows", lambda: fewest)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    results = [packed(inputs(packed, rows)) for rows in (1, 4, 6)]
    assert multiplied == [max(rows, fewest) for rows in (1, 4, 6)]
    assert [len(y) for y in results] == [1, 4, 6]


def test_few_rows_are_padded_with_avx512_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, rows in (("AVX512", 5), ("AVX2", 1), ("DEFAULT", 1)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert fewest_rows() == rows


def test_nan_in_a_row_gives_nan_in_its_product_alone(packed: PackedLinear) -> None:
    x = torch.ones(40, 64, dtype=packed.packed.dtype)
    x[7, 5] = torch.nan
    assert packed(x).isnan().any(1).nonzero().flatten().tolist() == [7]


def test_a_packed_layer_can_be_copied_saved_and_moved(packed: PackedLinear) -> None:
    x, dtype = inputs(packed, 40), packed.packed.dtype
    y = packed(x)
    for same in (deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to(dtype)):
        assert same.packed.is_mkldnn
        assert torch.equal(same(x), y)
    assert packed.arithmetic == name_of(dtype)
    wide = deepcopy(packed).double()
    assert wide.arithmetic == "float64"
    assert torch.equal(wide(x.double()), as_linear(packed)(x.double()))
    assert weight_bytes(wide) == 8 * (70 * 64 + 70)
    assert weight_bytes(packed) >= dtype.itemsize * (70 * 64 + 70)  # oneDNN pads it
    assert packed.to("meta")(x.to("meta")).shape == (40, 70)


def test_gradients_reach_the_input_of_a_packed_layer(packed: PackedLinear) -> None:
    x = torch.ones(3, 64, dtype=packed.packed.dtype, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    near = {"rtol": 2 * ROUNDING[x.dtype]["rtol"], "atol": 1e-5}  # one last digit
    torch.testing.assert_close(x.grad[0].double(), packed.weight.double().sum(0), **near)


def test_a_packed_layer_is_torchs_on_a_cpu_that_does_not_multiply_its_dtype(
    packed: PackedLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = pickle.dumps(packed)
    monkeypatch.setattr(stored, "multiplies", lambda dtype: False)
    there = pickle.loads(state)
    assert not there.packed.is_mkldnn
    assert there.nbytes == packed.packed.dtype.itemsize * 70 * 64
    x = inputs(packed, 40)
    near = {"rtol": 2 * ROUNDING[x.dtype]["rtol"], "atol": 1e-5}
    torch.testing.assert_close(there(x), packed(x), **near)


def test_an_input_that_does_not_fit_a_packed_layer_is_refused(packed: PackedLinear) -> None:
    dtype = packed.packed.dtype
    with pytest.raises(ValueError, match=r"64 columns got an input .3, 65."):
        packed(torch.zeros(3, 65, dtype=dtype))
    with pytest.raises(ValueError, match=rf"in {dtype} got an input in torch.float16"):
        packed(torch.zeros(3, 64, dtype=torch.float16))


@pytest.fixture(scope="module")
def models(folders: dict[int, Path]) -> dict[int, tuple[Any, Any]]:
    """In float32, with parameters and packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "LARGE", 0)
        return {g: (load(f)[0], load(f, pack=True)[0]) for g, f in folders.items()}


needs_float32 = pytest.mark.skipif(
    not kernel_works("float32"), reason="torch cannot pack float32 here"
)


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is PackedLinear}


def test_bfloat16_is_packed_unless_it_is_compiled(
    folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "compile_decoding", lambda model: None)  # it takes a while
    if not kernel_works("bfloat16"):
        pytest.skip("this CPU does not multiply bfloat16")
    model, compiled = (load(folders[4], dtype="bfloat16", compile=c)[0] for c in (False, True))
    names = set(assemble.linear_layers(compiled))
    assert packed_names(model) == names
    assert names > {"llama.lm_head", "vision.blocks.0.mlp.fc1"}
    assert weight_bytes(model) >= weight_bytes(compiled)
    batch = tiny.make_batch(model, "tIttt", "ttItIttt")
    a, b = (
        generate(m, batch, max_new_tokens=1, output_logits=True).logits for m in (model, compiled)
    )
    # bfloat16 has eight bits, and few rows are summed in another order
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.02 * float(b.std()))


@needs_float32
def test_the_decoders_float32_is_packed_on_request_alone(
    folders: dict[int, Path],
    models: dict[int, tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, packed = models[4]
    names = {n for n in assemble.linear_layers(plain) if n.startswith("llama.")}
    assert packed_names(packed) == names
    assert names > {"llama.lm_head", "llama.blocks.0.mlp.up_proj"}
    assert packed_names(plain) == set()
    assert weight_bytes(packed) >= weight_bytes(plain)
    assert packed_names(load(folders[4], pack=True)[0]) == set()  # its weights are not large
    monkeypatch.setattr(assemble, "LARGE", 0)
    monkeypatch.setattr(checkpoint, "compile_decoding", lambda model: None)
    assert packed_names(load(folders[4], pack=True, compile=True)[0]) == set()


@needs_float32
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_keeps_the_same_with_packed_weights(
    models: dict[int, tuple[Any, Any]], request: pytest.FixtureRequest, name: str
) -> None:
    plan, (plain, packed) = tiny.example(name), models[tiny.grid_for(request)]
    batch = tiny.make_batch(plain, "tIttt", "ttItIttt")
    a, b = (generate(m, batch, plan, max_new_tokens=3, output_logits=True) for m in (plain, packed))
    assert b.tokens == a.tokens
    assert b.report.tokens_entering == a.report.tokens_entering
    for ours, theirs in zip(b.report.kept, a.report.kept, strict=True):
        assert ours.positions == theirs.positions
    torch.testing.assert_close(b.logits, a.logits, rtol=0.0, atol=1e-4 * float(a.logits.std()))


@pytest.mark.parametrize("kernel", ["float32", "bfloat16"])
def test_without_the_kernel_layers_stay_torchs(
    folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setattr(assemble, "LARGE", 0)
    monkeypatch.setattr(assemble, "can_pack", lambda dtype: False)
    monkeypatch.setattr(assemble, "multiplies_bfloat16", lambda: True)
    model = load(folders[4], dtype=kernel, pack=True)[0]
    assert type(model.llama.blocks[0].mlp.down_proj) is nn.Linear
    assert model.dtype == getattr(torch, kernel)
