"""The compiled inner loops of integer layers, and the same layers where they are not there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minillava.quant import integer, linear, native
from minillava.quant.cpu import digit_limit
from minillava.quant.integer import Int4Linear, Int8Linear, PackedInt4Linear, to_digits
from minillava.quant.linear import choose_linear, kernel_works
from minillava.quant.quantise import from_int4, to_int4, to_int8
from minillava.quant.stored import Digits, Int4, Int8, StoredLinear

needs_native = pytest.mark.skipif(native.kernels() is None, reason="native.c was not compiled")
needs_exact = pytest.mark.skipif(digit_limit() != 127, reason="no exact sums of 8-bit products")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "kernels", lambda: None)


def example(R: int, K: int = 192, N: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(R)
    x = torch.randn(R, K, generator=generator)
    x[:, 5] *= 40
    return x, torch.randn(N, K, generator=generator)


def int8_layer(weight: Tensor, digits: int) -> Int8Linear:
    return Int8Linear(Int8(*to_int8(weight)), None, digits)


def int4_layer(weight: Tensor) -> StoredLinear:
    return choose_linear(Int4(*to_int4(weight)), None)


@needs_native
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("K", [8, 24, 64, 192, 688, 1024])
def test_digits_are_those_of_torch(digits: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = example(50, K=max(K, 8))[0]
    monkeypatch.setattr(integer, "multiplies_bfloat16", lambda: False)
    compiled = to_digits(x, digits, 127)
    monkeypatch.setattr(integer, "kernels", lambda: None)
    expected = to_digits(x, digits, 127)
    torch.testing.assert_close(compiled.step, expected.step, rtol=1e-6, atol=0)
    assert compiled.codes.shape == expected.codes.shape == (50 * digits, K)
    difference = (compiled.codes[:50].int() - expected.codes[:50].int()).abs()
    assert difference.max() <= 1  # where a value is in the middle of two integers
    assert difference.count_nonzero() <= 50 * K / 500
    values = [d.codes.float().view(digits, 50, K) for d in (compiled, expected)]
    if digits == 2:
        one, other = (v[0] + v[1] / 254 for v in values)
        assert (one - other).abs().max() <= 1.01 / 254


@needs_native
@needs_exact
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("R", [1, 2, 3, 5, 16, 17, 40])
@pytest.mark.parametrize("K", [24, 192])
def test_int8_gives_the_same_bits_with_and_without(
    digits: int, R: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = example(R, K)
    layer = int8_layer(weight, digits)
    activations = layer.to_digits(x)
    y = layer.multiply_digits(activations)
    monkeypatch.setattr(integer, "kernels", lambda: None)
    assert torch.equal(y, layer.multiply_digits(activations))


@needs_native
@pytest.mark.parametrize("R", [1, 3, 16, 17])
def test_int4_multiplies_the_same_integers_with_and_without(R: int) -> None:
    x, weight = example(R)
    stored = Int4(*to_int4(weight))
    layer, other = Int4Linear(stored, None), PackedInt4Linear(stored, None)
    digits = layer.to_digits(x)
    codes = digits.codes.bfloat16() if R <= integer.PACKED_INPUT_ROWS else digits.codes
    y = layer.multiply_digits(digits)
    expected = other.multiply_digits(Digits(codes, digits.step, digits.shape, digits.dtype))
    # torch's kernel rounds its sums to bfloat16
    torch.testing.assert_close(y, expected, rtol=1.001 * 2.0**-8, atol=0)


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4"])
def test_without_native_a_row_does_not_depend_on_its_neighbours(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        linear, "kernel_works", lambda kind: kind not in ("native", "many") and kernel_works(kind)
    )
    x, weight = example(40)
    x[3] *= 1e4
    if form == "int4":
        layer = int4_layer(weight)
        assert not isinstance(layer, Int4Linear)
        assert "native" not in layer.arithmetic
    else:
        layer = choose_linear(Int8(*to_int8(weight)), None, digits=2 - (form != "int8"))
        assert isinstance(layer, Int8Linear) == kernel_works("onednn")
    together = layer(x)
    kept = from_int4(*to_int4(weight)) if form == "int4" else weight
    error = (together - x @ kept.T).abs().amax(1) / together.square().mean(1).sqrt()
    assert error.max() <= (0.03 if form == "int8" else 0.3)
    for n in (1, 2, 5):
        assert torch.equal(torch.cat([layer(rows) for rows in x.split(n)]), together)
    x[2, 100] = float("nan")
    assert layer(x)[2].isnan().all()


@needs_native
@pytest.mark.parametrize("R", [3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_reaches_every_result_of_its_row(value: float, R: int) -> None:
    x, weight = example(R, K=256)
    x[1, 77] = value
    for layer in (int8_layer(weight, 1), int8_layer(weight, 2), int4_layer(weight)):
        y = layer(x)
        assert not y[1].isfinite().any()
        assert y[[0, *range(2, R)]].isfinite().all()


@needs_native
@pytest.mark.parametrize("rows", [1, 40])
def test_the_largest_and_smallest_integers_are_summed_exactly(rows: int) -> None:
    """The largest digits times weights of -127 and 127 over 11,008 columns."""
    K, N = 11008, 4
    codes = torch.full((N, K), 127, dtype=torch.int8)
    codes[1], codes[2, ::2] = -127, -127
    layer = Int8Linear(Int8(codes, torch.ones(N)), None, digits=1)
    digits = torch.full((rows, K), -layer.limit, dtype=torch.int8)
    expected = torch.tensor([-1.0, 1.0, 0.0, -1.0]).expand(rows, -1) * (127 * layer.limit * K)
    given = Digits(digits, torch.ones(rows, 1), torch.Size((rows, K)), torch.float32)
    assert torch.equal(layer.multiply_digits(given), expected)


@needs_native
@pytest.mark.parametrize("R", [3, 20])
@pytest.mark.parametrize("columns", [128, 512])
def test_another_number_of_columns_is_refused(R: int, columns: int) -> None:
    weight = example(1, K=256)[1]
    for layer in (int8_layer(weight, 1), int4_layer(weight)):
        x = example(R, K=columns)[0]
        for given in (x, layer.prepare(x)):
            with pytest.raises(ValueError, match=f"256 columns got an input .*{columns}"):
                layer(given)


@needs_native
def test_many_rows_of_digits_of_8_bits_are_refused() -> None:
    compiled = native.kernels()
    assert compiled is not None
    stored = torch.zeros(80, 64, dtype=torch.int8), None, None, torch.ones(80)
    codes = torch.full((20, 64), 127, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"20 rows of digits up to 127.* more than 16"):
        compiled.multiply(codes, torch.ones(20, 1), stored, 127)


def random_digits(rows: int, K: int) -> tuple[Tensor, Tensor]:
    """Digits of 7 bits (rows, K) and their steps (rows, 1)."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-63, 64, (rows, K), generator=generator, dtype=torch.int8)
    return codes, torch.rand(rows, 1, generator=generator) + 0.5


