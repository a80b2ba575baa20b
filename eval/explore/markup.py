"""What the page says, as HTML: messages, answers, the sheet. What came from outside is escaped."""

from __future__ import annotations

import base64
import sys
import traceback
from html import escape

from . import limits
from .asking import FAULT, NONE, Progress


def say(text: str) -> str:
    """A message as HTML."""
    kind = "error" if text.startswith("error: ") else "note"
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def explain(error: BaseException) -> str:
    """An error as one sentence. A fault of the program is told to the terminal only."""
    if (sentence := limits.describe_error(error)) is None:
        traceback.print_exception(error, file=sys.stderr)
    return f"error: {sentence or FAULT}"


def format_answers(progress: Progress) -> str:
    """A table of plans and answers as HTML."""
    done = progress.comparison
    errors = {run.plan: run.error for run in done.runs if run.error} if done else {}
    reference = progress.texts[NONE]
    rows = []
    for plan, text in progress.texts.items():
        shown = escape(text) or ("" if done else "…")
        if plan in errors:
            shown = f'<span class="error">error: {escape(errors[plan])}</span>'
        elif done and plan != NONE and text == reference:
            shown += ' <span class="same">(as unpruned)</span>'
        name = "unpruned" if plan == NONE else escape(plan)
        rows.append(f'<tr><th scope="row">{name}</th><td>{shown}</td></tr>')
    head = '<tr><th scope="col">plan</th><th scope="col">answer</th></tr>'
    return f'<table class="answers"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def format_sheet(progress: Progress) -> str:
    """The sheet as HTML, with its description for those who do not see it."""
    assert progress.sheet is not None
    data = base64.b64encode(progress.sheet.png()).decode()
    words = escape(progress.sheet.description, quote=True)
    return (
        '<div class="sheet" tabindex="0" role="region" aria-label="The sheet; scroll to see all">'
        f'<img src="data:image/png;base64,{data}" alt="{words}"></div>'
    )
