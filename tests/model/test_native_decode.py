"""Decoding of integer weights with the operations between the products in C."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillava import Batch, load, parse_plan
from minillava.attention import token_attention
from minillava.cache import KVCache, write_rows
from minillava.engine import State, decode, hidden_states_read, prefill
from minillava.generate import generate
from minillava.llama import RMSNorm, rotate
from minillava.loading import native_decode
from minillava.loading.native_decode import NativeDecode, native_decoding
from minillava.quant.integer import to_digits
from minillava.quant.native import Kernels, kernels
from minillava.request import prompts_of

pytestmark = pytest.mark.skipif(kernels() is None, reason="native.c was not compiled")
PROMPTS = ("ttItttt", "tt", "tItIt")
FORMS = ("int4", "int8", "int8-dynamic")
TOKENS = (3, 7, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.write_folder(tmp_path_factory, width=128, inner=192)  # two heads share a key


@pytest.fixture(scope="module", params=FORMS)
def integer_model(request: pytest.FixtureRequest, folder: Any) -> Any:
    model = load(folder, quantize=request.param)[0]
    if model.compiled is None:
        pytest.skip("other layers multiply this form here")
    return model


@pytest.fixture
def compiled() -> Kernels:
    found = kernels()
    assert found is not None
    return found


def prefilled(model: Any, plan_text: str, batch: Batch) -> State:
    plan, encoded = parse_plan(plan_text), {}
    if batch.pixels is not None:
        encoded = model.encode(batch.pixels, hidden_states_read(model, plan))
    cache = KVCache(model.config.text, 8, model.dtype, model.device)
    return prefill(model, prompts_of(model, batch), encoded, plan, cache)[1]


def logits_of(step: Any, model: Any, plan: str, batch: Batch | None = None) -> Tensor:
    """Logits (tokens, B, V) of the same tokens after the same prefill."""
    batch = batch or tiny.make_batch(model, *PROMPTS)
    with torch.inference_mode():
        state = prefilled(model, plan, batch)
        tokens = [torch.full((len(batch.ids),), token) for token in TOKENS]
        return torch.stack([step(model, token, state) for token in tokens])


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for a few values in the middle of two digits, which may become either: 1 part in
    127 of the row's largest value."""
    largest = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * largest)
    assert (ours - theirs).abs().median() < 1e-4 * largest


@pytest.mark.parametrize(
    "plan",
    [
        "",
        "fastv:k=1,r=0.5",
        "fastv:k=1,r=0.5,positions=compact",
        "vtw:layer=2",
        "pyramiddrop:layers=1/2,ratios=0.5/0.25",
        "visionzip:dominant=3,contextual=2",
    ],
)
def test_logits_are_those_of_the_engine(integer_model: Any, plan: str) -> None:
    theirs = logits_of(decode, integer_model, plan)
    ours = logits_of(integer_model.compiled, integer_model, plan)
    assert_near(ours, theirs)
    assert not torch.equal(ours, theirs)  # they are computed in different ways


def test_a_row_does_not_depend_on_its_neighbours(integer_model: Any) -> None:
    batch = tiny.make_batch(integer_model, *PROMPTS)
    together = logits_of(integer_model.compiled, integer_model, "fastv:k=1,r=0.5", batch)
    for b in range(len(PROMPTS)):
        single = tiny.alone(integer_model, batch, b)
        alone = logits_of(integer_model.compiled, integer_model, "fastv:k=1,r=0.5", single)
        assert torch.equal(alone[:, 0], together[:, b])


def test_the_cache_goes_on_as_after_the_engine(integer_model: Any) -> None:
    """Tokens of either kind may follow those of the other."""
    step = integer_model.compiled
    mixed = iter((decode, step, decode))

    def alternate(*arguments: Any) -> Tensor:
        logits: Tensor = next(mixed)(*arguments)
        return logits

    theirs = logits_of(decode, integer_model, "fastv:k=1,r=0.5")
    ours = logits_of(alternate, integer_model, "fastv:k=1,r=0.5")
    assert_near(ours, theirs)
    with torch.inference_mode():
        batch = tiny.make_batch(integer_model, *PROMPTS)
        states = [prefilled(integer_model, "fastv:k=1,r=0.5", batch) for _ in range(2)]
        for state, run in zip(states, (decode, step), strict=True):
            run(integer_model, torch.tensor([3, 4, 5]), state)
    theirs_after, ours_after = states
    assert ours_after.cache is not None
    assert theirs_after.cache is not None
    assert ours_after.cache.lengths == theirs_after.cache.lengths
    assert torch.equal(ours_after.position, theirs_after.position)
    assert [s.generated for s in ours_after.samples] == [1, 1, 1]


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_layer_is_few_operations(integer_model: Any) -> None:
    """What the engine runs as 80 operations of torch or more."""
    text = integer_model.config.text

    def count(step: Any) -> float:
        with torch.inference_mode():
            state = prefilled(integer_model, "", tiny.make_batch(integer_model, "ttIt"))
            with Operations() as seen:
                step(integer_model, torch.tensor([3]), state)
        return sum(seen.counts.values()) / text.num_hidden_layers

    assert count(integer_model.compiled) < 50 < count(decode)


