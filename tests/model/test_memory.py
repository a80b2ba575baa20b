"""No tensor of T x T elements is allocated by any method in any mode (T = 4,096, one head).

A dispatch mode sees every tensor that an operator of PyTorch returns. With one head a full map of
attention weights would have T x T elements, and no legitimate tensor here comes near that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillava import parse_plan
from minillava.generate import generate
from minillava.pruning import METHODS
from minillava.pruning.base import Plan

T = 4096


class Largest(TorchDispatchMode):
    """Records the largest tensor, whether attention had a mask, and the query rows of the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operator, self.masked, self.rows = 0, "", False, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if args[1].shape[-2] > T // 2 and mask is not None:  # the decoder's, not a CLIP tower's
                self.masked, self.rows = True, max(self.rows, mask.shape[-2])
            with self:  # see its parts, which inference mode hides
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() > self.elements:
                self.elements, self.operator = tensor.numel(), str(func)
        return result


@pytest.fixture(scope="module")
def long_models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """By the patches along a side of an image."""
    shape = {"heads": 1, "kv_heads": 1, "layers": 4, "width": 16, "positions": 2 * T}
    return {g: tiny.write_model(tmp_path_factory, image_size=14 * g, **shape) for g in (4, 6)}


@pytest.fixture
def long_model(long_models: dict[int, Any], request: pytest.FixtureRequest) -> Any:
    return long_models[tiny.grid_for(request)]


def run(model: Any, plan: Plan, prompts: Sequence[str], **options: Any) -> Largest:
    batch = tiny.make_batch(model, *prompts)
    assert batch.ids.shape[1] >= T
    with Largest() as largest:
        generate(model, batch, plan, max_new_tokens=2, **options)
    return largest


LONG = "t" * 2000 + "I" + "t" * (T - 2000 - 16)
SHORT = "t" * 3000 + "I" + "t" * 20


def assert_small(largest: Largest) -> None:
    """Far below T x T, because even half of the rows by all columns is too much at 7B."""
    assert largest.elements < T * T / 4, f"{largest.operator} made {largest.elements} elements"
    assert largest.rows <= 256, f"a mask of {largest.rows} query rows"


@pytest.mark.parametrize("name", ["", *METHODS])
def test_no_method_allocates_a_full_map(long_model: Any, name: str) -> None:
    plan = tiny.example(name) if name else parse_plan(None)
    largest = run(long_model, plan, [LONG])
    assert_small(largest)
    assert not largest.masked, "an unpadded prompt that drops needs no mask"


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.drops_only])
def test_nor_does_mask_mode(long_model: Any, name: str) -> None:
    largest = run(long_model, tiny.example(name, "mode=mask", "positions=original"), [LONG])
    assert_small(largest)
    assert largest.masked


@pytest.mark.parametrize("text", [None, "fastv:k=2,r=0.5", "fastv:k=2,r=0.5,mode=mask"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_nor_does_a_padded_batch(long_model: Any, text: str | None, use_cache: bool) -> None:
    assert_small(run(long_model, parse_plan(text), [LONG, SHORT], use_cache=use_cache))


@torch.inference_mode()
def test_the_watcher_sees_a_full_map_also_inside_attention() -> None:
    x = torch.randn(1, 1, T, 4)
    with Largest() as largest, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(x, x, x)
    assert largest.elements >= T * T
