"""The pruning methods as text, from their registry."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator

from ..pruning import METHODS, PRESETS, Method, option_fields

WIDTH, INDENT = 100, 11


def methods() -> str:
    """Each method with its paper, where it acts, its options, presets, what it was checked against,
    and the released file it follows."""
    blocks = [
        "\n".join([f"{method.name}: {method.paper}", *_entries(method)])
        for method in METHODS.values()
    ]
    notes = [
        "An option stands with its default, other values it takes in brackets.",
        "A plan joins methods or presets by +: simignore:keep=452+fastv:layer=5,keep=144",
    ]
    return "\n\n".join([*blocks, "\n".join(notes)])


def table() -> str:
    """The same as a Markdown table, for pruning/README.md."""
    lines = [
        "| method | paper | acts | options | presets | checked against | released file |",
        "|---" * 7 + "|",
    ]
    shared = {"positions", "mode", "scope", "until"}
    for method in METHODS.values():
        own = [o for o in _options(method) if o.split("=")[0].split(" ")[0] not in shared]
        cells = [
            f"`{method.name}`",
            method.paper,
            method.acts,
            "; ".join(own).replace("|", " or "),
            ", ".join(f"`{name}`" for name, _ in _presets(method)),
            method.checked,
            method.source,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _entries(method: type[Method]) -> Iterator[str]:
    yield from _entry("acts", method.acts)
    yield from _entry("options", "; ".join(_options(method)))
    for name, plan in _presets(method):
        yield from _entry("preset", f"{name} = {plan}")
    yield from _entry("checked", method.checked)
    if method.source:
        yield from _entry("released", method.source)


def _presets(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Names and plans of those that have the method in them."""
    for name, preset in PRESETS.items():
        if method.name in (part.partition(":")[0] for part in preset.plan.split("+")):
            yield name, preset.plan


def _entry(title: str, text: str) -> list[str]:
    first, rest = f"  {title:{INDENT - 2}}", " " * INDENT
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _options(method: type[Method]) -> Iterator[str]:
    """name=default with other spellings of the name and other values it can have."""
    for name, field in option_fields(method).items():
        if name in ("mode", "scope", "until") and not method.drops_only:
            continue
        default = method.numbering if name == "positions" else field.default
        names = [name, *(alias for alias, full in method.aliases.items() if full == name)]
        others = [c for c in field.metadata.get("choices", ()) if c != default]
        yield "|".join(names) + _value(default) + (f" ({', '.join(others)})" if others else "")


def _value(default: object) -> str:
    if default is dataclasses.MISSING:
        return " (required)"
    if default is None:
        return " (unset)"
    items = default if isinstance(default, tuple) else (default,)
    return "=" + "/".join(str(int(i) if isinstance(i, bool) else i) for i in items)
