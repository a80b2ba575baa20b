"""Linear layers with stored weights: what they compute, their memory, and which one is chosen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eval import cost
from minillava.quant import integer, linear, stored
from minillava.quant.cpu import digit_limit, multiplies_bfloat16
from minillava.quant.integer import FbgemmLinear, Int4Linear, Int8Linear, PackedInt4Linear
from minillava.quant.linear import choose_linear, kernel_works, weight_bytes
from minillava.quant.nf4 import from_nf4, to_nf4
from minillava.quant.quantise import (
    block_size,
    from_int4,
    from_int8,
    hadamard,
    rotate_columns,
    to_int4,
    to_int8,
    widen_codes,
)
from minillava.quant.stored import (
    HalfLinear,
    Int4,
    Int8,
    RowInt8,
    StoredLinear,
    WidenedLinear,
)

INT4 = (Int4Linear, PackedInt4Linear)


def choose_packed_int4(weight: Tensor) -> StoredLinear:
    """The layer of int4 where native.c is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "kernel_works", lambda kind: kind != "native" and kernel_works(kind))
        return choose_linear(Int4(*to_int4(weight)), None)


Make = Callable[[Tensor], StoredLinear]
FORMS: dict[str, Make] = {
    "float16": lambda w: choose_linear(w.half(), None),
    "bfloat16": lambda w: choose_linear(w.bfloat16(), None),
    "int8": lambda w: choose_linear(Int8(*to_int8(w)), None),
    "int8-dynamic": lambda w: choose_linear(Int8(*to_int8(w)), None, digits=1),
    "int4": lambda w: choose_linear(Int4(*to_int4(w)), None),
    "int4 packed": lambda w: choose_packed_int4(w),
    "int8 fbgemm": lambda w: FbgemmLinear(Int8(*to_int8(w)), None, digits=2),
    "int8-dynamic fbgemm": lambda w: FbgemmLinear(Int8(*to_int8(w)), None, digits=1),
    "nf4 widened": lambda w: choose_linear(to_nf4(w), None),
    "fp4 widened": lambda w: choose_linear(to_nf4(w, "fp4", nested=False), None),
    "LLM.int8 widened": lambda w: choose_linear(RowInt8(*to_row_int8(w)), None),
    "float16 widened": lambda w: WidenedLinear(w.half(), None),
    "int8 widened": lambda w: WidenedLinear(Int8(*to_int8(w)), None),
    "int4 widened": lambda w: WidenedLinear(Int4(*to_int4(w)), None),
}
# Largest difference from the float32 product with the stored weight, relative to its root mean
# square, on Gaussian inputs: rounding of floats, of two digits, and of one digit of 7 bits.
LIMITS = {
    "float16": 2e-6,
    "bfloat16": 2e-6,
    "int8": 2e-3,
    "int8-dynamic": 0.15,
    "int4": 0.15,
    "int4 packed": 0.15,
    "int8 fbgemm": 2e-3,
    "int8-dynamic fbgemm": 0.15,
    "nf4 widened": 2e-6,
    "fp4 widened": 2e-6,
    "LLM.int8 widened": 2e-6,
    "float16 widened": 2e-6,
    "int8 widened": 1e-5,
    "int4 widened": 1e-5,
}


