"""Lists of the registered pruning methods: for --list-methods, and as a Markdown table."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator

from ..pruning import CATALOGUE, METHODS, PRESETS, Method, option_fields
from ..pruning.parsing import aliases

WIDTH, INDENT = 100, 11
SHARED = ("mode", "positions", "scope", "until", "cache")  # options that methods share


def list_methods() -> str:
    """Each method with its paper, where it acts, its options and presets, what it was checked
    against, and the released file it follows."""
    blocks = [
        "\n".join([f"{method.name}: {CATALOGUE[method.name].paper}", *_describe(method)])
        for method in METHODS.values()
    ]
    helps = {name: option_fields(Method)[name].metadata["help"] for name in SHARED}
    notes = [
        "Options are listed with their defaults, and with other allowed values in brackets.",
        "A plan joins methods or presets with +: simignore:keep=452+fastv:layer=5,keep=144",
        "Options that methods share:",
        *(line for name, text in helps.items() for line in _wrap_entry(name, text)),
    ]
    return "\n\n".join([*blocks, "\n".join(notes)])


def markdown_table() -> str:
    """The same as the Markdown table in pruning/README.md."""
    lines = [
        "| method | paper | acts | options | presets | checked against | released file |",
        "|---" * 7 + "|",
    ]
    for method in METHODS.values():
        options = [text for name, text in _list_options(method) if name not in SHARED]
        cells = [
            f"`{method.name}`",
            CATALOGUE[method.name].paper,
            CATALOGUE[method.name].acts,
            "; ".join(options).replace("|", " or "),
            ", ".join(f"`{name}`" for name, _ in _list_presets(method)),
            CATALOGUE[method.name].checked,
            CATALOGUE[method.name].source,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _describe(method: type[Method]) -> Iterator[str]:
    yield from _wrap_entry("acts", CATALOGUE[method.name].acts)
    yield from _wrap_entry("options", "; ".join(text for _, text in _list_options(method)))
    for name, field in option_fields(method).items():
        if field.metadata.get("help") and field is not option_fields(Method).get(name):
            yield from _wrap_entry("", f"{name}: {field.metadata['help']}")
    for name, plan in _list_presets(method):
        yield from _wrap_entry("preset", f"{name} = {plan}")
    yield from _wrap_entry("checked", CATALOGUE[method.name].checked)
    if CATALOGUE[method.name].source:
        yield from _wrap_entry("released", CATALOGUE[method.name].source)


def _list_presets(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Names and plans of the presets that use the method."""
    for name, preset in PRESETS.items():
        if method.name in (part.partition(":")[0] for part in preset.plan.split("+")):
            yield name, preset.plan


def _wrap_entry(title: str, text: str) -> list[str]:
    first, rest = f"  {title:{INDENT - 3}} ", " " * INDENT
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _list_options(method: type[Method]) -> Iterator[tuple[str, str]]:
    """The name of each option, and its text: name|alias=default (other allowed values)."""
    for name, field in option_fields(method).items():
        if name in ("mode", "scope", "until") and not method.drops_only:
            continue
        default = method.numbering if name == "positions" else field.default
        names = [name, *(alias for alias, full in aliases(method).items() if full == name)]
        others = [c for c in field.metadata.get("choices", ()) if c not in (default, "")]
        allowed = f" ({', '.join(others)})" if others else ""
        yield name, "|".join(names) + _format_default(default) + allowed


def _format_default(default: object) -> str:
    if default is dataclasses.MISSING:
        return " (required)"
    if default is None:
        return " (unset)"
    items = default if isinstance(default, tuple) else (default,)
    return "=" + "/".join(str(int(i) if isinstance(i, bool) else i) for i in items)
