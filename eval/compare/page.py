"""A comparison as one HTML file, which opens without a server and loads nothing.

Everything is in the text without script, all pairs of plans included. The script only shows one
pair at a time, for the two plans that are chosen. Pictures are defined once and used by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minillava.app.canvas import embed_pictures, escape_text, write_shapes
from minillava.app.overlay import describe_lives
from minillava.app.panels import Panel

from .pictures import Pictures, draw_pictures
from .record import record
from .runs import Cell, Comparison, Run
from .sets import Difference
from .words import LIVES, describe_cell, describe_costs, describe_overlap, describe_sets, title_of

HERE = Path(__file__).parent
EDGE = 3  # pixels around a picture
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(comparison: Comparison) -> str:
    """The page, with the comparison as JSON in the element #comparison."""
    pictures = draw_pictures(comparison)
    panels = [panel for images in pictures.overlays for image in images for panel in image]
    panels += [panel for _, images in pictures.differences for panel in images]
    ids, defined = embed_pictures((shape for panel in panels for shape in panel.shapes), "picture")
    facts = json.dumps(record(comparison, reports=False))
    facts = facts.replace("<", "\\u003c")  # which would begin a tag
    title = escape_text(title_of(comparison))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{title}</title>",
            f"<style>\n{(HERE / 'page.css').read_text('utf-8')}</style>\n</head>\n<body>",
            '<svg class="defined" aria-hidden="true"><defs>',
            *defined,
            "</defs></svg>\n<main>",
            f'<h1 dir="auto">{escape_text(comparison.question)}</h1>',
            _write_about(comparison),
            *_write_runs(pictures, ids),
            *_write_differences(pictures, ids),
            *_write_drifts(pictures),
            *_write_reasons(pictures, ids),
            "</main>",
            f'<script type="application/json" id="comparison">{facts}</script>',
            f"<script>\n{(HERE / 'page.js').read_text('utf-8')}</script>\n</body>\n</html>\n",
        ]
    )


def _write_about(comparison: Comparison) -> str:
    facts = (
        f"<dt>{escape_text(k)}</dt><dd>{escape_text(v)}</dd>" for k, v in comparison.about.items()
    )
    return f"<dl>{''.join(facts)}</dl>" if comparison.about else ""


def _figure(panel: Panel, ids: dict[int, str], name: str, which: str = "") -> list[str]:
    """A panel with its alternative text. A legend is a list below it, which a narrow page wraps;
    other explanations, like histograms, stay in the drawing. which: a line above it."""
    height = panel.picture if panel.legend else panel.height
    # outlines reach over the edge of the picture
    look = f'viewBox="-{EDGE} -{EDGE} {panel.width + 2 * EDGE} {height + 2 * EDGE}"'
    kind = "" if panel.legend else ' class="paper"'
    return [
        "<figure>",
        *([f"<p>{escape_text(which)}</p>"] if which else []),
        f'<svg {look} width="{panel.width}"{kind} role="img" aria-label="{escape_text(name)}">',
        *write_shapes(panel.shapes, ids),
        "</svg>",
        *(["<figcaption>", _list_legend(panel), "</figcaption>"] if panel.legend else []),
        "</figure>",
    ]