def example(N: int = 80, K: int = 192, R: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (R, K) with the outlier columns of a Llama, and a weight (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(R, K, generator=generator)
    x[:, 5] *= 40
    return x, torch.randn(N, K, generator=generator) * 0.03


def to_row_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and the largest absolute value of each row, as LLM.int8() has them."""
    scale = weight.abs().amax(1)
    return (weight * (127 / scale[:, None])).round().to(torch.int8), scale


def as_stored(form: str, weight: Tensor) -> Tensor:
    """The float32 weight that a form represents, by plain arithmetic."""
    if form in ("nf4 widened", "fp4 widened"):
        return from_nf4(to_nf4(weight, form[:3], nested=form.startswith("nf4")))
    if form == "LLM.int8 widened":
        codes, scale = to_row_int8(weight)
        return codes * scale[:, None] / 127
    if form.startswith("int8"):
        return from_int8(*to_int8(weight))
    if form.startswith("int4"):
        return from_int4(*to_int4(weight))
    return weight.to(torch.bfloat16 if form == "bfloat16" else torch.float16).float()


# ---------------------------------------------------------------- quantised weights


@pytest.mark.parametrize("K", [2, 24, 64, 96, 576, 11008 // 43])
def test_the_rotation_is_orthogonal_and_its_own_inverse(K: int) -> None:
    b = block_size(K, 128)
    assert K % b == 0
    assert K // b % 2 == 1 or b == 128
    H = hadamard(b)
    assert torch.equal(H.abs(), torch.full((b, b), b**-0.5))
    torch.testing.assert_close(H @ H, torch.eye(b))
    x = torch.randn(3, K)
    torch.testing.assert_close(rotate_columns(rotate_columns(x)), x)
    torch.testing.assert_close(rotate_columns(x).norm(dim=1), x.norm(dim=1))


def test_int8_rounds_to_the_nearest_of_255_levels_of_a_row() -> None:
    _, weight = example()
    codes, scale = to_int8(weight)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(1).eq(127).all()
    wrong = (rotate_columns(weight) - codes.float() * scale[:, None]).abs()
    assert (wrong <= scale[:, None] * 0.5001).all()


def test_int4_rounds_to_the_nearest_of_16_levels_of_a_group() -> None:
    _, weight = example()
    codes, step, low, scale = to_int4(weight)
    assert codes.shape == (80, 96)
    assert step.shape == low.shape == (80, 6)
    integers, rotated = widen_codes(codes, step, low), rotate_columns(weight)
    for n, g in ((0, 0), (17, 1), (79, 5)):  # the 16 levels, computed by hand
        levels = [int(low[n, g]) + code * int(step[n, g]) for code in range(16)]
        for k in range(32 * g, 32 * g + 32):
            wanted = float(rotated[n, k] / scale[n])
            nearest = min((v for v in levels if v <= 127), key=lambda v: abs(v - wanted))
            assert abs(int(integers[n, k]) - wanted) == pytest.approx(abs(nearest - wanted))
    assert torch.equal(from_int4(codes, step, low, scale), from_int8(integers, scale))


def test_int4_chooses_levels_with_a_small_error() -> None:
    """On Gaussian weights a sixth less than 16 levels over the whole range of every group leave."""
    _, weight = example(N=256, K=1024)
    *_, scale = parts = to_int4(weight)
    groups = (rotate_columns(weight) / scale[:, None]).view(256, -1, 32)
    lowest, highest = groups.aminmax(dim=-1, keepdim=True)
    step, low = ((highest - lowest) / 15).round(), lowest.round()
    highest_code = ((127 - low) / step).floor().clamp_max(15)
    plain = ((groups - low) / step).round().clamp_min(0).minimum(highest_code) * step + low
    wrong = (widen_codes(*parts[:3]).view_as(groups) - groups).square().sum(-1)
    full = (plain - groups).square().sum(-1)
    assert (wrong <= 1.0001 * full).float().mean() > 0.9
    assert wrong.sum() < 5 / 6 * full.sum()


def test_int4_keeps_groups_of_one_and_of_two_values() -> None:
    rotated = torch.full((3, 128), 127.0)
    rotated[1] = 0.0
    rotated[2, ::5] = 127 - 15 * 16
    weight = rotate_columns(rotated) / 127
    torch.testing.assert_close(from_int4(*to_int4(weight)), weight)


def test_no_level_of_int4_leaves_the_range_of_int8() -> None:
    _, weight = example(N=64, K=256)
    weight[:, :3] = torch.tensor([1.0, 0.99, -1.0])
    for w in (weight, -weight, weight.abs()):
        codes, step, low, scale = to_int4(w)
        wide = from_int4(codes, step, low, scale)
        assert (rotate_columns(wide - w).abs() <= 18 * scale[:, None]).all()  # 254 / 15 and a half


def test_a_weight_of_zeros_stays_one() -> None:
    zeros = torch.zeros(4, 64)
    assert torch.equal(from_int8(*to_int8(zeros)), zeros)
    assert torch.equal(from_int4(*to_int4(zeros)), zeros)


# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(80, 192, 7), (64, 64, 1), (130, 96, 3), (7, 24, 2)])
def test_a_layer_multiplies_by_the_weight_as_stored(form: str, shape: tuple[int, int, int]) -> None:
    x, weight = example(*shape)
    expected = x @ as_stored(form, weight).T
    error = (FORMS[form](weight)(x) - expected).abs().max() / expected.square().mean().sqrt()
    assert error <= LIMITS[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [64, 96, 192, 256])
def test_a_row_does_not_depend_on_its_neighbours(form: str, K: int) -> None:
    x, weight = example(N=520, K=K, R=33)
    x[3] *= 1e4
    layer = FORMS[form](weight)
    together = layer(x)
    for n in (1, 2, 5):
        alone = torch.cat([layer(rows) for rows in x.split(n)])
        if form in ("float16", "bfloat16") or form.endswith(
            "widened"
        ):  # float32 summation order may differ
            noise = (alone - together).abs().amax(1) / together.square().mean(1).sqrt()
            assert noise.max() <= 1e-5
        else:
            assert torch.equal(alone, together)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(form: str, value: float) -> None:
    x, weight = example()
    layer = FORMS[form](weight)
    clean = layer(x)
    x[2, 100] = value
    y = layer(x)
    assert not y[2].isfinite().any()
    if value != value:
        assert y[2].isnan().all()
    torch.testing.assert_close(y[[0, 1, 3]], clean[[0, 1, 3]], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_bias_and_many_rows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = example(R=12)
    layer = FORMS[form](weight)
    plain = layer(x)
    torch.testing.assert_close(layer(x.view(3, 4, -1)), plain.view(3, 4, -1), rtol=1e-5, atol=1e-4)
    assert layer(x[:0]).shape == (0, 80)
    monkeypatch.setattr(stored, "INPUT_ROWS", 5)
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-4)
    bias = torch.randn(80)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    torch.testing.assert_close(layer(x), plain + bias, rtol=1e-5, atol=1e-4)
    assert layer(torch.zeros(2, 192)).equal(bias.expand(2, -1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "limit"), [(3e-38, 0.6), (1e-35, 0.1), (1e-30, 0.1), (1e20, 0.1)])
def test_tiny_and_huge_rows_keep_their_magnitude(form: str, size: float, limit: float) -> None:
    one_digit = form.startswith(("int8-dynamic", "int4")) and not form.endswith("widened")
    if size < 1e-37 and one_digit and multiplies_bfloat16():
        pytest.skip("bfloat16 instructions take numbers below 1.2e-38 for 0")
    x, weight = example()
    x[:, 5] /= 40
    y = FORMS[form](weight)(x * size) / size
    exact = x @ as_stored(form, weight).T
    assert (y - exact).abs().max() <= limit * exact.square().mean().sqrt()
    assert FORMS[form](weight)(x * 1e-42).abs().max() < 1e-40


def test_a_second_digit_reduces_the_error_thirtyfold() -> None:
    x, weight = example()
    exact = x @ as_stored("int8", weight).T
    one, two = (
        (FORMS[form](weight)(x) - exact).square().mean() for form in ("int8-dynamic", "int8")
    )
    assert two < one / 1e3


def test_the_rotation_reduces_the_error_of_one_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = example()
    exact = x @ weight.T
    with_rotation = (FORMS["int8-dynamic"](weight)(x) - exact).square().mean()
    monkeypatch.setattr("minillava.quant.quantise.ROTATED_COLUMNS", 1)
    without = (FORMS["int8-dynamic"](weight)(x) - exact).square().mean()
    assert with_rotation < without / 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_float16_weight_that_is_not_finite_is_not_made_finite(value: float) -> None:
    x, weight = example()
    weight[3, 70] = value
    y = FORMS["float16"](weight)(x)
    torch.testing.assert_close(y, x @ weight.half().float().T, equal_nan=True, rtol=1e-5, atol=1e-4)
    assert not y[:, 3].isfinite().any()


# ---------------------------------------------------------------- which layer is chosen


def test_kernels_are_used_where_they_work() -> None:
    _, weight = example()
    kinds = {form: type(make(weight)) for form, make in FORMS.items()}
    if not all(map(kernel_works, ("float16", "fbgemm", "int4"))):
        pytest.skip("this torch lacks one of the kernels")
    assert kinds["float16"] is HalfLinear
    assert kinds["bfloat16"] is WidenedLinear
    kind = Int8Linear if kernel_works("onednn") or kernel_works("many") else FbgemmLinear
    assert kinds["int8"] is kinds["int8-dynamic"] is kind
    assert kinds["int4"] is (Int4Linear if kernel_works("native") else PackedInt4Linear)
    assert type(FORMS["int4"](weight[:, :96])) is PackedInt4Linear  # three groups of 32
    assert type(FORMS["int4"](weight[:, :16])) is WidenedLinear  # no kernel for groups of 16


def test_without_exact_products_of_8_bits_fbgemm_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CPUs with AVX2 only, without a compiler. The digits of int4 then have 7 bits."""
    if not all(map(kernel_works, ("fbgemm", "int4"))):
        pytest.skip("this torch lacks one of the kernels")
    x, weight = example(R=40)
    works = {"fbgemm": True, "int4": True, "native": kernel_works("native")}
    monkeypatch.setattr(linear, "kernel_works", lambda kind: works.get(kind, False))
    monkeypatch.setattr(integer, "digit_limit", lambda: 63)
    for form in ("int8", "int8-dynamic", "int4"):
        layer = FORMS[form](weight)
        assert isinstance(layer, INT4 if form == "int4" else FbgemmLinear)
        assert " 7 " in layer.arithmetic or " 14 " in layer.arithmetic
        y, exact = layer(x), x @ as_stored(form, weight).T
        assert (y - exact).abs().max() <= LIMITS[form] * exact.square().mean().sqrt()
        assert torch.equal(torch.cat([layer(rows) for rows in x.split(3)]), y)


def test_the_arithmetic_says_how_many_bits_activations_have() -> None:
    _, weight = example()
    bits = {127: 8, 63: 7}[digit_limit()]
    for form, digits in (("int8", 2), ("int8-dynamic", 1), ("int4", 1)):
        layer = FORMS[form](weight)
        if isinstance(layer, (Int8Linear, *INT4)):
            assert f"activations of {bits * digits} bits" in layer.arithmetic


@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4", "int8-dynamic fbgemm"])
@pytest.mark.parametrize("R", [1, 3, 40])
def test_layers_of_one_form_can_share_the_digits_of_their_input(form: str, R: int) -> None:
    x, weight = example(R=R)
    one, other = FORMS[form](weight), FORMS[form](weight.flip(0))
    shared = one.prepare(x.view(1, R, -1))
    assert torch.equal(other(shared), other(x.view(1, R, -1)))
    assert torch.equal(one(shared)[0], one(x))


@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4"])
def test_a_layer_in_bfloat16_computes_what_it_does_in_float32(form: str) -> None:
    for R in (1, 5, 40):  # every kernel of int4, and few rows
        x, weight = example(R=R)
        layer, x = FORMS[form](weight), x.bfloat16()
        y, exact = layer(x), layer(x.float())
        assert y.dtype == torch.bfloat16
        assert (y - exact).abs().max() <= 0.08 * exact.square().mean().sqrt()


def test_a_working_kernel_is_found() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch was built without fbgemm")
    assert kernel_works("float16")
    assert kernel_works("fbgemm")


def test_onednn_is_found_where_its_products_are_exact() -> None:
    """A wrong layer would be noticed and replaced by fbgemm's, so no other test would fail."""
    if digit_limit() != 127:
        pytest.skip("this CPU does not sum products of 8 bits exactly")
    assert kernel_works("onednn")
    assert kernel_works("int4")


@pytest.mark.parametrize("columns", [32, 64, 128, 256])
def test_the_packed_int4_kernel_is_chosen(columns: int) -> None:
    if not kernel_works("int4"):
        pytest.skip("this torch lacks the kernel")
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    stored = Int4(*to_int4(weight))
    assert isinstance(choose_linear(stored, None), INT4)


@pytest.mark.parametrize("form", ["float16", "int8", "int8-dynamic", "int4"])
def test_without_the_kernels_weights_are_widened(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = example()
    monkeypatch.setattr(linear, "kernel_works", lambda kind: False)
    layer = FORMS[form](weight)
    assert type(layer) is WidenedLinear
    torch.testing.assert_close(layer(x), x @ as_stored(form, weight).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kind", "op"), [
    ("float16", (torch.ops.quantized, "linear_prepack_fp16")),
    ("float32", (torch.ops.mkldnn, "_linear_pointwise")),
    ("bfloat16", (torch.ops.mkldnn, "_linear_pointwise")),
    ("onednn", (torch, "_int_mm")),
    ("fbgemm", (torch.ops.quantized, "linear_dynamic")),
    ("int4", (torch.ops.aten, "_weight_int4pack_mm_for_cpu")),
])  # fmt: skip
@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_a_kernel_that_is_missing_or_wrong_is_noticed(
    kind: str, op: tuple[object, str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = getattr(*op)

    if not kernel_works(kind):
        pytest.skip("this CPU lacks the kernel")

    def broken(*args: object) -> object:
        if fault == "missing":
            raise NotImplementedError("no such kernel on this CPU")
        return kernel(*args) * 1.5 if "prepack" not in op[1] else kernel(args[0] * 1.5, None)

    for cached in (kernel_works, digit_limit):
        cached.cache_clear()
    monkeypatch.setattr(*op, broken)
    assert not kernel_works(kind)
    monkeypatch.undo()
    for cached in (kernel_works, digit_limit):
        cached.cache_clear()


def test_making_a_layer_does_not_warn_or_change_torchs_engine() -> None:
    _, weight = example()
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in FORMS.values():
            make(weight)
    assert torch.backends.quantized.engine == before


def test_weight_bytes_counts_the_stored_form() -> None:
    _, weight = example(N=128, K=512)
    values = 128 * 512
    held = {form: weight_bytes(make(weight)) for form, make in FORMS.items()}
    assert held["float16"] == held["float16 widened"] == held["bfloat16"] == 2 * values
    assert held["int8 widened"] == values + 4 * 128
    range_row = 4 * 512  # the row that fixes the step of the activations
    assert held["int8 fbgemm"] == held["int8-dynamic fbgemm"] == held["int8 widened"] + range_row
    assert held["int4 widened"] == values // 2 + 2 * values // 32 + 4 * 128
    if kernel_works("onednn") or kernel_works("many"):
        assert held["int8"] == held["int8-dynamic"] == held["int8 widened"]
    if kernel_works("native"):
        assert held["int4"] == held["int4 widened"]
    if kernel_works("int4"):
        assert held["int4 packed"] == values // 2 + 4 * values // 32 + 4 * 128
    assert held["LLM.int8 widened"] == values + 4 * 128
    blocks, pairs, levels = values // 64, 8 * 256, 4 * 256  # all layers share the last two
    assert held["fp4 widened"] == values // 2 + 4 * blocks + pairs
    assert held["nf4 widened"] == values // 2 + blocks + 4 * blocks // 256 + 4 + pairs + levels
    tied = torch.nn.ModuleList(
        [torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)]
    )
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 64


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux' resident bytes")
@pytest.mark.parametrize("form", FORMS)
def test_the_process_grows_by_weight_bytes(form: str) -> None:
    """With 640 columns too, which fbgemm pads to a multiple of 512."""
    weights = [example(N=128, K=640, seed=seed)[1] for seed in range(200)]
    FORMS[form](weights[0])
    cost.return_freed_memory()
    before = cost.resident_bytes()
    layers = [FORMS[form](weight) for weight in weights]
    cost.return_freed_memory()
    grown = cost.resident_bytes() - before
    # The rest is whole pages of 4 KiB and fbgemm's column sums; without padding it would be 0.6.
    assert grown == pytest.approx(sum(weight_bytes(layer) for layer in layers), rel=0.2)
