"""Accuracy by the values of one or two options of any method: `ablation --vary`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import plots
from ..plans import NONE, read_plans
from ..run import format_published
from ..statistics import Estimate
from . import base

Point = tuple[str, ...]  # a value for each axis


@dataclass(frozen=True)
class Axis:
    """An option with its values as typed, such as keep with ("8", "16", "32")."""

    option: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> Axis:
        """Read OPTION=V,V,V. Raises ArgumentTypeError for other text."""
        option, _, rest = text.partition("=")
        values = tuple(v.strip() for v in rest.split(",") if v.strip())
        if not option.strip() or not values:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be an option and its values, for example keep=8,16,32"
            )
        return cls(option.strip(), tuple(dict.fromkeys(values)))

    def places(self) -> list[float]:
        """Where the values stand on an axis: at their numbers, or else at 0, 1, 2, ..."""
        try:
            return [float(v) for v in self.values]
        except ValueError:
            return [float(i) for i in range(len(self.values))]


def plans_of(method: str, axes: Sequence[Axis]) -> dict[Point, str]:
    """The text of the plan at each point of the grid."""
    points: list[Point] = [()]
    for axis in axes:
        points = [(*point, v) for point in points for v in axis.values]
    names = [axis.option for axis in axes]
    return {
        point: base.with_options(
            method, ",".join(f"{n}={v}" for n, v in zip(names, point, strict=True))
        )
        for point in points
    }


def run(args: argparse.Namespace) -> str:
    """Ask the grid of plans; args.vary has one Axis or two. Returns the report."""
    axes: list[Axis] = args.vary
    if len(axes) > 2 or len({axis.option for axis in axes}) < len(axes):
        raise ValueError(
            f"--vary has {len(axes)} options; give one or two different ones, for example "
            "--vary keep=8,16,32 layer=2,4"
        )
    plans = plans_of(args.method, axes)
    read = read_plans([NONE, *plans.values()])  # before anything is loaded
    began, bench = time.perf_counter(), base.open_bench(args)
    done = base.ask_all(bench, read)
    found = {point: done[text].scored.estimate() for point, text in plans.items()}
    unpruned = done[NONE].scored
    rows = [
        {
            **dict(zip([axis.option for axis in axes], point, strict=True)),
            **base.score_columns(done[text]),
            **base.cost_columns(done[text]),
            "plan": f"`{text}`",
        }
        for point, text in plans.items()
    ]
    options = " and ".join(axis.option for axis in axes)
    title = f"{args.method}: {options}, {len(bench.items)} questions of {args.task}"
    files = _draw(args.out, axes, found, title, unpruned.score.metric, unpruned.estimate())
    return base.write_report(
        args.out,
        args,
        title,
        {f"unpruned: {unpruned.score.metric} {unpruned.score.value:.2f}": rows},
        files,
        began,
        published=format_published(list(done.values())),
        comparisons=base.compare_with_unpruned(bench, done),
    )


def _draw(
    out: Path,
    axes: Sequence[Axis],
    found: Mapping[Point, Estimate],
    title: str,
    metric: str,
    unpruned: Estimate,
) -> list[str]:
    """Draw curves over the first option, of two options also a heat map; returns the file names."""
    first, files = axes[0], ["curves.png"]
    others: list[Any] = [()] if len(axes) < 2 else [(v,) for v in axes[1].values]
    lines = {
        f"{axes[1].option}={other[0]}" if other else metric: [
            (x, found[(v, *other)]) for x, v in zip(first.places(), first.values, strict=True)
        ]
        for other in others
    }
    ticks = dict(zip(first.places(), first.values, strict=True))
    labels, level = (first.option, metric), ("unpruned", unpruned)
    plots.curves(out / files[0], lines, title, labels, level, ticks=ticks)
    if len(axes) > 1:
        files.insert(0, "heat_map.png")
        values = [[found[(v, *other)] for other in others] for v in first.values]
        heading = f"{title}; unpruned {unpruned.value:.1f}"
        names = (axes[1].option, first.option, metric)
        plots.heat_map(out / files[0], values, first.values, axes[1].values, heading, names)
    return files
