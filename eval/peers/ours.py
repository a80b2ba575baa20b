"""minillava with random weights in one of its forms, with or without a pruning plan."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from minillava import Batch
from minillava.config import Config
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.pruning.base import Plan

from ..latency import layers_alone, random_batch, random_model, with_layers
from ..plans import NONE, TypedPlan
from .base import ALL_LAYERS, TOKENS, Times, scale

_CPU = torch.device("cpu")


def make_ours(form: str, config: Config, tokens: int, plans: Mapping[str, TypedPlan]) -> list[Ours]:
    """One model of this form, a row for each plan.

    The model has the layers before the last pruning step, and config's number of layers after it.
    """
    layers = config.text.num_hidden_layers + max(full_layers(p.plan) for p in plans.values())
    config = with_layers(config, layers)
    model = random_model(config, form, _CPU)
    batch = random_batch(config, tokens - config.vision.num_patches, _CPU)
    return [
        Ours(f"minillava {form}" + (f", {text}" if text != NONE else ""), model, batch, typed.plan)
        for text, typed in plans.items()
    ]


def full_layers(plan: Plan) -> int:
    """The number of decoder layers before the plan's last step."""
    return plan.segments(ALL_LAYERS)[-1].start


class Ours:
    def __init__(self, name: str, model: LLaVA, batch: Batch, plan: Plan) -> None:
        self.name, self.model, self.batch, self.plan = name, model, batch, plan

    @torch.inference_mode()
    def measure(self) -> Times:
        model, L, n = self.model, self.model.config.text.num_hidden_layers, TOKENS + 1
        plan = self.plan
        report = generate(model, self.batch, plan, max_new_tokens=n, min_new_tokens=n).report
        head = self._head_seconds()
        per_token = scale(report.per_token, head, L)
        if not plan.steps:
            return Times(report.vision, scale(report.prefill, head, L), per_token)
        # The prefill takes a little longer than its layers on random rows take alone, by the same
        # factor with few layers and with all: the latter have less to do besides, if anything.
        entering, k = [rows for (rows,) in report.tokens_entering], full_layers(plan)
        before = layers_alone(model, [*entering[:k], *[0] * (L - k)]) if k else 0.0
        after = layers_alone(model, [*[0] * k, *entering[k:]])
        factor = (report.prefill - head) / (before + after)
        alone = before + after * (ALL_LAYERS - k) / (L - k)
        return Times(report.vision, head + factor * alone, per_token, layers_alone=alone)

    def _head_seconds(self) -> float:
        """Seconds of the output head for one token."""
        row = torch.zeros(1, self.model.config.text.hidden_size, dtype=self.model.dtype)
        start = time.perf_counter()
        for _ in range(TOKENS):
            self.model.llama.logits(row)
        return (time.perf_counter() - start) / TOKENS
