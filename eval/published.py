"""Published figures of LLaVA-1.5 with and without pruning, each with its source and protocol.

    python -m eval.published                      every figure, source by source
    python -m eval.published --task gqa           the figures of one task
    python -m eval.published --method fastv       of one method, with its sources' unpruned rows
    python -m eval.published --json               the same as JSON, one object for each figure

published.json has them as the sources print them: a row is a method at a budget, a column is a task
with its split, metric and protocol. `tabulate` compares measured figures with them. A measured
figure is compared with a published one only if task, split, metric, model, convention and weights
are the same, and every source has its own unpruned row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillava import parse_plan
from minillava.app.command import CommandParser, run_command
from minillava.pruning import Method

from .plans import files_of

FILE = Path(__file__).with_name("published.json")
TASKS = (
    "scienceqa",
    "aokvqa",
    "ocrvqa",
    "gqa",
    "seed_bench",
    "mmmu",
    "mme",
    "pope",
    "textvqa",
    "vqav2",
    "mmbench",
    "nocaps",
    "coco2014",
    "coco2017",
    "flickr30k",
    "refcoco",
    "refcoco+",
    "refcocog",
)
CONVENTIONS = ("llava", "lmms", "own", "unknown")
LAYERS = {"llava-1.5-7b": 32, "llava-1.5-13b": 40}
PATCHES = 576
UNPRUNED = "unpruned"
UNQUANTISED = "unquantised"


@dataclass(frozen=True)
class Protocol:
    """How a figure was measured. None means that the source does not say.

    Unstated weights count as unquantised, the default of the released scripts.
    """

    convention: str  # for prompts and scoring: llava, lmms, own or unknown
    weights: str | None = None
    image: str | None = None  # pad or crop
    prompt: str | None = None
    new_tokens: int | None = None
    hardware: str | None = None
    note: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """The convention and weights, which must be equal for two figures to be compared."""
        return self.convention, self.weights or UNQUANTISED


@dataclass(frozen=True)
class Source:
    """A published table. budget: the meaning of its numbers of tokens."""

    id: str
    title: str
    reference: str
    read: str  # the copy from which its figures were read
    budget: str | None
    recalled: bool
    note: str | None
    unpruned_note: str | None
    no_unpruned: str | None  # why there is no unpruned row


@dataclass(frozen=True)
class Figure:
    """One published figure. low and high differ if reprints of the table differ."""

    source: Source
    task: str
    split: str
    metric: str
    model: str
    method: str
    plan: str | None  # as text for parse_plan; None: no plan expresses it
    plan_stated: bool  # False: the source does not state its settings, this is the nearest plan
    tokens: int | None  # as the source states them
    low: float
    high: float
    protocol: Protocol
    contested: str | None
    note: str | None
    no_unpruned: str | None

    @property
    def group(self) -> Group:
        return Group(self.task, self.split, self.metric, self.model, *self.protocol.key)


@dataclass(frozen=True)
class Group:
    """Figures may be compared only within one group."""

    task: str
    split: str
    metric: str
    model: str
    convention: str
    weights: str

    def __str__(self) -> str:
        return (
            f"{self.task} ({self.split}), {self.metric}, {self.model}, "
            f"{self.convention} protocol, {self.weights}"
        )


@dataclass(frozen=True)
class Measured:
    """A measured figure, with the fields of `Figure`; plan "none" is the unpruned model."""

    task: str
    split: str
    metric: str
    model: str
    plan: str
    convention: str
    weights: str
    value: float

    @property
    def group(self) -> Group:
        return Group(self.task, self.split, self.metric, self.model, self.convention, self.weights)


@dataclass(frozen=True)
class Table:
    """The measured figures of a group with the published ones, a column for each source."""

    group: Group
    sources: tuple[Source, ...]
    rows: tuple[
        tuple[str, float | None, tuple[Figure | None, ...]], ...
    ]  # plan, measured, published


# ---------------------------------------------------------------- the file


def read_figures(path: Path = FILE) -> tuple[Figure, ...]:
    """All figures, checked. Raises ValueError, one line, for a mistake in the file."""
    try:
        data = json.loads(path.read_text("utf-8"))
        figures = tuple(_figures(data))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a field is missing or of the wrong type: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for figure in figures:
        if figure.no_unpruned is None and unpruned(figures, figure) is None:
            raise ValueError(
                f"{path}: {figure.source.id} has no unpruned row for {figure.group}; add it, or "
                "say why in no_unpruned"
            )
    return figures


def _figures(data: dict[str, Any]) -> Iterable[Figure]:
    sources = {}
    for name, entry in data["sources"].items():
        texts = {k: entry.get(k) for k in ("budget", "note", "unpruned_note", "no_unpruned")}
        required = {k: _required(name, k, entry[k]) for k in ("title", "reference", "read")}
        sources[name] = Source(id=name, recalled=entry.get("recalled", False), **required, **texts)
    for row in data["rows"]:
        entry, source = data["sources"][row["source"]], sources[row["source"]]
        _check_row(row)
        for name, value in row["values"].items():
            column = entry["columns"][name]
            low, high = value if isinstance(value, list) else (value, value)
            if column["task"] not in TASKS or not 0 <= low <= high:
                raise ValueError(
                    f"{source.id}: {column['task']} {value} is no figure of a known task"
                )
            protocol = Protocol(**column.get("protocol", entry["protocol"]))
            if protocol.convention not in CONVENTIONS:
                raise ValueError(f"{source.id}: convention {protocol.convention!r}")
            notes = (column.get("note"), row.get("note"))
            doubts = (column.get("contested"), row.get("contested"))
            yield Figure(
                source,
                column["task"],
                column["split"],
                column["metric"],
                row["model"],
                row["method"],
                row["plan"],
                row["method"] == UNPRUNED or row.get("plan_stated", False),
                row["tokens"],
                low,
                high,
                protocol,
                "; ".join(filter(None, doubts)) or None,
                "; ".join(filter(None, notes)) or None,
                column.get("no_unpruned", source.no_unpruned),
            )


def _check_row(row: dict[str, Any]) -> None:
    what = f"{row['source']}, {row['method']}"
    if row["model"] not in LAYERS:
        raise ValueError(f"{what}: model {row['model']!r}; there are {', '.join(LAYERS)}")
    if row["plan"] is not None:
        _methods(row["plan"], row["model"])
    if (row["method"] == UNPRUNED) != (row["plan"] == "none"):
        raise ValueError(f"{what}: the unpruned row and only this row must have the plan none")
    if not row["values"]:
        raise ValueError(f"{what}: no values")


def _required(source: str, field: str, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{source}: {field} is empty")
    return text


# ---------------------------------------------------------------- finding


def find_figures(
    figures: Sequence[Figure],
    task: str | None = None,
    method: str | None = None,
    model: str | None = None,
    plan: str | None = None,
    convention: str | None = None,
) -> tuple[Figure, ...]:
    """The figures of a task, method, model, plan and convention; None admits all.

    method: the name in the source, or of a method in the plan. Raises ValueError for an unknown
    task and for a method without any figure.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are: {', '.join(TASKS)}")
    if method is not None and not any(_has_method(figure, method) for figure in figures):
        known = sorted({figure.method for figure in figures}, key=str.lower)
        raise ValueError(
            f"there is no published figure of {method!r}; there are: {', '.join(known)}"
        )
    return tuple(
        figure
        for figure in figures
        if task in (None, figure.task)
        and model in (None, figure.model)
        and convention in (None, figure.protocol.convention)
        and (method is None or _has_method(figure, method))
        and (plan is None or same_plan(plan, figure.plan, figure.model))
    )


