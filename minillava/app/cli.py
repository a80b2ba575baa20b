"""Ask a LLaVA-1.5 model about images, with visual-token pruning.

Without arguments it asks the demo checkpoint a question about an image, both of which come with the
repository. An error is printed as one line on stderr, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ..loading.checkpoint import load
from ..processing.image import ASPECTS
from ..pruning import parse_plan_with_files
from ..request import Settings
from .chat import Chat
from .command import CommandParser, parse_float, parse_int, run_command
from .method_table import list_methods
from .open_image import open_image

DEMO = Path(__file__).parents[2] / "weights" / "demo"  # beside the package in the repository


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    return run_command(lambda: _run(_make_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.list_methods:
        print(list_methods(), flush=True)
        return
    files, question = _choose_question(args)
    chat = _load_chat(args, files)
    if args.chat:
        chat.answer_questions(args.prompt)
    elif args.raw_prompt:
        chat.answer_prompt(question)
    else:
        chat.answer_prompt(chat.processor.prompt(question, len(files)))


def _choose_question(args: argparse.Namespace) -> tuple[list[str], str]:
    """The image files and the question; the question is empty if a chat begins without one."""
    files, question = args.image, args.prompt
    if args.raw_prompt and (question is None or args.chat):
        raise ValueError("--raw-prompt goes with --prompt and without --chat; give --prompt TEXT")
    if not files and question is None:
        return _read_demo_question()
    if question is None and not args.chat:
        raise ValueError(f"--image {files[0]} has no question; add --prompt TEXT, or --chat")
    if question is not None and not question.strip():
        raise ValueError(f"--prompt {question!r} is empty; give a question")
    return files, question or ""


def _read_demo_question() -> tuple[list[str], str]:
    example = DEMO / "example.json"
    if not example.is_file():
        raise ValueError(
            f"there is no demo in {DEMO}: it comes with the repository, not with the wheel; give "
            "--model (a folder, or a hub id such as llava-hf/llava-1.5-7b-hf), --image and --prompt"
        )
    return [str(DEMO / "example.png")], json.loads(example.read_text("utf-8"))["question"]


def _load_chat(args: argparse.Namespace, files: list[str]) -> Chat:
    """Load the model, after checking everything that can be checked without it."""
    plan = parse_plan_with_files(args.prune)
    settings = Settings(
        args.max_new_tokens,
        args.min_new_tokens,
        tuple(args.stop),
        args.temperature,
        args.top_p,
        args.seed,
        use_cache=not args.no_cache,
    )
    if args.overlay:
        _check_overlay(args.overlay, files)
    images = [open_image(file) for file in files]
    name = _find_demo() if args.model is None else args.model
    start = time.perf_counter()
    model, processor = load(
        name, args.device, args.dtype, args.quantize, args.revision, progress=True
    )
    load_seconds = time.perf_counter() - start
    return Chat(args, model, processor, images, plan, settings, name, load_seconds)


def _find_demo() -> str:
    if not (DEMO / "config.json").is_file():
        raise ValueError(
            f"there is no demo checkpoint in {DEMO}: it comes with the repository, not with the "
            "wheel; give --model a folder, or a hub id such as llava-hf/llava-1.5-7b-hf"
        )
    return str(DEMO)


def _check_overlay(path: Path, files: Sequence[str]) -> None:
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"--overlay {path} must be a file; give a name that ends in .png")
    if not path.parent.is_dir():
        raise ValueError(f"--overlay {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--overlay {path}: {path.parent} is not writable; choose another folder")
    if not files:
        raise ValueError(f"--overlay {path} draws on an image; give one with --image FILE")


# ---------------------------------------------------------------- flags


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
    add("--quantize", metavar="Q", help="int8, int8-dynamic or int4")
    add("--image-aspect", choices=ASPECTS, help="default: the checkpoint's")
    add("--raw-prompt", action="store_true", help="use --prompt as it is, with <image> in it")
    add("--no-cache", action="store_true", help="run the whole model again for each token")
    add("--json", action="store_true", help="print one object with the answer and a report")
    add("--overlay", metavar="PNG", type=Path, help="draw which patches the plan kept")
    add("--chat", action="store_true", help="go on with questions from stdin")
    add("--list-methods", action="store_true", help="show pruning methods, options and presets")
    return parser
