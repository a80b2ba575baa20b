"""Names and values in errors, so that an error stays one line of at most 2,000 characters."""

from __future__ import annotations

import reprlib


def cut(text: str, limit: int = 200) -> str:
    """A text for an error: on one line, and of at most `limit` characters."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def cut_path(path: object) -> str:
    """The path of a file or folder for an error."""
    return cut(str(path), 500)


def shorten(value: object, limit: int = 200) -> str:
    """A value for an error, as Python writes it, of at most `limit` characters."""
    return cut(_REPR.repr(value), limit)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 4, 10, 10, 10
_REPR.maxstring, _REPR.maxlong, _REPR.maxother = 180, 60, 180
