"""Decoding of integer weights with the operations between the products in C."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillava import Batch, load, parse_plan
from minillava.cache import KVCache
from minillava.config import TextConfig
from minillava.engine import State, decode, hidden_states_read, prefill
from minillava.generate import generate
from minillava.llama import MLP, Block
from minillava.loading import native_decode
from minillava.loading.compiled import run_blocks
from minillava.loading.native_decode import NativeDecode, native_decoding
from minillava.quant.integer import Int4Linear, Int8Linear
from minillava.quant.native import FEW_ROWS, Kernels, kernels
from minillava.quant.quantise import to_int4, to_int8
from minillava.quant.stored import Int4, Int8
from minillava.request import prompts_of
from minillava.sample import CacheView

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
        "simignore:keep=4,mode=mask",
        "random:keep=6,mode=mask+fastv:k=1,keep=3,cache=all",  # masked rows leave the cache
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


@pytest.mark.parametrize(("plan", "calls"), [("", 1), ("fastv:k=1,r=0.5", 2)])
def test_a_token_is_one_call_for_each_segment(
    integer_model: Any, compiled: Kernels, monkeypatch: pytest.MonkeyPatch, plan: str, calls: int
) -> None:
    """Beside the digits and the product of the output head."""
    seen: Counter[str] = Counter()
    with torch.inference_mode():
        state = prefilled(integer_model, plan, tiny.make_batch(integer_model, *PROMPTS))
        call = compiled._call

        def count(name: str, *arguments: Any) -> None:
            seen[name] += 1
            call(name, *arguments)

        monkeypatch.setattr(compiled, "_call", count)
        integer_model.compiled(integer_model, torch.tensor([3, 4, 5]), state)
    assert seen.pop("decode_layers") == calls
    assert all(n == 1 for n in seen.values())


def test_more_samples_than_few_rows_are_those_of_the_engine(integer_model: Any) -> None:
    batch = tiny.make_batch(integer_model, *["tt"] * (FEW_ROWS + 1))
    ours = logits_of(integer_model.compiled, integer_model, "", batch)
    assert torch.equal(ours, logits_of(decode, integer_model, "", batch))


# ---------------------------------------------------------------- weights that change


def in_place(model: Any) -> None:
    model.block(1).attn.q_proj.scale.mul_(1.5)


def in_data(model: Any) -> None:
    layer = model.block(2).mlp.down_proj
    layer.weight.data = layer.weight.data.flip(0)


def in_the_module(model: Any) -> None:
    model.block(1).norm2.weight = torch.nn.Parameter(model.block(1).norm2.weight * 2)


def by_another_layer(model: Any) -> None:
    mlp = model.block(3).mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def by_another_block(model: Any) -> None:
    model.llama.blocks[0] = deepcopy(model.llama.blocks[2])


def by_loading(model: Any) -> None:
    state = {name: t.clone() for name, t in model.llama.state_dict().items()}
    state["blocks.1.attn.o_proj.weight"] = state["blocks.1.attn.o_proj.weight"].flip(1)
    model.llama.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change", [in_place, in_data, in_the_module, by_another_layer, by_another_block, by_loading]
)
def test_changed_weights_are_read(folder: Any, change: Any) -> None:
    model = load(folder, quantize="int8")[0]
    if model.compiled is None:
        pytest.skip("other layers multiply this form here")
    batch = tiny.make_batch(model, "tt")
    before = logits_of(model.compiled, model, "", batch)
    change(model)
    after = logits_of(model.compiled, model, "", batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits_of(native_decoding(model), model, "", batch))


def double(*args: Any) -> Any:
    return 2.0 * args[-1]


def add_hook(block: Any) -> Any:
    return block.register_forward_hook(double)


def add_inner_hook(block: Any) -> Any:
    return block.mlp.down_proj.register_forward_hook(double)


def add_hook_before(block: Any) -> Any:
    return block.norm2.register_forward_pre_hook(lambda _, args: (args[0] + 1.0, *args[1:]))


@pytest.mark.parametrize("add", [add_hook, add_inner_hook, add_hook_before])
def test_a_hook_runs_until_it_is_removed(integer_model: Any, add: Any) -> None:
    batch = tiny.make_batch(integer_model, "tItt")

    def both() -> tuple[Tensor, Tensor]:
        ours, theirs = (logits_of(s, integer_model, "", batch) for s in (step, decode))
        return ours, theirs

    step = integer_model.compiled
    before, _ = both()
    hook = add(integer_model.block(1))
    try:
        hooked, expected = both()
    finally:
        hook.remove()
    assert_near(hooked, expected)
    assert not torch.allclose(hooked, before, atol=0.05 * float(before.abs().max()))
    assert torch.equal(both()[0], before)


def by_another_norm(block: Any, _: pytest.MonkeyPatch) -> None:
    norm = torch.nn.LayerNorm(128, bias=False)
    norm.weight = block.norm1.weight
    block.norm1 = norm


class DoubledMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def by_another_class(block: Any, _: pytest.MonkeyPatch) -> None:
    block.mlp.__class__ = DoubledMLP


class DoubledBlock(Block):
    def forward(self, *args: Any) -> Any:
        return 2.0 * super().forward(*args)


def by_another_class_of_the_layer(block: Any, _: pytest.MonkeyPatch) -> None:
    block.__class__ = DoubledBlock


def by_a_class_that_was_changed(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLP, "forward", lambda self, x: 2.0 * self.down_proj(self.up_proj(x)))


def by_a_hook_of_all(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(module: Any, __: Any, y: Tensor) -> Tensor | None:
        return 2.0 * y if isinstance(module, MLP) else None

    monkeypatch.setitem(torch.nn.modules.module._global_forward_hooks, 0, hook)


@pytest.mark.parametrize(
    "change",
    [
        by_another_norm,
        by_another_class,
        by_another_class_of_the_layer,
        by_a_class_that_was_changed,
        by_a_hook_of_all,
    ],
)
def test_other_code_in_a_layer_runs(
    folder: Any, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, quantize="int4")[0]
    batch = tiny.make_batch(model, "tItt")
    before = logits_of(model.compiled, model, "", batch)
    change(model.block(1), monkeypatch)
    ours, theirs = (logits_of(step, model, "", batch) for step in (model.compiled, decode))
    monkeypatch.undo()
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, before, atol=0.05 * float(before.abs().max()))


def test_a_layer_that_was_replaced_is_not_kept(folder: Any) -> None:
    model = load(folder, quantize="int4")[0]
    old = weakref.ref(model.block(1))
    logits_of(model.compiled, model, "", tiny.make_batch(model, "tt"))
    model.llama.blocks[1] = deepcopy(model.block(1))
    gc.collect()
    assert old() is None


def test_a_forward_that_was_replaced_runs(
    integer_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, ran = integer_model.block(1), []
    forward = block.mlp.forward

    def spy(x: Tensor) -> Tensor:
        ran.append(len(x))
        return forward(x)

    monkeypatch.setattr(block.mlp, "forward", spy)
    logits_of(integer_model.compiled, integer_model, "", tiny.make_batch(integer_model, "tt"))
    assert ran == [2, *[1] * len(TOKENS)]  # the prefill, then each token


def test_a_layer_of_another_form_is_run_by_torch(folder: Any) -> None:
    model = load(folder, quantize="int8")[0]
    if model.compiled is None:
        pytest.skip("other layers multiply this form here")
    mlp, batch = model.block(1).mlp, tiny.make_batch(model, "tt")
    mlp.down_proj = torch.nn.Linear(192, 128, bias=True)
    ours = logits_of(model.compiled, model, "", batch)
    assert torch.equal(ours, logits_of(decode, model, "", batch))


def test_a_model_that_was_converted_is_refused(integer_model: Any) -> None:
    model = deepcopy(integer_model).half()
    with pytest.raises(ValueError, match=r"got a tensor of torch.float16 on cpu, .* load it with"):
        logits_of(integer_model.compiled, model, "", tiny.make_batch(model, "tt"))


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


def test_layers_that_compute_differently_have_the_engine(folder: Any) -> None:
    model, other = (load(folder, quantize=form)[0] for form in ("int8-dynamic", "int4"))
    if other.compiled is None or model.compiled is None:
        pytest.skip("other layers multiply these forms here")
    for block, its in zip(model.llama.blocks, other.llama.blocks, strict=True):
        block.mlp.down_proj = its.mlp.down_proj
    assert native_decoding(model) is None


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


def pass_through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy", [deepcopy, pass_through_pickle])
def test_a_copy_of_a_model_decodes_as_it(integer_model: Any, copy: Any) -> None:
    batch = tiny.make_batch(integer_model, *PROMPTS)
    copied = copy(integer_model)
    assert copied.compiled is not integer_model.compiled
    ours, theirs = (logits_of(m.compiled, m, "", batch) for m in (copied, integer_model))
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- one layer


def random_layer(
    compiled: Kernels, D: int, M: int, H: int, Hkv: int, form: str = "two digits"
) -> tuple[Block, NativeDecode]:
    """A layer with integer weights; two digits round as finely as float32 errs."""
    config = TextConfig(
        hidden_size=D, intermediate_size=M, num_attention_heads=H, num_key_value_heads=Hkv,
        head_dim=D // H,
    )  # fmt: skip
    block = Block(config).requires_grad_(False)
    for part in (block.attn, block.mlp):
        for name, layer in list(part.named_children()):
            weight = torch.randn_like(layer.weight) * 2 / layer.in_features**0.5
            made: Int4Linear | Int8Linear
            if form == "int4":
                made = Int4Linear(Int4(*to_int4(weight)), None)
            else:
                made = Int8Linear(Int8(*to_int8(weight)), None, 2 if form == "two digits" else 1)
            setattr(part, name, made)
    for norm in (block.norm1, block.norm2):
        norm.weight.normal_()
    return block, NativeDecode(compiled, config, block)


def random_rope(B: int, Dh: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(B, 1, Dh // 2)
    return torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Dh"), [(1, 4, 4, 128), (3, 4, 2, 24), (2, 2, 1, 8), (1, 6, 2, 40)]
)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_layer_is_that_of_torch(
    compiled: Kernels, B: int, H: int, Hkv: int, Dh: int, ragged: bool, scale: float
) -> None:
    torch.manual_seed(0)
    end, room = 37, 50
    block, decoding = random_layer(compiled, H * Dh, 192, H, Hkv)
    block.norm2.weight.mul_(scale)  # wide gates
    x, rope, held = torch.randn(B, H * Dh), random_rope(B, Dh), torch.randn(2, B, Hkv, room, Dh)
    held[:, :, :, end:] = float("nan")  # nobody reads it
    at = torch.tensor([36, 20, 30])[:B].contiguous() if ragged else None
    visible = torch.arange(end) <= at[:, None] if at is not None else None
    if visible is not None:
        visible[:, 4:9] = False  # a mask of a plan
        visible = visible[:, None, None]
    view, ours, theirs = CacheView(end, at, visible), held.clone(), held.clone()
    before = x.clone()
    y = decoding.run([block], x, rope, [(ours[0], ours[1])], view)
    expected = run_blocks([block], x, rope, [(theirs[0], theirs[1])], view)
    assert torch.equal(x, before)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)
    tiny.assert_close(y, expected, 1e-3)
    assert block in decoding.prepared  # native.c ran it


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "up_proj", "gate_proj", "cache"])
def test_what_is_not_finite_stays_so(compiled: Kernels, where: str, value: float) -> None:
    block, decoding = random_layer(compiled, 64, 64, 2, 2)
    x, held = torch.randn(3, 64), torch.randn(2, 3, 2, 4, 32)
    if where == "x":
        x[1, 9] = value
    elif where == "cache":
        held[0, 1, :, 1] = value
    else:
        getattr(block.mlp, where).scale[5] = value
    view = CacheView(4, None, None)
    y = decoding.run([block], x, random_rope(3, 32), [(held[0], held[1])], view)
    alone = where in ("x", "cache")
    assert y.isfinite().all(1).tolist() == ([True, False, True] if alone else [False] * 3)


@pytest.mark.parametrize("form", ["one digit", "int4"])
def test_coarser_digits_are_those_of_torch(compiled: Kernels, form: str) -> None:
    """One digit that rounds the other way moves a result by about 1 % of it: most must be equal."""
    torch.manual_seed(0)
    block, decoding = random_layer(compiled, 128, 192, 4, 2, form)
    x, rope, held = torch.randn(3, 128), random_rope(3, 32), torch.randn(2, 3, 2, 9, 32)
    view, theirs = CacheView(9, None, None), held.clone()
    y = decoding.run([block], x, rope, [(held[0], held[1])], view)
    expected = run_blocks([block], x, rope, [(theirs[0], theirs[1])], view)
    assert block in decoding.prepared
    error = (y - expected).abs() / expected.square().mean().sqrt()
    assert error.median() < 1e-4
    assert error.max() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.half(), "got a tensor of torch.float16"),
        (lambda rows: rows.transpose(2, 3).contiguous().transpose(2, 3), "row by row"),
        (lambda rows: rows[:, :, :3].contiguous(), "a token that sees 4 rows"),
        (lambda rows: rows[:, :1].contiguous(), "rows of the cache are"),
    ],
)
def test_a_cache_that_cannot_be_read_is_refused(
    compiled: Kernels, change: Any, message: str
) -> None:
    block, decoding = random_layer(compiled, 64, 64, 2, 2)
    held = change(torch.randn(3, 2, 4, 32))
    with pytest.raises(ValueError, match=message):
        decoding.run(
            [block],
            torch.randn(3, 64),
            random_rope(3, 32),
            [(held, held)],
            CacheView(4, None, None),
        )
