"""Holding a user's method to its word: whatever is wrong with one is told in one line.

Methods of the package are tested; one in a file of the user's own is being written. Its exceptions
name the method with file and line, what it prints goes to stderr, beside the answer, and what it
chooses is looked at.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import STAGES, Context, Keep, Method


@contextmanager
def at_work(method: Method | type[Method]) -> Iterator[None]:
    """While code of a user's file runs."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and str(error).startswith(method.name):
            raise  # one of our own, that names it
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        where = f"{method.name} ({place(error, method.file)})"
        raise ValueError(f"{where}: {what}{' '.join(str(error).split())}") from error


def place(error: BaseException, file: str) -> str:
    """A user's file, with the line of it that failed."""
    path = str(Path(file).absolute())
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:  # it has no frame
        lines.append(error.lineno)
    return f"{file}, line {lines[-1]}" if lines else file


def guard(method: type[Method]) -> None:
    """Let a user's class tell its mistakes, whatever of Method it overrides."""
    checked: dict[str, Callable[[Any], Any]]
    checked = {"choose": _sound, "vision_layers": _known_states}
    for asked in ("choose", "check", "resolve", "most", "vision_layers"):
        own = getattr(method, asked)
        if own is not getattr(Method, asked):
            own = checked[asked](own) if asked in checked else own
            setattr(method, asked, at_work(method)(own))


def _sound(own: Callable[[Method, Context], Keep]) -> Callable[[Method, Context], Any]:
    """`choose`, its answer checked."""

    @functools.wraps(own)
    def choose(self: Method, c: Context) -> Keep:
        keep = own(self, c)
        _check(self, keep, c)
        return keep

    return choose


def _known_states(own: Callable[[Method, int], tuple[int, ...]]) -> Callable[[Method, int], Any]:
    """`vision_layers`, its answer checked."""

    def vision_layers(self: Method, n_layers: int) -> tuple[int, ...]:
        states = own(self, n_layers)
        if not isinstance(states, tuple) or not all(i in range(n_layers + 1) for i in states):
            raise ValueError(
                f"vision_layers gave {states!r}; it must be a tuple of numbers from 0 to {n_layers}"
            )
        return states

    return vision_layers


def _who(method: Method, asked: str) -> str:
    """The method's name with its file and the line where what was asked begins."""
    code = getattr(inspect.unwrap(getattr(method, asked)), "__code__", None)
    line = f", line {code.co_firstlineno}" if code else ""
    return f"{method.name} ({method.file}{line})"


def check_stages(method: Method) -> None:
    """ValueError where `stages` gives what is no stage."""
    with at_work(method):
        stages = method.stages()
    good = isinstance(stages, tuple) and all(
        isinstance(s, tuple)
        and len(s) == 2
        and s[0] in STAGES
        and isinstance(s[1], int)
        and (s[0] == "decoder" or s[1] == 0)
        for s in stages
    )
    if not good or not stages:
        raise ValueError(
            f"{_who(method, 'stages')}: stages() gave {stages!r}; it must be a tuple of pairs: "
            '("vision", 0) before the projector, ("embed", 0) behind it, ("decoder", K) at the '
            "input of layer K"
        )


def _check(method: Method, keep: object, c: Context) -> None:
    name, n = _who(method, "choose"), len(c.patches)
    if not isinstance(keep, Keep):
        raise ValueError(f"{name}: choose() gave {type(keep).__name__}; return a Keep(index)")
    index = keep.index
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.int64:
        said = f"{tuple(index.shape)} {index.dtype}" if isinstance(index, Tensor) else repr(index)
        hint = "; of a mask, take mask.nonzero()[:, 0]" if "bool" in said else ""
        raise ValueError(f"{name}: Keep.index must be a tensor (K,) of int64, not {said}{hint}")
    found = sorted(index.tolist())
    if found and not 0 <= found[0] <= found[-1] < n:
        wrong = found[0] if found[0] < 0 else found[-1]
        raise ValueError(
            f"{name}: Keep.index has {wrong}, but there are {n} candidates, 0 to {n - 1}"
        )
    if twice := [a for a, b in itertools.pairwise(found) if a == b]:
        raise ValueError(f"{name}: Keep.index has {twice[0]} more than once; name each once")
    for what, rows, count in (("rows", keep.rows, len(index)), ("extra", keep.extra, None)):
        if rows is None:
            continue
        if method.drops_only:
            raise ValueError(f"{name}: Keep.{what} are new rows; say drops_only = False")
        width = c.features().shape[1]
        if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.ndim != 2:
            raise ValueError(f"{name}: Keep.{what} must be a tensor of floats, (rows, {width})")
        if rows.shape[1] != width or count not in (None, len(rows)):
            wanted = "M" if count is None else count
            raise ValueError(
                f"{name}: Keep.{what} is {tuple(rows.shape)}; it must be ({wanted}, {width})"
            )
        if not rows.isfinite().all():
            raise ValueError(f"{name}: Keep.{what} has NaN or infinite numbers")
    if keep.ordered and method.drops_only:
        raise ValueError(f"{name}: Keep.ordered changes the order; say drops_only = False")
