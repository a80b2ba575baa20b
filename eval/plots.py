"""Plots of results as PNG files: heat maps, curves and bars. They need the extra `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cost import Spread

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
)  # they differ without colour, too

Curve = Sequence[tuple[float, float]]


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib is missing. Commands call it before their work, not after."""
    _pyplot()


def heat_map(
    path: Path,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    labels: tuple[str, str, str],
) -> None:
    """Plot values [row][column] as coloured cells that show their value.

    labels: of the column axis, the row axis and the colour bar.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    low, high = min(map(min, values)), max(map(max, values))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = value < (low + high) / 2
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="w" if dark else "k")
    figure.colorbar(image, label=labels[2])
    _save(plt, figure, axes, path, title, labels[:2])


def curves(
    path: Path,
    lines: Mapping[str, Curve],
    title: str,
    labels: tuple[str, str],
    level: tuple[str, float] | None = None,
    log: bool = False,
) -> None:
    """Plot a line for each name. level: a horizontal line with its name, for the unpruned model."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for i, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), LINE_STYLES[i % len(LINE_STYLES)], label=name)
    if level is not None:
        axes.axhline(level[1], color="0.4", linestyle=":", label=level[0])
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.margins(y=0.08)
    _legend(figure)
    _save(plt, figure, axes, path, title, labels)


def bars(
    path: Path,
    groups: Mapping[str, Mapping[str, float | Spread]],
    title: str,
    label: str,
    log: bool = False,
) -> None:
    """Plot groups of bars with their heights as labels.

    groups: group -> bar -> height; every group has the same bars. A Spread is drawn as its median
    with a line between its quartiles.
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
        spreads = [h if isinstance(h, Spread) else Spread(h, h, h, 1) for h in heights]
        medians = [s.median for s in spreads]
        drawn = axes.bar(places, medians, width, label=name)
        if any(s.low < s.high for s in spreads):
            lines = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            axes.errorbar(places, medians, lines, fmt="none", ecolor="k", capsize=3)
        axes.bar_label(drawn, fmt="%.3g", fontsize="x-small")
    axes.set_xticks(range(len(groups)), groups, fontsize="small")
    if log:
        axes.set_yscale("log")
    axes.margins(y=0.12)
    if len(names) > 1:
        _legend(figure)
    _save(plt, figure, axes, path, title, ("", label))


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
