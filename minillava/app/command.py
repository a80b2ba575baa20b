"""What all command-line programs share: exit codes, one-line errors and number options."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ..loading.memory import keep_freed_memory

MAX_LINE = 2000  # characters of an error line
_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,400}")
_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError for a bad command line, so that run_command prints
    it as one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; --help explains the options")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own ignores errors

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _flush_stdout()  # the text of --help
        super().exit(status, message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The values of an option; of `--option=--` it is "--", where Python < 3.13 has none."""
        if arg_strings != ["--"] or not action.option_strings:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")
        self._check_value(action, value)
        return value if action.nargs is None else [value]


class Ended(BaseException):
    """SIGTERM or SIGHUP has arrived. Files that are not finished are removed on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number


def run_command(action: Callable[[], object]) -> int:
    """Run a program, the parsing of its command line included, and return its exit code.

    0 if it succeeds, 2 after an error (one line on stderr; output that cannot be written is an
    error too), 130 after Ctrl-C, 141 if the reader of its output has closed the pipe, 143 after
    SIGTERM, 129 after SIGHUP. Errors in the program itself are raised.
    """
    try:
        with open_streams(), quiet_libraries(), end_by_signal():
            keep_freed_memory()
            try:
                action()
            except (Exception, SystemExit) as error:
                if (line := _describe_user_error(error)) is None:
                    raise
                raise ValueError(line) from error
        return 0
    except KeyboardInterrupt:
        return 130
    except Ended as ended:
        return 128 + ended.number
    except BrokenPipeError:  # the reader has enough, like `head`
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print_error(error)
        return 2


def end_program(code: int) -> NoReturn:
    """End the process with an exit code.

    After a signal this is immediate: Python would first wait for threads, for example those of a
    download, and a second Ctrl-C would then print a traceback. It is immediate in a process of
    torchrun, too: threads that gloo left running can abort a process whose Python has ended, and
    torchrun then reports a failure although all was done.
    """
    if code > 128 or "TORCHELASTIC_RUN_ID" in os.environ:  # which torchrun sets
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _describe_user_error(error: BaseException) -> str | None:
    """One line for an error that a user's own method raised, None for others.

    Its module is looked up, since importing it would import torch: a file can only have run if it
    is there.
    """
    user_methods = sys.modules.get("minillava.pruning.user_methods")
    return None if user_methods is None else user_methods.describe_user_error(error)


@contextlib.contextmanager
def end_by_signal() -> Iterator[None]:
    """Raise Ended for SIGTERM and SIGHUP, unless they are ignored or handled already."""
    main = threading.current_thread() is threading.main_thread()
    ours = [n for n in _ENDING if main and signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """Let Ctrl-C and other signals end the process immediately: for imports of large libraries,
    which may swallow an exception and then fail, and which have nothing to clean up."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGINT, *_ENDING] if main else []
    ours = {n: signal.getsignal(n) for n in numbers}
    ours = {n: h for n, h in ours.items() if h in (signal.default_int_handler, _end)}
    for number in ours:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise Ended(number)


# ---------------------------------------------------------------- types of options


def parse_int(text: str) -> int:
    if not _WHOLE_NUMBER.fullmatch(text):  # int() would also take 1_000 and other scripts' digits
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def parse_positive_int(text: str) -> int:
    """For counts."""
    if not _WHOLE_NUMBER.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def parse_non_negative_int(text: str) -> int:
    """For seeds and layer numbers."""
    if not _WHOLE_NUMBER.fullmatch(text) or int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def parse_float(text: str) -> float:
    try:
        if not text.isascii() or "_" in text:
            raise ValueError(text)
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def parse_path(text: str) -> Path:
    """A file or folder. Path("") would be the current folder, which a shell variable that is not
    set does not mean."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty, but must be a path; for this folder give .")
    return Path(text)


# ---------------------------------------------------------------- output


@contextlib.contextmanager
def open_streams() -> Iterator[None]:
    """Replace a closed stderr by one that discards, so that libraries can write to it.

    Closed descriptors are opened too: the next file would get their number, and what C libraries
    print would be written into it. Raises ValueError if stdout is closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:
            discard = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(discard))
        if sys.stdout is None:
            raise ValueError("stdout is closed, so nothing can be printed; direct it to a file")
        yield


@contextlib.contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Let only the first of the processes that torchrun has started print.

    They all parse the command line, before torch is imported, and give the same answer.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as discard,
        contextlib.redirect_stdout(discard),
        contextlib.redirect_stderr(discard),
    ):
        yield


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
    except BaseException:
        with contextlib.suppress(OSError):
            _flush_stdout()
        raise
    finally:
        logging.disable(level_before)


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Discard what C libraries print to descriptor 2 themselves. For one thread at a time."""
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def _flush_stdout() -> None:
    """Flush stdout. Raises OSError if that fails: BrokenPipeError if its reader has closed it.

    The rest of the output is then discarded, since Python would otherwise try to write it again at
    exit and print the error.
    """
    try:
        sys.stdout.flush()
    except OSError:
        if sys.stdout is sys.__stdout__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise


def print_error(error: Exception) -> None:
    """Print an error as one line of at most MAX_LINE characters on stderr, if that is possible.

    A RuntimeError is raised again, since it is a fault of the program and not of its input, unless
    it says that memory ran out.
    """
    if is_out_of_memory(error):
        text = "out of memory; try --dtype float16, fewer images, or --prune before the decoder"
    elif isinstance(error, RuntimeError):
        raise error
    else:
        text = str(error)
    line = "".join(c if c.isprintable() else " " for c in text)
    line = cut_middle(f"error: {' '.join(line.split())}", MAX_LINE)
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # nobody can be told
        if sys.stderr is sys.__stderr__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def cut_middle(text: str, most: int) -> str:
    """A text of at most `most` characters: of a longer one the middle is replaced by "…", since
    errors name the value first and say what to do at the end."""
    end = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - end]}…{text[-end:]}"
