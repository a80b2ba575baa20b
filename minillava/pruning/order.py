"""Which methods can follow which in a plan: refused before any forward.

A method that cannot choose among whatever earlier steps leave names what it needs as its
`check_order`: need_all_patches, need_patches or need_layer_before. They read what methods declare:
left() and `adaptive` say whether patches are missing, `adds_rows` whether there are other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import Method, Step


def need_all_patches(method: Method, steps: Sequence[Step], per_image: int, n_images: int) -> None:
    """The first stage needs every patch of the image: no earlier step may drop or add rows."""
    *earlier, own = steps
    for step in earlier if own.stage_index == 0 else ():
        tokens = per_image * (n_images if step.method.scope == "all" else 1)
        left = step.left(tokens)
        if step.method.adaptive or step.method.adds_rows or left < tokens:
            most = "at most " * step.method.adaptive
            raise refusal(own, step, "every patch of the image", f"{most}{left} of {tokens} rows")


def need_patches(method: Method, steps: Sequence[Step], per_image: int, n_images: int) -> None:
    """The first stage ranks patches by what the vision tower or the grid says of each."""
    *earlier, own = steps
    for step in earlier if own.stage_index == 0 else ():
        if step.method.adds_rows:
            raise refusal(own, step, "nothing but patches", "rows that are no patches, too")


def need_layer_before(method: Method, steps: Sequence[Step], per_image: int, n_images: int) -> None:
    """Every stage reads the rows as they entered the layer before."""
    *earlier, own = steps
    for step in earlier:
        if step.layer == own.layer and step.stage == own.stage and step.method.adds_rows:
            raise refusal(own, step, "rows of the layer before", "rows that are new there")


def refusal(own: Step, earlier: Step, needed: str, left: str) -> ValueError:
    """The error for a step that cannot follow an earlier one."""
    name, other = own.method.label, earlier.method.label
    at = f"layer {own.layer}" if own.stage == "decoder" else f"the {own.stage} stage"
    movable = own.stage_index == 0 and (own.stage, own.layer) == (earlier.stage, earlier.layer)
    movable = movable and type(earlier.method).check_order is not need_all_patches
    advice = f"write {name} before {other}, or " * movable
    return ValueError(
        f"{other}+{name}: at {at} {name} needs {needed}, but {other} leaves {left}; "
        f"{advice}leave one of them out"
    )
