"""eval.rivals: what is computed from the measured seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval import rivals
from eval.rivals import Ours, Times, Transformers, take_turns


def test_seconds_of_all_layers() -> None:
    """The decoder's time times 16, the tower's and the output head's once."""
    scaled = Times(vision=1.0, prefill=2.0, per_token=0.5, head=0.1).scale()
    expected = {"vision": 1.0, "prefill": 32.0, "first_token": 33.0, "per_token": 0.4 * 16 + 0.1}
    assert scaled == pytest.approx(expected)


class Fake:
    def __init__(self, name: str, order: list[str], *prefills: float) -> None:
        self.name, self.order, self.prefills = name, order, list(prefills)

    def measure(self) -> Times:
        self.order.append(self.name)
        return Times(0.0, self.prefills.pop(0), 0.0, 0.0)


def test_models_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    models: Any = [Fake("a", order, 99.0, 1.0, 5.0, 2.0), Fake("b", order, 99.0, 3.0, 3.0, 3.0)]
    found = take_turns(models, 3)
    assert order == ["a", "b"] * 4
    assert (found["a"]["prefill"], found["b"]["prefill"]) == (32.0, 48.0)


@pytest.mark.slow
def test_both_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "LAYERS", 1)
    for model in (Transformers("float32", 600), Ours("float32", 600)):
        with torch.inference_mode():
            times = model.measure()
        assert min(times.vision, times.prefill, times.per_token, times.head) > 0