@needs_native
@pytest.mark.parametrize(("R", "N", "K"), [(17, 80, 192), (20, 5, 7), (41, 33, 100), (64, 16, 96)])
@pytest.mark.parametrize("form", ["one digit", "two digits", "int4"])
def test_many_rows_are_the_bits_of_few(R: int, N: int, K: int, form: str) -> None:
    """Also where rows and columns do not fill the tiles and panels of multiply_many."""
    compiled, weight = native.kernels(), example(1, K, N)[1]
    assert compiled is not None
    if form == "int4":
        if K % 64:
            pytest.skip("int4 is stored in pairs of groups of 32 columns")
        layer: StoredLinear = int4_layer(weight)
    else:
        layer = int8_layer(weight, 1)
    assert isinstance(layer, Int4Linear | Int8Linear)
    count, share = (2, 0.5 / 63) if form == "two digits" else (1, 0.0)
    codes, _ = random_digits(count * R, K)
    step = random_digits(R, K)[1]
    y = compiled.multiply(codes, step, layer.stored, 63, share)
    few = [
        compiled.multiply(
            torch.cat([c[r] for c in codes.split(R)]), step[r], layer.stored, 63, share
        )
        for r in torch.arange(R).split(native.FEW_ROWS)
    ]
    assert torch.equal(y, torch.cat(few))


