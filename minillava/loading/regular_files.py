"""The files of a checkpoint's folder: present, absent, or something that is not a file.

Only regular files and links to them are opened (a hub cache is made of such links). A link whose
target is gone, a folder, a pipe or a device under the name of a checkpoint's file is an error: it
is not the same as no file of that name, and reading a pipe or a device might never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .error_text import cut_path

MB = 2**20


def is_present(path: str | Path) -> bool:
    """Whether there is a file: False if nothing has that name, True for a regular file.

    Raises ValueError for anything else of that name, such as a link to a file that is gone.
    """
    name = cut_path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, FileNotFoundError) and not os.path.islink(path):
            return False
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{name} cannot be read ({reason}), but must be a regular file or a link to one; "
            "download it again, or remove it"
        ) from error
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{name} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, but must be a regular file or "
            "a link to one; download it again, or remove it"
        )
    return True


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises ValueError if there is no such file, or if it is larger or cannot be read.
    """
    name = cut_path(path)
    if not is_present(path):
        raise ValueError(f"there is no {name}; download it, or give a checkpoint that has it")
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); download it again") from error
    if len(content) > limit:
        raise ValueError(
            f"{name} has more than {limit // MB} MB, but must be smaller; download it again"
        )
    return content


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
