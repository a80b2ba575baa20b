"""A plan that a person typed, at other budgets of image tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from minillava.llava import LLaVA
from minillava.pruning.average import variants_of
from minillava.pruning.parsing import write_plan

from .plans import TypedPlan


def parse_budget(text: str) -> float:
    """Image tokens that are left of an image: a number, 1 or more, or with a point a share."""
    try:
        value = float(text) if text.isascii() and "_" not in text else -1.0
    except ValueError:
        value = -1.0
    if not (0 < value < 1 if "." in text else value >= 1 and value.is_integer()):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of image tokens, or a share such as 0.25"
        )
    return value


def count_tokens(budgets: Sequence[float], n_tokens: int) -> list[int]:
    """The budgets of an image with n_tokens, as whole numbers, the largest first (ValueError)."""
    found = [max(1, round(b * n_tokens)) if b < 1 else int(b) for b in budgets]
    if strange := [b for b in found if b > n_tokens]:
        raise ValueError(
            f"--budgets {strange[0]} must be from 1 to {n_tokens}, the image tokens of an image"
        )
    return sorted(set(found), reverse=True)


def with_budget(plan: TypedPlan, model: LLaVA, budget: int) -> TypedPlan:
    """The plan with `budget` image tokens of an image left at the end.

    The options of the method that acts last are changed. Where they allow no such number, it is the
    next lower one, or the lowest. Raises ValueError if none of them says how
    many tokens are left.
    """
    layers, patches = model.config.text.num_hidden_layers, model.config.vision.num_patches
    solved = plan.plan.resolve(layers, patches)
    reason = f"no option of {plan.text} sets how many image tokens are left; leave --budgets out"
    if not solved.steps:
        raise ValueError(reason)
    last = solved.steps[-1].method
    try:
        variants = variants_of(last, layers, patches)
        left = [variant.left(patches)[-1] for variant in variants]
    except (ValueError, IndexError, NotImplementedError):
        raise ValueError(reason) from None
    if len(set(left)) < 2:
        raise ValueError(reason)
    near = variants[min(range(len(left)), key=lambda i: (left[i] > budget, abs(left[i] - budget)))]
    methods = tuple(near if method is last else method for method in solved.methods)
    varied = replace(solved, methods=methods)
    text = write_plan(varied)
    return TypedPlan(text, replace(varied, text=text), plan.method_files)


def tokens_left(plan: TypedPlan, model: LLaVA) -> float:
    """The image tokens of an image that a plan of with_budget leaves at the end."""
    return plan.plan.steps[-1].method.left(model.config.vision.num_patches)[-1]


def at_budgets(
    plans: Sequence[TypedPlan], model: LLaVA, budgets: Sequence[int]
) -> dict[str, TypedPlan]:
    """Each plan at each budget, by text."""
    every = [with_budget(plan, model, budget) for plan in plans for budget in budgets]
    return {plan.text: plan for plan in every}
