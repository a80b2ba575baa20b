"""Files that a command writes at its end: refused before its work, and written as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def check_output(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Raise ValueError if the file that an option names cannot be written, or has another suffix
    than one of these; (): any suffix is allowed."""
    try:
        part_of(path).lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or with a zero byte
        raise ValueError(
            f"{option} {path} cannot be written ({error}); give another name"
        ) from error
    if (suffixes and path.suffix.lower() not in suffixes) or path.is_dir():
        names = " or ".join(filter(None, (", ".join(suffixes[:-1]), *suffixes[-1:])))
        wanted = f"ends in {names}" if suffixes else "no folder has"
        raise ValueError(f"{option} {path} must be a file; give a name that {wanted}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: {path.parent} is not writable; choose another folder")


@contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Give a name to write to, which then replaces `path`; after an error it is removed, and
    `path` is as it was."""
    part = part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """The file that is written before it replaces `path`."""
    return path.with_name(f"{path.name}.part")
