"""Ask a LLaVA-1.5 model about images, with visual-token pruning.

Without arguments it asks the demo checkpoint a question about an image, both of which come with the
repository. The processes of `torchrun --nproc-per-node N -m minillava.generate ...` share one model
between them. An error is printed as one line on stderr, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .command import (
    CommandParser,
    end_at_once,
    end_program,
    parse_float,
    parse_int,
    parse_path,
    run_command,
    silence_other_ranks,
)

DEMO = Path(__file__).parents[2] / "weights" / "demo"  # beside the package in the repository


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C; the others
    are those of run_command."""
    with silence_other_ranks():
        return run_command(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def program() -> NoReturn:
    """The program `minillava`."""
    end_program(main())


def _run(argv: list[str]) -> None:
    args = _make_parser().parse_args(argv)
    args.command = shlex.join(["python", "-m", "minillava.generate", *argv])  # for pictures
    with end_at_once():  # torch takes seconds to import: not for --help, and Ctrl-C may come
        from .ask import answer

    answer(args)


def _make_parser() -> argparse.ArgumentParser:
    name = "python -m minillava.generate"
    parser = CommandParser(prog=name, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", metavar="DIR|HUB_ID", help="checkpoint to load; default: the demo")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--image", metavar="FILE|URL", nargs="+", action="extend", default=[], help="in order")
    add("--prompt", metavar="TEXT", help="the question, put into the checkpoint's template")
    plan_help = "pruning methods, for example fastv:k=2,r=0.5; see --list-methods"
    add("--prune", metavar="PLAN", default="", help=plan_help)
    add("--focus", metavar="TEXT", help="text for text-guided methods; default: the question")
    add("--max-new-tokens", metavar="N", type=parse_int, default=256, help="default 256")
    add("--min-new-tokens", metavar="N", type=parse_int, default=0, help="default 0")
    add("--temperature", metavar="T", type=parse_float, default=0.0, help="default 0: no sampling")
    add("--top-p", metavar="P", type=parse_float, default=1.0, help="sample the top tokens only")
    add("--seed", metavar="S", type=parse_int, help="for sampling and random pruning methods")
    add("--stop", metavar="TEXT", action="append", default=[], help="end the answer before TEXT")
    add("--device", metavar="D", default="cpu", help="cpu, cuda or cuda:N; default cpu")
    dtype_help = "float32, float16, bfloat16 or auto (the fastest 16 bits); CPU default: float32"
    add("--dtype", metavar="T", help=dtype_help)
    add("--quantize", metavar="Q", help="int8, int8-dynamic, int4 or nf4")
    compile_help = "prepare decoding: CUDA graphs; on a CPU torch.compile, which hardly pays"
    add("--compile", action="store_true", help=compile_help)
    add("--image-aspect", metavar="A", help="crop or pad; default: the checkpoint's")
    add("--raw-prompt", action="store_true", help="use --prompt as it is, with <image> in it")
    add("--no-cache", action="store_true", help="run the whole model again for each token")
    add("--json", action="store_true", help="print one object with the answer and a report")
    overlay_help = "draw what the plan did to the patches, and why: FILE.png or FILE.svg"
    add("--overlay", metavar="FILE", type=parse_path, help=overlay_help)
    add("--chat", action="store_true", help="go on with questions from stdin")
    add("--list-methods", action="store_true", help="show pruning methods, options and presets")
    return parser