def unpruned(figures: Iterable[Figure], figure: Figure) -> Figure | None:
    """The unpruned figure of the same source, task, metric and model."""
    for other in figures:
        if (
            other.method == UNPRUNED
            and other.source.id == figure.source.id
            and other.group == figure.group
        ):
            return other
    return None


def same_plan(ours: str, theirs: str | None, model: str) -> bool:
    """Whether two plans do the same on a model.

    average= is resolved for the model, and released=1 makes no difference. A plan with a method in
    a user's own file equals no published plan; the file is not run.
    """
    if theirs is None or files_of(ours):
        return False
    return _methods(ours, model) == _methods(theirs, model)


@functools.cache
def _methods(plan: str, model: str) -> tuple[Method, ...]:
    solved = parse_plan(plan).resolve(LAYERS[model], PATCHES).methods
    plain: dict[str, Any] = {"released": False}
    return tuple(dataclasses.replace(m, **plain) if hasattr(m, "released") else m for m in solved)


def _has_method(figure: Figure, method: str) -> bool:
    names = [figure.method.lower()]
    if figure.plan is not None:
        names += [m.name for m in parse_plan(figure.plan).methods]
    return method.lower() in names


# ---------------------------------------------------------------- side by side


def tabulate(measured: Sequence[Measured], figures: Sequence[Figure]) -> tuple[Table, ...]:
    """A table for each group of measured figures, with the published figures of the same group.

    A source has a column if it has one of the measured plans. Its unpruned figure is in the first
    row, "none". Raises ValueError if a plan was measured twice in a group.
    """
    tables = []
    for group in dict.fromkeys(m.group for m in measured):
        ours: dict[str, float] = {}
        for m in (m for m in measured if m.group == group):
            if m.plan in ours:
                raise ValueError(f"{m.plan} was measured twice for {group}; give one of them")
            ours[m.plan] = m.value
        plans = ["none", *(plan for plan in ours if plan != "none")]
        same = [figure for figure in figures if figure.group == group]
        columns = []
        for source in dict.fromkeys(figure.source for figure in same):
            own = [figure for figure in same if figure.source == source]
            cells = tuple(_cell(plan, own, group.model) for plan in plans)
            if any(cells[1:]) or (len(plans) == 1 and cells[0]):
                columns.append((source, cells))
        rows = tuple(
            (plan, ours.get(plan), tuple(cells[i] for _, cells in columns))
            for i, plan in enumerate(plans)
        )
        tables.append(Table(group, tuple(source for source, _ in columns), rows))
    return tuple(tables)


