"""What all command-line programs share: exit codes, one-line errors and number options."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

from ..loading.memory import keep_freed_memory
from ..pruning.user_methods import user_errors

_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError for a bad command line, so that run_command prints
    it as one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; --help explains the options")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _flush_stdout()  # the text of --help
        super().exit(status, message)


def run_command(action: Callable[[], object]) -> int:
    """Run a program, the parsing of its command line included, and return its exit code.

    0 if it succeeds, 2 after an error (one line on stderr), 130 after Ctrl-C, 141 if the reader of
    its output has closed the pipe. Errors in the program itself are raised.
    """
    keep_freed_memory()
    try:
        with quiet_libraries(), user_errors():
            action()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has enough, like `head`
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print_error(error)
        return 2


# ---------------------------------------------------------------- types of options


def parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def parse_positive_int(text: str) -> int:
    """For counts."""
    n = int(text) if text.isdecimal() else 0
    if not n:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return n


def parse_non_negative_int(text: str) -> int:
    """For seeds and layer numbers."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


# ---------------------------------------------------------------- output


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings and log messages of libraries, and flush stdout at the end.

    Characters that the terminal's encoding lacks are written as escapes.
    """
    level_before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        _flush_stdout()
    except BrokenPipeError:
        _flush_stdout()
        raise
    finally:
        logging.disable(level_before)


def _flush_stdout() -> None:
    """Flush stdout. Raises BrokenPipeError if its reader has closed the pipe.

    The rest of the output is then discarded, since Python would otherwise try to write it again at
    exit and print the error.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        if sys.stdout is sys.__stdout__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise


def print_error(error: Exception) -> None:
    """Print an error as one line on stderr.

    A RuntimeError is raised again, since it is a fault of the program and not of its input, unless
    it says that memory ran out.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)):
        text = "out of memory; try --dtype float16, fewer images, or --prune before the decoder"
    elif isinstance(error, RuntimeError):
        raise error
    else:
        text = str(error)
    line = "".join(c if c.isprintable() else " " for c in text)
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
