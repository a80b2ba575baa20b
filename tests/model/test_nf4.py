"""Codes, scales and double quantisation are bit for bit those of bitsandbytes, which runs beside
this code. Its messages about kernels that it could download are of no interest here."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillava.quant import nf4
from minillava.quant.linear import choose_linear
from minillava.quant.nf4 import (
    LEVELS,
    Nested,
    Nf4,
    absmax_of,
    dynamic_levels,
    from_nf4,
    levels_of,
    to_nf4,
)
from minillava.quant.stored import WIDENED_ROWS, Nf4Linear

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from bitsandbytes import functional as theirs  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One value, odd numbers of values, less than a block, whole blocks, blocks across rows, an
# incomplete last block; more than one block of 256 absmax, and an incomplete one.
SHAPES = (
    (1, 1),
    (3, 5),
    (1, 63),
    (1, 64),
    (1, 65),
    (7, 9),
    (24, 40),
    (64, 64),
    (300, 130),
    (129, 257),
)


def borders(kind: str) -> Tensor:
    ascending = levels_of(kind).sort().values
    return (ascending[1:] + ascending[:-1]) / 2


def at_borders(kind: str, N: int, K: int, generator: torch.Generator) -> Tensor:
    """Values that lie exactly between two levels, or next to it, in blocks with absmax 1 or 2."""
    drawn = borders(kind)[torch.randint(0, 15, (N, K), generator=generator)]
    beside = torch.randint(-1, 2, (N, K), generator=generator)
    drawn = torch.where(beside == 0, drawn, drawn.nextafter(beside.float() * 2))
    drawn.view(-1)[::64] = 1.0
    return drawn * 2.0 ** torch.randint(0, 2, (N, 1), generator=generator)


def values(what: str, N: int, K: int) -> Tensor:
    """A weight (N, K) float32."""
    generator = torch.Generator().manual_seed(N * K)
    x = torch.randn(N, K, generator=generator)
    match what:
        case "zeros":
            return torch.zeros(N, K)
        case "negative zeros":
            return -torch.zeros(N, K)
        case "constant":
            return torch.full((N, K), 0.3)
        case "mostly zeros":
            return x * (torch.rand(N, K, generator=generator) < 0.02)
        case "rows of all sizes":
            return x * torch.exp(8 * torch.randn(N, 1, generator=generator))
        case "denormal":
            return x * 1e-40
        case "nearly denormal":  # absmax on both sides of SMALLEST
            return x * 4e-39
        case "large":
            return x * 1e33
        case "borders of nf4" | "borders of fp4":
            return at_borders(what[-3:], N, K, generator)
    return x * 0.02


VALUES = (
    *("Gaussian", "zeros", "negative zeros", "constant", "mostly zeros", "rows of all sizes"),
    *("denormal", "nearly denormal", "large", "borders of nf4", "borders of fp4"),
)


def weights(what: str) -> list[Tensor]:
    """Finite weights of all shapes in all dtypes."""
    found = [values(what, *shape).to(dtype) for shape in SHAPES for dtype in DTYPES]
    return [weight for weight in found if weight.isfinite().all()]


def quantise_there(weight: Tensor, kind: str, nested: bool, block: int = 64) -> tuple[Tensor, Any]:
    codes, state = theirs.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    return codes.flatten(), state


# ---------------------------------------------------------------- quantising


def test_the_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_levels(), theirs.create_dynamic_map())
    for kind in LEVELS:
        assert torch.equal(levels_of(kind), theirs.get_4bit_type(kind, "cpu"))


def test_levels_do_not_depend_on_torchs_default_dtype() -> None:
    expected = [*map(levels_of, LEVELS), dynamic_levels.__wrapped__()]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [*map(levels_of, LEVELS), dynamic_levels.__wrapped__()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("kind", LEVELS)
def test_codes_and_absmax_are_bit_equal(kind: str, what: str) -> None:
    for weight in weights(what):
        for block in (64, 128):
            codes, state = quantise_there(weight, kind, False, block)
            ours = to_nf4(weight, kind, nested=False, block=block)
            assert torch.equal(ours.codes, codes), (weight.shape, weight.dtype)
            assert torch.equal(ours.absmax, state.absmax), (weight.shape, weight.dtype)


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("kind", LEVELS)
def test_double_quantisation_is_bit_equal(kind: str, what: str) -> None:
    for weight in weights(what):
        codes, state = quantise_there(weight, kind, True)
        ours = to_nf4(weight, kind)
        assert isinstance(ours.absmax, Nested)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.absmax.codes, state.absmax), (weight.shape, weight.dtype)
        assert torch.equal(ours.absmax.scale, state.state2.absmax), (weight.shape, weight.dtype)
        assert torch.equal(ours.absmax.levels, state.state2.code)
        assert torch.equal(ours.absmax.offset, state.offset), (weight.shape, weight.dtype)


def test_a_weight_that_is_quantised_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "CHUNK_BLOCKS", 7)
    weight = values("rows of all sizes", 300, 130).half()
    codes, state = quantise_there(weight, "nf4", True)
    ours = to_nf4(weight)
    assert torch.equal(ours.codes, codes)
    assert isinstance(ours.absmax, Nested)
    assert torch.equal(ours.absmax.codes, state.absmax)


def test_absmax_of_all_sizes_in_8_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (-5 * torch.rand(2000 * 256, generator=generator))
    absmax = 1 + size * (2 * torch.randint(0, 2, size.shape, generator=generator) - 1)
    codes, state = theirs.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    ours = nf4.to_nested(absmax)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, state.absmax)
    assert ours.codes.unique().numel() > 230  # the few nearest to 0 are no step's nearest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("nested", [True, False])
def test_values_that_are_not_finite_show_in_absmax(value: float, nested: bool) -> None:
    for shape in ((8, 64), (3, 25)):  # in a whole block, and in an incomplete one
        weight = values("Gaussian", *shape)
        weight[-1, -1] = value
        assert not absmax_of(to_nf4(weight, nested=nested)).isfinite().all()


# ---------------------------------------------------------------- widening


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_widened_weights_are_bit_equal(dtype: torch.dtype, kind: str, nested: bool) -> None:
    # With AVX-512, bitsandbytes reads wrong scales if blocks cross rows of 16 n columns. For odd
    # numbers of columns it needs a compiler.
    for shape in ((64, 64), (24, 40), (300, 130), (2, 1024)):
        weight = values("rows of all sizes", *shape).clamp(-6e4, 6e4).to(dtype)
        codes, state = quantise_there(weight, kind, nested)
        expected = theirs.dequantize_4bit(codes[:, None], state)
        assert expected.dtype == dtype
        assert torch.equal(from_nf4(to_nf4(weight, kind, nested)).to(dtype), expected)


@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (37, 9), (50, 130), (3, 20_000)])
@pytest.mark.parametrize("nested", [True, False])
def test_rows_alone_are_the_rows_of_the_whole(shape: tuple[int, int], nested: bool) -> None:
    stored = to_nf4(values("rows of all sizes", *shape), nested=nested)
    whole = from_nf4(stored)
    codes = torch.stack((stored.codes >> 4, stored.codes & 15), -1).flatten()[: whole.numel()]
    absmax = absmax_of(stored).repeat_interleave(64)[: whole.numel()]
    assert torch.equal(whole, (levels_of("nf4")[codes.int()] * absmax).view(shape))
    for rows in (1, 2, 5):
        parts = [from_nf4(stored, a, min(a + rows, shape[0])) for a in range(0, shape[0], rows)]
        assert torch.equal(torch.cat(parts), whole)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that a result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def test_a_product_widens_a_block_of_rows_at_a_time() -> None:
    layer = choose_linear(to_nf4(values("Gaussian", 4 * WIDENED_ROWS, 128)), None)
    assert isinstance(layer, Nf4Linear)
    largest = LargestTensor()
    with largest:
        layer(torch.ones(3, 128))
    # The weight has four times as many; its codes, which are only looked at, have twice as many.
    assert largest.elements <= 2 * WIDENED_ROWS * 128


def test_a_gpu_multiplies_in_the_dtype_that_the_checkpoint_names() -> None:
    stored = to_nf4(values("Gaussian", 8, 64), nested=False)
    named = Nf4(stored.codes, stored.absmax, stored.shape, compute=torch.bfloat16)
    x, meta = torch.ones(2, 64), torch.device("meta")
    assert torch.equal(choose_linear(named, None)(x), choose_linear(stored, None)(x))
    seen: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket is torch.ops.aten.mm:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Products():
        y = choose_linear(named, None).to(meta)(x.to(meta))
    assert seen == [torch.bfloat16]
    assert y.dtype == torch.float32
