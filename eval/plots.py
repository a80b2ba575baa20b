"""Plots of results as PNG files: heat maps, curves and bars. They need the extra `eval`.

Series differ in colour, in marker or hatching, and in the style of their lines, so that they can be
told apart in grey and by colour-blind people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cost import Spread
from .statistics import Estimate

SIZE = (6.4, 4.2)  # inches
DPI = 130
LINE_STYLES = (
    "o-",
    "s--",
    "^-.",
    "v:",
    "D-",
    "x--",
    "P-.",
    "*:",
)
# Okabe and Ito's colours without yellow, which is too light for lines, and a grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00", "#808080")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")

_CELL: dict[str, Any] = {"ha": "center", "textcoords": "offset points"}

Height = float | Spread | Estimate
Curve = Sequence[tuple[float, Height]]


def span(height: Height) -> tuple[float, float, float]:
    """The value with the ends of its line: quartiles of a Spread, bounds of an Estimate."""
    if isinstance(height, Spread):
        return height.median, height.low, height.high
    if isinstance(height, Estimate):
        return height.value, *(height.bounds or (height.value, height.value))
    return height, height, height


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib is missing. Commands call it before their work, not after."""
    _pyplot()


def heat_map(
    path: Path,
    values: Sequence[Sequence[Estimate]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    labels: tuple[str, str, str],
) -> None:
    """Plot values [row][column] as coloured cells that show their value and its interval.

    labels: of the column axis, the row axis and the colour bar.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    shown = [[cell.value for cell in row] for row in values]
    image = axes.imshow(shown, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    low, high = min(map(min, shown)), max(map(max, shown))
    for i, row in enumerate(values):
        for j, cell in enumerate(row):
            colour = "w" if cell.value < (low + high) / 2 else "k"
            text = f"{cell.value:.1f}"
            axes.annotate(text, (j, i), (0, -1), color=colour, **_CELL, va="bottom")
            if cell.bounds:
                axes.annotate(
                    str(cell), (j, i), (0, -2), color=colour, **_CELL, va="top", fontsize=6
                )
    figure.colorbar(image, label=labels[2])
    _save(plt, figure, axes, path, title, labels[:2])


def curves(
    path: Path,
    lines: Mapping[str, Curve],
    title: str,
    labels: tuple[str, str],
    level: tuple[str, Height] | None = None,
    log: bool = False,
    ticks: Mapping[float, str] | None = None,
    log_x: bool = False,
) -> None:
    """Plot a line for each name, with vertical lines between the bounds of its points.

    Lines are shifted sideways by a hair, so that these do not cover each other. level: a horizontal
    line with its name and a band between its bounds, for the unpruned model. ticks: places on the
    x axis with their labels; by default matplotlib's. log, log_x: logarithmic axes.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    every = [x for points in lines.values() for x, _ in points]
    step = 0.003 * (max(every, default=0.0) - min(every, default=0.0))
    for i, (name, points) in enumerate(lines.items()):
        aside = i - (len(lines) - 1) / 2
        values, lows, highs = zip(*(span(y) for _, y in points), strict=True)
        axes.errorbar(
            [x * 1.006**aside if log_x else x + step * aside for x, _ in points],
            values,
            [_distances(values, lows), _distances(highs, values)],
            fmt=LINE_STYLES[i % len(LINE_STYLES)],
            color=COLOURS[i % len(COLOURS)],
            markersize=5,
            elinewidth=0.9,
            capsize=2,
            label=name,
        )
    if level is not None:
        value, low, high = span(level[1])
        axes.axhline(value, color="0.35", linestyle=(0, (1, 1)), label=level[0])
        if low < high:
            axes.axhspan(low, high, color="0.35", alpha=0.13, linewidth=0)
    if log:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if ticks is not None:
        axes.minorticks_off()
        axes.set_xticks(list(ticks), ticks.values(), fontsize="small")
    axes.grid(alpha=0.3)
    axes.margins(y=0.08)
    _legend(figure)
    _save(plt, figure, axes, path, title, labels)


def points(
    path: Path,
    groups: Mapping[str, Curve],
    title: str,
    labels: tuple[str, str],
    front: Mapping[str, tuple[float, float]],
    level: tuple[str, float],
    end: tuple[str, float],
) -> None:
    """Plot points with vertical lines between their bounds, a marker for each group.

    front: places by name, which are joined by a line and named. level: a horizontal line with its
    name and height, around which the y axis is linear, while it is logarithmic far from it. end: a
    vertical line.
    """
    plt = _pyplot()
    from matplotlib.patheffects import withStroke

    figure, axes = plt.subplots(figsize=(8.0, 5.4), layout="constrained")
    for i, (name, places) in enumerate(groups.items()):
        values, lows, highs = zip(*(span(y) for _, y in places), strict=True)
        axes.errorbar(
            [x for x, _ in places],
            values,
            [_distances(values, lows), _distances(highs, values)],
            fmt=LINE_STYLES[i % len(LINE_STYLES)][0],
            color=COLOURS[i % len(COLOURS)],
            markersize=6,
            elinewidth=0.7,
            capsize=2,
            label=name,
        )
    if front:
        axes.plot(*zip(*front.values(), strict=True), color="0.35", linewidth=1, label="front")
    for name, place in front.items():
        axes.annotate(
            name,
            place,
            (6, 5),
            textcoords="offset points",
            fontsize="x-small",
            path_effects=[withStroke(linewidth=2, foreground="w")],
        )
    axes.axhline(level[1], color="0.35", linestyle=(0, (1, 1)), label=level[0])
    axes.axvline(end[1], color="0.35", linestyle="-.", label=end[0])
    axes.set_yscale("symlog", linthresh=2 * level[1])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.margins(y=0.08, x=0.12)
    _legend(figure)
    _save(plt, figure, axes, path, title, labels)


def bars(
    path: Path,
    groups: Mapping[str, Mapping[str, Height]],
    title: str,
    label: str,
    log: bool = False,
) -> None:
    """Plot groups of bars with their heights as labels.

    groups: group -> bar -> height; every group has the same bars. A Spread is drawn as its median
    with a line between its quartiles, an Estimate with a line between its bounds.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(
        figsize=(max(SIZE[0], 1.1 * len(groups) + 2), SIZE[1]), layout="constrained"
    )
    names = list(next(iter(groups.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        heights = [group[name] for group in groups.values()]
        values, lows, highs = zip(*map(span, heights), strict=True)
        axes.bar(
            places,
            values,
            width,
            label=name,
            color=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="w",
            linewidth=0.5,
        )
        if lows != highs:
            ends = [_distances(values, lows), _distances(highs, values)]
            for colour, wide in (("w", 2.6), ("k", 1.0)):  # black with a light edge, on any bar
                axes.errorbar(
                    places,
                    values,
                    ends,
                    fmt="none",
                    ecolor=colour,
                    capsize=3,
                    elinewidth=wide,
                    capthick=wide,
                )
        for place, value, high in zip(places, values, highs, strict=True):
            axes.annotate(
                f"{value:.3g}",
                (place, high),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize="x-small",
            )
    axes.set_xticks(range(len(groups)), groups, fontsize="small")
    if log:
        axes.set_yscale("log")
    axes.margins(y=0.12)
    if len(names) > 1:
        _legend(figure)
    _save(plt, figure, axes, path, title, ("", label))


def _distances(tops: Sequence[float], bottoms: Sequence[float]) -> list[float]:
    """The lengths of lines; rounding makes none negative."""
    return [max(0.0, top - bottom) for top, bottom in zip(tops, bottoms, strict=True)]


def _legend(figure: Any) -> None:
    """Put the legend below the axes, where it covers nothing."""
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", handlelength=3)


def _save(
    plt: Any, figure: Any, axes: Any, path: Path, title: str, labels: tuple[str, str]
) -> None:
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "plots of results need matplotlib; pip install 'minillava[eval]'"
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
