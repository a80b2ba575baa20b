"""What a command line says beside its answer: one line for an error, nothing from libraries."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

import torch

_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")


class Parser(argparse.ArgumentParser):
    """Its errors go the way of all others: ValueError with one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; --help explains the options")


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """No warnings of libraries between our own lines; letters that a terminal lacks are escaped."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def complain(error: Exception) -> None:
    """Say what cannot be done, in one line. A RuntimeError that is no lack of memory is raised
    again: a fault of the program, not of its input."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _MEMORY.search(str(error)):
        text = "out of memory; try --dtype float16, fewer pictures, or --prune before the decoder"
    elif isinstance(error, RuntimeError):
        raise error
    else:
        text = str(error)
    line = "".join(c if c.isprintable() else " " for c in text)
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
