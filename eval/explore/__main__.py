"""Explore pruning on a page: choose a picture, ask, compare plans, brush patches out and ask again.

    python -m eval.explore                          the demo checkpoint, offline
    python -m eval.explore --model llava-hf/llava-1.5-7b-hf --device cuda --dtype float16

The page is served at http://127.0.0.1:7860 until Ctrl-C, to programs of this computer only; with
--host to others as well. It needs `pip install -e '.[explore]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from minillava.app.command import (
    CommandParser,
    end_at_once,
    end_program,
    parse_non_negative_int,
    run_command,
)

NEEDED = ("gradio", "fastapi", "uvicorn", "numpy", "sklearn")  # of the extra `explore`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.explore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="DIR|HUB_ID", help="checkpoint to load; default: the demo")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--device", metavar="D", default="cpu", help="cpu, cuda or cuda:N; default cpu")
    add("--dtype", metavar="T", help="float32, float16, bfloat16 or auto; CPU default: float32")
    add("--quantize", metavar="Q", help="int8, int8-dynamic, int4 or nf4")
    add("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1")
    add("--port", metavar="N", type=parse_non_negative_int, default=7860, help="0: any free one")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.port > 65535:
        raise ValueError(f"--port {args.port} must be from 0 to 65535")
    if missing := [package for package in NEEDED if not _is_installed(package)]:
        raise ValueError(
            f"{missing[0]} is not installed; the page needs pip install 'minillava[explore]'"
        )
    with end_at_once():  # these import torch, which takes seconds
        from .server import allowed_hosts, listen, temporary_folder

    with temporary_folder() as folder, listen(args.host, args.port) as socket:
        from .serve import serve  # imports Gradio, which reads the folder's name

        port = socket.getsockname()[1]
        shown = f"[{args.host}]" if ":" in args.host else args.host
        hosts = allowed_hosts(args.host)
        if not hosts:
            print(
                f"note: everybody who can reach {shown}, port {port}, can use the page",
                file=sys.stderr,
            )
        serve(args, socket, folder, hosts, f"http://{shown}:{port}")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    end_program(main())
