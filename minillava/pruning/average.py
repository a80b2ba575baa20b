"""Budgets as papers state them: image tokens ENTERING a layer, averaged over the layers.

`average=192` is not an option of a method but a result of its options: with 32 layers and 576 image
tokens, FastV at layer 2 reaches 191.6 by keeping 166. A plan of one method with average= is solved
against the model before anything runs: of the method's variants(), the one whose average is nearest
is taken. Any method works whose left() says how many tokens stay, also a user's. Where that depends
on the image (Method.adaptive), `python -m eval.fit PLAN` solves average= over a set of samples.

What a run really did can be counted from its report's image_tokens_entering, with entering() as
above, or with leaving() as SparseVLM's released counter does, which counts a layer whose output is
pruned as if its input had been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from .base import Method, Plan, Step

SLACK = 0.5  # tokens by which average= may lie out of reach, since people type it rounded


@dataclass(frozen=True)
class AveragePlan(Plan):
    """A plan of one method whose average is given: AveragePlan((FastV(layer=2),), average=192)."""

    average: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.methods) != 1:
            raise ValueError(
                f"average={self.average} is solved for one method alone, this plan has "
                f"{len(self.methods)}; give the options that say how many tokens stay"
            )
        if self.methods[0].scope == "all":
            name = self.methods[0].name
            raise ValueError(f"{name}: average={self.average} counts one image; give keep=")

    def resolve(self, n_layers: int, n_tokens: int) -> Plan:
        """The plan with the variant of its method whose average is nearest on this model."""
        method = nearest_variant(self.methods[0], self.average, n_layers, n_tokens)
        return Plan((method,), self.tokens, self.focus, self.text)


def nearest_variant(method: Method, average: float, n_layers: int, n_tokens: int) -> Method:
    """Of a method's variants, the one whose average is nearest; of equally near ones the first."""
    if method.adaptive:
        raise ValueError(
            f"{method.label}: average={average} depends on the images; python -m eval.fit "
            f"{method.label}:average={average} finds the options that reach it on samples"
        )
    variants = variants_of(method, n_layers, n_tokens)
    if not variants:
        raise ValueError(
            f"{method.label}: average={average} cannot be solved for these options; variants() "
            "gives nothing to choose from (without an option `keep`, the method has to define it)"
        )
    if type(method).left is Method.left:
        raise ValueError(
            f"{method.label}: average={average} needs to know how many image tokens stay; define "
            "left(n_tokens), a tuple with one number for each stage"
        )
    found = [(average_entering(variant, n_layers, n_tokens), variant) for variant in variants]
    reached, nearest = min(found, key=lambda pair: abs(pair[0] - average))
    averages = [reached for reached, _ in found]
    if not min(averages) <= average <= max(averages) and abs(reached - average) > SLACK:
        raise ValueError(
            f"{method.name}: average={average} is out of reach with {n_layers} layers and "
            f"{n_tokens} image tokens; the nearest is average={reached:.1f} "
            f"({describe_options(nearest, method)})"
        )
    return nearest


def describe_options(variant: Method, method: Method) -> str:
    """The options in which a variant differs from its method: "keep=16"."""
    words = []
    for name in (f.name for f in fields(cast(Any, variant))):
        value = getattr(variant, name)
        if repr(value) != repr(getattr(method, name)):  # 1 is a number of tokens, 1.0 a share
            values = value if isinstance(value, tuple) else (value,)
            said = "/".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values)
            words.append(f"{name}={said}")
    return ", ".join(words) or "with these options"


def variants_of(method: Method, n_layers: int, n_tokens: int) -> list[Method]:
    """What average= chooses among: the method's variants(), or it with every value of keep."""
    if type(method).variants is Method.variants and any(f.name == "keep" for f in fields(method)):
        return [replace(cast(Any, method), keep=k) for k in range(1, n_tokens + 1)]
    return list(method.variants(n_layers, n_tokens))


def average_entering(method: Method, n_layers: int, n_tokens: int) -> float:
    """Image tokens of one image that enter a decoder layer, averaged over the layers."""
    total, now, since = 0, n_tokens, 0
    steps = [Step(0, method, i, *place) for i, place in enumerate(method.stages())]
    for step in steps:
        total += now * (step.layer - since)
        now, since = step.left(n_tokens), step.layer
    return (total + now * (n_layers - since)) / n_layers


def most_entering(plan: Plan, n_layers: int, n_tokens: int) -> float | None:
    """Image tokens of one image that enter a decoder layer under a plan, averaged over the layers,
    at most: no image exceeds it. None: a mask that ends, or a budget for all images."""
    if any(m.until is not None or m.scope == "all" for m in plan.methods):
        return None
    now, entering = n_tokens, [n_tokens] * n_layers
    for step in plan.steps:
        left = step.left(n_tokens)
        now = min(now, left) if step.method.drops_only else left
        entering[step.layer :] = [now] * (n_layers - step.layer)
    return sum(entering) / n_layers


def entering(layers: Sequence[Sequence[int]]) -> list[float]:
    """Average over layers of the image tokens that enter them: counts [layer][b] -> [b]."""
    return [sum(counts) / len(counts) for counts in zip(*layers, strict=True)]


def leaving(layers: Sequence[Sequence[int]]) -> list[float]:
    """The same for the tokens that leave a layer for the next: SparseVLM's own counter."""
    return entering([*layers[1:], layers[-1]])