def test_a_plan_that_chooses_again_goes_through_the_engine(
    integer_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = "fastv:k=1,r=0.5,mode=mask,until=2"
    monkeypatch.setattr(NativeDecode, "run", None)
    batch = tiny.make_batch(integer_model, "ttItttt")
    assert generate(integer_model, batch, parse_plan(plan), max_new_tokens=3)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_other_forms_have_the_engine(folder: Any, quantize: str | None) -> None:
    assert load(folder, quantize=quantize)[0].compiled is None


def test_without_a_library_there_is_the_engine(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_decode, "kernels", lambda: None)
    assert load(folder, quantize="int8")[0].compiled is None


def test_a_width_that_cannot_be_rotated_has_the_engine(integer_model: Any) -> None:
    config = integer_model.config
    text = replace(config.text, intermediate_size=196)  # blocks of 4 columns
    integer_model.config = replace(config, text=text)
    try:
        assert native_decoding(integer_model) is None
    finally:
        integer_model.config = config


# ---------------------------------------------------------------- the functions in C


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("K", [24, 192])
def test_a_normalised_row_has_the_digits_of_torch(compiled: Kernels, digits: int, K: int) -> None:
    x, norm = torch.randn(5, K) * 3, RMSNorm(K, 1e-5)
    norm.weight.data.normal_()
    codes, step = compiled.normalised_to_digits(x, norm.weight, 1e-5, digits, 127)
    expected = to_digits(norm(x), digits, 127)
    assert_same_digits(codes, step, expected.codes, expected.step, digits)


@pytest.mark.parametrize("digits", [1, 2])
def test_a_gated_row_has_the_digits_of_torch(compiled: Kernels, digits: int) -> None:
    gate, x = torch.randn(5, 192) * 20, torch.randn(5, 192)
    codes, step = compiled.gated_to_digits(gate, x, digits, 127)
    expected = to_digits(torch.nn.functional.silu(gate) * x, digits, 127)
    assert_same_digits(codes, step, expected.codes, expected.step, digits)


def assert_same_digits(
    codes: Tensor, step: Tensor, expected: Tensor, expected_step: Tensor, digits: int
) -> None:
    torch.testing.assert_close(step, expected_step, rtol=2e-6, atol=0)
    value, other = (c.float().view(digits, len(step), -1) for c in (codes, expected))
    if digits == 2:
        value, other = value[:1] + value[1:] / 254, other[:1] + other[1:] / 254
    allowed = 1.01 if digits == 1 else 1.01 / 254
    assert (value - other).abs().max() <= allowed
    assert (value - other).abs().mean() <= allowed / 50


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(compiled: Kernels, value: float) -> None:
    x, weight = torch.randn(3, 64), torch.ones(64)
    x[1, 9] = value
    for step in (
        compiled.normalised_to_digits(x, weight, 1e-5, 1, 127)[1],
        compiled.gated_to_digits(torch.ones(3, 64), x, 1, 127)[1],
        compiled.gated_to_digits(x, torch.ones(3, 64), 1, 127)[1],
    ):
        assert step[:, 0].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Dh"), [(1, 4, 4, 128), (3, 4, 2, 24), (2, 2, 1, 8), (1, 6, 2, 40)]
)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_is_that_of_torch(
    compiled: Kernels, B: int, H: int, Hkv: int, Dh: int, ragged: bool, scale: float
) -> None:
    end, room = 37, 50
    q, k, v = torch.randn(B, H, Dh) * scale, torch.randn(B, Hkv, Dh), torch.randn(B, Hkv, Dh)
    angle = torch.randn(B, 1, Dh // 2)
    rope = torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)
    held = torch.randn(2, B, Hkv, room, Dh)
    held[:, :, :, end:] = float("nan")  # nobody reads it
    at = torch.tensor([36, 20, 30])[:B].contiguous() if ragged else None
    visible = torch.arange(end) <= at[:, None] if at is not None else None
    if visible is not None:
        visible[:, 4:9] = False  # a mask of a plan
        visible = visible[:, None, None]
    ours, theirs = held.clone(), held.clone()
    y = compiled.attend_token((q, k, v), rope, (ours[0], ours[1]), end, at, visible)
    for rows, new in ((theirs[0], rotate(k, rope)), (theirs[1], v)):
        write_rows(rows[:, :, :end], new, at)
    parts = (part[:, :, :end] for part in theirs)
    expected = token_attention(rotate(q, rope), *parts, visible).flatten(1)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_attention_to_what_is_not_a_number_is_not_a_number(compiled: Kernels) -> None:
    one, held = torch.ones(1, 1, 8), torch.ones(2, 1, 1, 4, 8)
    held[0, :, :, 1] = float("nan")
    rope = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    y = compiled.attend_token((one, one, one), rope, (held[0], held[1]), 4, None, None)
    assert y.isnan().all()
