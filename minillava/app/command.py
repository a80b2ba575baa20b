"""What a command line says beside its answer: one line for an error, nothing from libraries."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's numbers, malloc.h
KEPT = 2**30  # bytes; more than any layer needs
_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")


class Parser(argparse.ArgumentParser):
    """Its errors go the way of all others: ValueError with one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; --help explains the options")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _flush()  # the text of --help
        super().exit(status, message)


def command(act: Callable[[], object]) -> int:
    """Parse and act; returns the exit code: 0, 2 after one line for an error, 130 after Ctrl-C."""
    keep_freed_memory()
    try:
        with one_voice():
            act()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads us has enough, as `head` does
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        complain(error)
        return 2


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that were freed: what one layer takes is what the next needs.

    It would return them to the system and fetch them anew, a page at a time, which can add a fifth
    to a prefill. A setting of the whole process, so the program's business and not the model's.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, KEPT)


# ---------------------------------------------------------------- values of options


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive(text: str) -> int:
    """What counts something."""
    n = int(text) if text.isdecimal() else 0
    if not n:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return n


def natural(text: str) -> int:
    """A seed, for instance."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 on")
    return int(text)


def real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


# ---------------------------------------------------------------- what is said


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
        _flush()
    except BrokenPipeError:
        _flush()
        raise
    finally:
        logging.disable(before)


def _flush() -> None:
    """Raises BrokenPipeError if nobody reads any more; what is left is then thrown away, or Python
    would try again at its end and complain of it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        if sys.stdout is sys.__stdout__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise


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
