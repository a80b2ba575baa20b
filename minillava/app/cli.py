"""Ask a LLaVA-1.5 model about pictures, with visual-token pruning.

Without arguments a bundled question about a bundled picture goes to the demo checkpoint. What
cannot be done ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ..generate import Settings
from ..image import ASPECTS
from ..loading.checkpoint import load
from ..pruning import parse_plan_with_files
from .chat import Session
from .command import Parser, command, real, whole
from .method_table import methods
from .open_image import open_image

DEMO = Path(__file__).parents[2] / "weights" / "demo"  # beside the package in the repository


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    return command(lambda: _run(_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.list_methods:
        print(methods(), flush=True)
        return
    files, question = _asked(args)
    session = _session(args, files)
    if args.chat:
        session.chat(args.prompt)
    elif args.raw_prompt:
        session.ask(question)
    else:
        session.ask(session.processor.prompt(question, len(files)))


def _asked(args: argparse.Namespace) -> tuple[list[str], str]:
    """The pictures, and the question unless there is a chat."""
    files, question = args.image, args.prompt
    if args.raw_prompt and (question is None or args.chat):
        raise ValueError("--raw-prompt is for the text of --prompt, without --chat; give that")
    if not files and question is None:
        return _bundled()
    if question is None and not args.chat:
        raise ValueError(f"--image {files[0]} has no question; add --prompt TEXT, or --chat")
    if question is not None and not question.strip():
        raise ValueError(f"--prompt {question!r} is empty; give a question")
    return files, question or ""


def _bundled() -> tuple[list[str], str]:
    example = DEMO / "example.json"
    if not example.is_file():
        raise ValueError(
            f"there is no demo in {DEMO}: it comes with the repository, not with the wheel; give "
            "--model (a folder, or a hub id such as llava-hf/llava-1.5-7b-hf), --image and --prompt"
        )
    return [str(DEMO / "example.png")], json.loads(example.read_text("utf-8"))["question"]


def _session(args: argparse.Namespace, files: list[str]) -> Session:
    """Whatever can be refused without the model is refused before it is loaded."""
    plan = parse_plan_with_files(args.prune)
    settings = Settings(
        args.max_new_tokens,
        args.min_new_tokens,
        tuple(args.stop),
        args.temperature,
        args.top_p,
        args.seed,
    )
    if args.overlay:
        _check_overlay(args.overlay, files)
    images = [open_image(file) for file in files]
    name = _demo() if args.model is None else args.model
    began = time.perf_counter()
    model, processor = load(
        name, args.device, args.dtype, args.quantize, args.revision, progress=True
    )
    return Session(
        model,
        processor,
        images,
        plan,
        settings,
        name,
        tokens=plan.tokens or "hf",
        focus=plan.focus if args.focus is None else args.focus,
        aspect=args.image_aspect,
        use_cache=not args.no_cache,
        as_json=args.json,
        drawing=args.overlay,
        load_seconds=time.perf_counter() - began,
    )


def _demo() -> str:
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
        raise ValueError(f"--overlay {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--overlay {path}: {path.parent} cannot be written; name another folder")
    if not files:
        raise ValueError(f"--overlay {path} draws on a picture; give one with --image FILE")


# ---------------------------------------------------------------- flags


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m minillava.generate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", metavar="DIR|HUB_ID", help="checkpoint; default: the demo")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--image", metavar="FILE|URL", nargs="+", action="extend", default=[], help="in order")
    add("--prompt", metavar="TEXT", help="the question, put into the checkpoint's template")
    add(
        "--prune",
        metavar="PLAN",
        default="",
        help="for example fastv:k=2,r=0.5; --list-methods shows all",
    )
    add("--focus", metavar="TEXT", help="what text-guided methods look at, else the question")
    add("--max-new-tokens", metavar="N", type=whole, default=256)
    add("--min-new-tokens", metavar="N", type=whole, default=0)
    add("--temperature", metavar="T", type=real, default=0.0, help="0: always the likeliest token")
    add("--top-p", metavar="P", type=real, default=1.0)
    add("--seed", metavar="S", type=whole, help="of sampling, and of methods that draw")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text")
    add("--device", metavar="D", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", metavar="T", help="float32, float16 or bfloat16; on a CPU of storage only")
    add("--quantize", metavar="Q", help="int8, int8-dynamic or int4")
    add("--image-aspect", choices=ASPECTS, help="default: the checkpoint's")
    add("--raw-prompt", action="store_true", help="no template: the prompt has its own <image>")
    add("--no-cache", action="store_true", help="run everything again for each token")
    add("--json", action="store_true", help="one object with the text and the run's report")
    add("--overlay", metavar="PNG", type=Path, help="draw which patches the plan kept")
    add("--chat", action="store_true", help="go on with the lines of stdin")
    add("--list-methods", action="store_true", help="show pruning methods, options and presets")
    return parser
