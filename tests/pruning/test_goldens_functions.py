"""Methods whose released choice was run alone, on drawn tensors, against its outputs.

tests/goldens/functions holds them. The Context is a stand-in that hands over these tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from golden_cases import Golden
from torch import Tensor

from minillava.llama import Llama
from minillava.pruning import autoprune
from minillava.pruning.ivcprune import IVCPrune
from minillava.pruning.vlmpruner import VLMPruner
from minillava.rows import TEXT


@dataclass
class Given:
    """What a choice reads of a prompt with one image at rows start..start + n - 1."""

    x: Tensor  # (S, D) hidden states
    start: int
    n: int
    grid: int = 24
    where: str = "layer 2"

    def __post_init__(self) -> None:
        self.candidates = torch.arange(self.start, self.start + self.n)
        rows = torch.arange(len(self.x))
        self.text_rows = rows[self.start + self.n :]
        text = torch.cat((rows[: self.start], self.text_rows))
        self.rows = SimpleNamespace(position=rows, of_image=lambda i: text if i == TEXT else None)
        self.n_tokens = self.n

    def features(self) -> Tensor:
        return self.x[self.candidates]

    def whole_patches(self) -> Tensor:
        return torch.arange(self.n)


@pytest.mark.goldens("functions/vlmpruner_*")
def test_vlmpruner(golden: Golden) -> None:
    p = golden.meta["parameters"]
    states = golden["left"].float() @ golden["right"].float()
    c: Any = Given(states, 0, len(states), p["grid"])
    c.keys = lambda: golden["keys"].float()
    options = {name: p[name] for name in ("keep", "threshold", "batch", "pivots")}
    keep = VLMPruner(**options).choose(c)
    index, order = keep.index.sort()
    assert index.tolist() == golden["kept"].tolist()
    tiny.assert_close(keep.merged[order, ::48], golden["rows"])


@pytest.mark.goldens("functions/ivcprune_*")
def test_ivcprune(golden: Golden) -> None:
    c = ivcprune_context(golden)
    p, method = golden.meta["parameters"], IVCPrune(layer=2)
    assert method.choose(c).index.tolist() == golden["kept"].tolist()
    whole, *cut = golden["cache_lengths"].tolist()
    assert method.cut_from == 1
    assert cut == [whole - p["tokens"] + len(golden["kept"])] * 3


@pytest.mark.goldens("functions/ivcprune_*")
def test_ivcprunes_released_window(golden: Golden) -> None:
    """The same rows where the image begins 7 rows later than the released code was told: that
    counts 7 rows of text into the window, and the image's last 7 into the question."""
    c, p = ivcprune_context(golden), golden.meta["parameters"]
    rows, start = torch.arange(len(c.x)), p["start"] + 7
    is_text = (rows < start) | (rows >= start + p["tokens"])
    c.rows.of_image = lambda i: rows[is_text] if i == TEXT else None
    c.text_rows = rows[start + p["tokens"] :]
    method = IVCPrune(layer=2, released=True)
    assert method.shift(36) == -31
    assert method.choose(c).index.tolist() == golden["kept"].tolist()
    assert IVCPrune(layer=2).choose(c).index.tolist() != golden["kept"].tolist()


def ivcprune_context(golden: Golden) -> Any:
    p, values = golden.meta["parameters"], golden["values"].float() * 0.7
    c: Any = Given(values, p["start"], p["tokens"])
    c.before = lambda rows: values[rows]
    attn = SimpleNamespace(v_proj=None, heads=lambda _, x: x.view(len(x), p["heads"], -1))
    block = SimpleNamespace(norm1=lambda x: x, attn=attn)
    llama: Any = SimpleNamespace(norm=SimpleNamespace(weight=values), whole_heads=lambda x: x)
    llama.config = SimpleNamespace(
        head_dim=values.shape[1] // p["heads"], rope_theta=p["rope_theta"], rope_factor=1.0
    )
    llama.rope = lambda positions: Llama.rope(llama, positions)
    c.model = SimpleNamespace(block=lambda i: block, llama=llama)
    return c


@pytest.mark.goldens("functions/autoprune")
def test_autoprunes_curves(golden: Golden) -> None:
    p = golden.meta["parameters"]
    columns = (golden[name].tolist() for name in ("information", "n", "target", "depth", "counts"))
    for information, n, target, depth, counts in zip(*columns, strict=True):
        slope = max(p["k0"] - p["gamma"] * information, 0.0)
        shares = autoprune.curve(slope, p["x0"], n, target, min(int(2.5 * target), 576), depth)
        assert [ceil((n - 1) * share) for share in shares] == counts[: depth - 1]
    weights = golden["attention"]  # (H, t, n)
    c: Any = SimpleNamespace(attention_by_row=lambda rows: weights.split(2, 1))
    ours = autoprune.mutual_information(c, torch.arange(5), weights.mean(1))
    golden.assert_close(ours[None], "mutual")