def format_comparison(measured: Sequence[Measured]) -> list[str]:
    """A table as text for each group of measured figures that has published ones."""
    tables = tabulate(measured, read_figures())
    return [format_table(table) for table in tables if table.sources]


def _cell(plan: str, own: Sequence[Figure], model: str) -> Figure | None:
    return next((figure for figure in own if same_plan(plan, figure.plan, model)), None)


def format_table(table: Table) -> str:
    """A table as text. Marks before a figure: ~ if the source does not state its settings, ! if the
    figure is contested, ? if it is recalled and not read."""
    heads = ["plan", "measured", *(source.id for source in table.sources)]
    lines = [heads]
    for plan, ours, theirs in table.rows:
        first = "unpruned" if plan == "none" else plan
        lines.append([first, "-" if ours is None else f"{ours:.2f}", *map(_marked, theirs)])
    return "\n".join([str(table.group), *_aligned(lines)])


def _marked(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    value = f"{figure.low}" if figure.low == figure.high else f"{figure.low}-{figure.high}"
    nearest = figure.plan is not None and not figure.plan_stated
    marks = zip("~!?", (nearest, figure.contested, figure.source.recalled), strict=True)
    return "".join(mark for mark, holds in marks if holds) + value


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  " + "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(row))
        for row in ([*zip(line, widths, strict=True)] for line in lines)
    ]


# ---------------------------------------------------------------- printing all


def format_sources(figures: Sequence[Figure], every: Sequence[Figure]) -> str:
    """The figures source by source, a block for each group, below the source's unpruned row.

    every: all figures, in which the unpruned row is looked up.
    """
    blocks = []
    for source in dict.fromkeys(figure.source for figure in figures):
        mine = [figure for figure in figures if figure.source == source]
        lines = [f"{source.title} [{source.id}]", f"  {source.reference}", f"  read: {source.read}"]
        lines += [f"  tokens: {source.budget}"] if source.budget else []
        lines += [f"  note: {source.note}"] if source.note else []
        lines += [f"  unpruned: {source.unpruned_note}"] if source.unpruned_note else []
        for protocol in dict.fromkeys(figure.protocol for figure in mine):
            said = {k: v for k, v in dataclasses.asdict(protocol).items() if v is not None}
            lines.append("  protocol: " + ", ".join(f"{k} {v}" for k, v in said.items()))
        for group in dict.fromkeys(figure.group for figure in mine):
            own = [figure for figure in mine if figure.group == group]
            lines += _block(group, own, unpruned(every, own[0]))
        blocks.append("\n".join(lines))
    legend = "~ nearest plan: the source does not state its settings; ! contested; ? recalled"
    return "\n\n".join([*blocks, legend])


def _block(group: Group, own: Sequence[Figure], base: Figure | None) -> list[str]:
    reason = own[0].no_unpruned
    lines = ["", f"  {group}"]
    rows = [["method", "tokens", "figure", "plan"]]
    rows += [_row(base)] if base else [[UNPRUNED, "", "-", f"none printed: {reason}"]]
    rows += [_row(figure) for figure in own if figure.method != UNPRUNED]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for method, tokens, value, plan in rows:
        cells = f"{method:<{widths[0]}}  {tokens:>{widths[1]}}  {value:>{widths[2]}}"
        lines.append(f"    {cells}  {plan}".rstrip())
    doubts = dict.fromkeys(f.contested for f in (*own, *([base] if base else [])) if f.contested)
    notes = dict.fromkeys(f"{f.method}: {f.note}" for f in own if f.note)
    return [*lines, *(f"    ! {d}" for d in doubts), *(f"    {n}" for n in notes)]


def _row(figure: Figure) -> list[str]:
    tokens = "" if figure.tokens is None else str(figure.tokens)
    plan = "" if figure.method == UNPRUNED else figure.plan or "-"
    return [figure.method, tokens, _marked(figure), plan]


def as_json(figures: Sequence[Figure], every: Sequence[Figure]) -> str:
    """A JSON list with an object for each figure, its source and the unpruned figure of this."""
    objects = []
    for figure in figures:
        base = unpruned(every, figure)
        entry = dataclasses.asdict(figure)
        entry["unpruned"] = None if base is None else base.low
        objects.append(entry)
    return json.dumps(objects, indent=1, ensure_ascii=False)


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, or 2 after an error."""
    parser = CommandParser(
        prog="python -m eval.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task", metavar="T", help=", ".join(TASKS))
    parser.add_argument("--method", metavar="M", help="as in a source or a plan: FastV, fastv")
    parser.add_argument("--json", action="store_true")

    def run() -> None:
        args = parser.parse_args(argv)
        every = read_figures()
        found = find_figures(every, args.task, args.method)
        if not found:
            asked = f"--task {args.task}" + (f" --method {args.method}" if args.method else "")
            raise ValueError(f"there is no published figure for {asked}; leave one out to see more")
        print(as_json(found, every) if args.json else format_sources(found, every))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
