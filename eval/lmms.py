"""The command line of lmms-eval 0.7.3, whose failures end with one line and an exit code.

    python -m eval.lmms --model minillava \\
        --model_args 'pretrained=weights/demo,prune="fastv:k=2,r=0.5",dtype=float32' \\
        --tasks pope,mme --batch_size 8 --output_path out --log_samples

All arguments go to lmms-eval unchanged; minillava/harness/lmms_eval.py lists the model arguments. A
plan with commas needs double quotes inside the argument, as above. `lmms-eval --model minillava …`
runs the same model, but logs a failure and ends with exit code 0; this command ends with one line
`error: …` and exit code 2. `--verbosity DEBUG` shows the traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from minillava.app.command import CommandParser, print_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line of lmms-eval; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    asks_for_help = words in (["-h"], ["--help"])
    if asks_for_help:
        print(__doc__, flush=True)
    if importlib.util.find_spec("lmms_eval") is None:
        if asks_for_help:
            return 0
        print_error(ValueError("lmms-eval is not installed; pip install 'minillava[lmms]'"))
        return 2
    try:
        _run(words)
    except _Failed as failed:
        print_error(failed.error)
        return 2
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print_error(error)
        return 2
    return 0


def _run(words: list[str]) -> None:
    import lmms_eval.__main__ as own  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lmms_eval.cli.dispatch import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        main as dispatch,
    )

    single = _stop_on_failure(own.cli_evaluate_single)
    with (
        patch.object(own, "cli_evaluate_single", single),
        patch.object(argparse.ArgumentParser, "error", CommandParser.error),
        patch.object(sys, "argv", ["lmms-eval", *words]),
    ):
        dispatch()


class _Failed(BaseException):
    """An error that passes through lmms-eval's `except Exception`, which would only log it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _stop_on_failure(
    evaluate: Callable[[argparse.Namespace], Any],
) -> Callable[[argparse.Namespace], Any]:
    """Wrap a run of lmms-eval so that its failure ends the program."""

    def run(args: argparse.Namespace) -> Any:
        try:
            if args.tasks is None:
                raise ValueError("--tasks is missing; give names, or list to see them")
            return evaluate(args)
        except Exception as error:
            if args.verbosity == "DEBUG":
                traceback.print_exc()
            raise _Failed(_with_type(error)) from error

    return run


def _with_type(error: Exception) -> Exception:
    """Put the type in front of the message of errors whose message alone says too little."""
    if isinstance(error, ValueError | OSError | MemoryError | RuntimeError):
        return error
    return ValueError(f"{type(error).__name__}: {error}; --verbosity DEBUG shows where")


if __name__ == "__main__":
    sys.exit(main())