@needs_native
@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4"])
@pytest.mark.parametrize("many", [True, False])
def test_layers_leave_many_rows_to_native_c_where_it_is_fastest(
    form: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call. oneDNN's sums are exact too."""
    monkeypatch.setattr(integer, "digit_limit", lambda: 63)
    monkeypatch.setattr(integer, "multiplies_many", lambda limit: many and limit == 63)
    x, weight = example(40)
    layer: StoredLinear
    if form == "int4":
        layer = Int4Linear(Int4(*to_int4(weight)), None)
    else:
        layer = int8_layer(weight, digits=2 - (form == "int8-dynamic"))
    assert ("oneDNN" in layer.arithmetic) != many
    digits = layer.prepare(x)
    assert isinstance(digits, Digits)
    y = layer.multiply_digits(digits)
    compiled = native.kernels()
    assert compiled is not None
    called, call = [], compiled._call
    monkeypatch.setattr(compiled, "_call", lambda *a: (called.append(a[0]), call(*a)))
    again = layer.multiply_digits(digits)
    expected = ["multiply_many"] if many else ["widen_int4"] if form == "int4" else []
    assert [name for name in called if name != "scale_sums"] == expected
    assert torch.equal(again, y)
    monkeypatch.setattr(integer, "multiplies_many", lambda limit: not many)
    torch.testing.assert_close(layer.multiply_digits(digits), y, rtol=1e-6, atol=0)


@needs_native
def test_many_rows_of_the_largest_digits_do_not_saturate() -> None:
    K, compiled = 11008, native.kernels()
    assert compiled is not None
    weight = torch.full((20, K), 127, dtype=torch.int8)
    weight[1], weight[2, ::2] = -127, -127
    for digit in (-63, 63):
        codes = torch.full((24, K), digit, dtype=torch.int8)
        stored = weight, None, None, torch.ones(20)
        y = compiled.multiply(codes, torch.ones(24, 1), stored, 63)
        expected = (weight.long().sum(1) * digit).float().expand(24, -1)
        assert torch.equal(y, expected)


@needs_native
def test_many_rows_are_multiplied_where_nothing_newer_than_avx2_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for capability, limit, expected in (
        ("AVX2", 63, True),
        ("AVX2", 127, False),  # instructions that sum 8 bits exactly: oneDNN has them
        ("AVX512", 63, False),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert native.multiplies_many(limit) == expected
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not native.multiplies_many(63)


@pytest.mark.parametrize("limit", [63, 127])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_integers_are_multiplied_exactly_whatever_the_strides(limit: int, rows: int) -> None:
    """The widened weight of PackedInt4Linear is a transposed view."""
    if limit > digit_limit():
        pytest.skip("no exact sums of 8-bit products")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-limit, limit + 1, (rows, 64), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (96, 64), generator=generator, dtype=torch.int8)
    expected = (codes.long() @ weight.T.long()).float()
    for stored in (weight, weight.T.contiguous().T):
        assert torch.equal(integer.multiply_integers(codes, stored, limit).float(), expected)


# ---------------------------------------------------------------- where it cannot be compiled


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No library was compiled yet, and the folder for it is empty."""
    native.kernels.cache_clear()
    monkeypatch.setattr(native, "cached_assets_path", lambda *_, **__: tmp_path)
    yield tmp_path
    native.kernels.cache_clear()


@needs_native
def test_the_library_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.compile_library()
    assert [path.name for path in fresh.iterdir()] == ["native.so"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled twice"))
    assert native.compile_library() == library
    assert native.kernels() is not None


@pytest.mark.parametrize("fault", ["no compiler", "no AVX2", "broken", "damaged", "no folder"])
def test_layers_do_without_a_library(
    fault: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    elif fault == "no AVX2":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    elif fault == "broken":
        source = fresh / "broken.c"
        source.write_text("int main(")
        monkeypatch.setattr(native, "SOURCE", source)
    elif fault == "damaged":
        (fresh / "native.so").write_bytes(b"\x7fELF not a library")
    else:
        monkeypatch.setattr(native, "cached_assets_path", lambda *_, **__: fresh / "missing")
    assert native.kernels() is None
    kernel_works.cache_clear()
    try:
        layer = int4_layer(example(1)[1])
        assert not isinstance(layer, Int4Linear)
    finally:
        kernel_works.cache_clear()