def _list_legend(panel: Panel) -> str:
    swatch = '<svg viewBox="0 0 16 14" width="16" height="14" aria-hidden="true">'
    entries = (
        f"<li>{swatch}{''.join(write_shapes(shapes, {}))}</svg> {escape_text(words)}</li>"
        for shapes, words in panel.legend
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _which(pictures: Pictures, image: int) -> str:
    return f"image {image + 1}" if pictures.several else ""


# ---------------------------------------------------------------- the plans


def _write_runs(pictures: Pictures, ids: dict[int, str]) -> list[str]:
    runs = zip(pictures.comparison.runs, pictures.overlays, strict=True)
    cards = [line for run, images in runs for line in _write_run(pictures, run, images, ids)]
    return [f"<h2>{LIVES}</h2>", '<div class="cards">', *cards, "</div>"]


def _write_run(
    pictures: Pictures, run: Run, images: Sequence[Sequence[Panel]], ids: dict[int, str]
) -> list[str]:
    head = f"<article><h3>{_write_name(pictures, run)}</h3>"
    if run.result is None:
        return [head, f'<p class="answer">cannot run: {escape_text(run.error)}</p>', "</article>"]
    lines = [head]
    for i, panels in enumerate(images):
        lives = describe_lives(run.result, 0, i)
        lines += _figure(panels[0], ids, f"{run.plan}: {lives}", _which(pictures, i))
    first = pictures.comparison.runs[0]
    same = first.result is not None and first.result.tokens == run.result.tokens
    lines.append(_write_answer("p", run.answer, run.cut, same, run is first))
    costs = "".join(f"<li>{escape_text(words)}</li>" for words in describe_costs(run))
    return [*lines, f'<ul class="costs">{costs}</ul>', "</article>"]


def _write_name(pictures: Pictures, run: Run) -> str:
    label = pictures.labels.get(run.plan)
    return f"<b>{label}</b> <code>{escape_text(run.plan)}</code>" if label else "unpruned"


def _write_answer(
    tag: str, text: str, cut: bool, same: bool, reference: bool = False, more: str = ""
) -> str:
    """An answer, on colour and with a sign if it is the unpruned one."""
    kind, sign, said = "answer", "\u2260", "not the unpruned answer: "
    if same:
        kind, sign, said = "answer same", "=", "the unpruned answer: "
    mark = f'<span aria-hidden="true">{sign}</span><span class="said">{said}</span> '
    words = f'<span dir="auto">{escape_text(text)}</span>{" ..." if cut else ""}{more}'
    return f'<{tag} class="{kind}">{"" if reference else mark}{words}</{tag}>'


# ---------------------------------------------------------------- differences


def _write_differences(pictures: Pictures, ids: dict[int, str]) -> list[str]:
    if not pictures.differences:
        return []
    plans = [run for run, result in pictures.comparison.answered if result.plan.methods]
    options = [
        f'<option value="{pictures.labels[run.plan]}">{escape_text(pictures.name(run))}</option>'
        for run in plans
    ]
    selects = (
        f'<label>{words} <select id="{name}">{"".join(options)}</select></label>'
        for name, words in (("first", "Compare"), ("second", "with"))
    )
    return [
        "<h2>Patches that two plans keep</h2>",
        f'<form id="choose" hidden>{" ".join(selects)}</form>',
        '<p id="one-plan" hidden>Choose two different plans.</p>',
        '<div class="cards" id="pairs" aria-live="polite">',
        *(line for pair in pictures.differences for line in _write_pair(pictures, *pair, ids)),
        "</div>",
    ]


def _write_pair(
    pictures: Pictures, difference: Difference, panels: Sequence[Panel], ids: dict[int, str]
) -> list[str]:
    a, b = (pictures.labels[run.plan] for run in (difference.a, difference.b))
    words = describe_sets(difference, a, b)
    lines = [f'<article data-pair="{a} {b}"><h3>{a} and {b}</h3>']
    for i, panel in enumerate(panels):
        lines += _figure(panel, ids, words, _which(pictures, i))
    return [*lines, f"<p>{escape_text(describe_overlap(difference))}.</p>", "</article>"]


# ---------------------------------------------------------------- answers over budgets


def _write_drifts(pictures: Pictures) -> list[str]:
    comparison = pictures.comparison
    if not comparison.drifts or not comparison.budgets:
        return []
    runs = {run.plan: run for run in comparison.runs}
    heads = "".join(f'<th scope="col">{budget} left</th>' for budget in comparison.budgets)
    rows = []
    for drift in comparison.drifts:
        cells = "".join(map(_write_cell, drift.cells))
        if drift.reason:
            cells = f'<td colspan="{len(comparison.budgets)}">{escape_text(drift.reason)}</td>'
        rows.append(
            f'<tr><th scope="row">{_write_name(pictures, runs[drift.plan])}</th>{cells}</tr>'
        )
    name = "Answers over budgets of image tokens"
    return [
        f"<h2>{name}</h2>",
        "<p>On colour and with =: the tokens of the unpruned answer. Answers are cut to its "
        "length.</p>",
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table>',
        f'<thead><tr><th scope="col">plan</th>{heads}</tr></thead><tbody>',
        *rows,
        "</tbody></table></div>",
    ]


def _write_cell(cell: Cell) -> str:
    if cell.error:
        return f"<td>{escape_text(cell.error)}</td>"
    more = f"<small>{escape_text(describe_cell(cell))}</small>"
    return _write_answer("td", cell.text, cell.cut, cell.same, more=more)


# ---------------------------------------------------------------- reasons


def _write_reasons(pictures: Pictures, ids: dict[int, str]) -> list[str]:
    parts = []
    for run, images in zip(pictures.comparison.runs, pictures.overlays, strict=True):
        lines = []
        for i, panels in enumerate(images):
            for panel in panels[1:]:
                title = " ".join(panel.title)
                head = f"<h3>{escape_text(title)}</h3>"
                lines.append(f'<div style="width: {panel.width}px">{head}')
                lines += [
                    *_figure(panel, ids, f"{run.plan}: {title}", _which(pictures, i)),
                    "</div>",
                ]
        if lines:
            head = f"<details open><summary>{_write_name(pictures, run)}</summary>"
            parts += [head, '<div class="panels">', *lines, "</div></details>"]
    return ["<h2>Why each patch stayed</h2>", *parts] if parts else []
