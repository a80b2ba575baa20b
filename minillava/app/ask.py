"""Answer the question of a command line: check it, open its images, load the model, ask."""

from __future__ import annotations

import argparse
import json
import sys
import time

from ..loading.checkpoint import load
from ..loading.compiled import asks_again
from ..processing.image import check_aspect
from ..pruning import parse_plan_with_files
from ..request import Settings
from .chat import Chat
from .cli import DEMO
from .command import quiet_decoders
from .method_table import list_methods
from .open_image import open_image
from .output_file import check_output
from .ranks import Ranks, answer_together


def answer(args: argparse.Namespace) -> None:
    """Do what the parsed command line says. Raises ValueError for what cannot be done."""
    if args.list_methods:
        print(list_methods(), flush=True)
        return
    files, question = _choose_question(args)
    with answer_together() as ranks:
        chat = _load_chat(args, files, ranks)
        if args.chat:
            chat.answer_questions(args.prompt)
        elif args.raw_prompt:
            chat.answer_prompt(question, question)
        else:
            chat.answer_prompt(chat.processor.prompt(question, len(files)), question)


def _choose_question(args: argparse.Namespace) -> tuple[list[str], str]:
    """The image files and the question; the question is empty if a chat begins without one."""
    files, question = args.image, args.prompt
    if args.raw_prompt and (question is None or args.chat):
        raise ValueError("--raw-prompt goes with --prompt and without --chat; give --prompt TEXT")
    if not files and question is None:
        return read_demo_question()
    if question is None and not args.chat:
        raise ValueError(f"--image {files[0]} has no question; add --prompt TEXT, or --chat")
    if question is not None and not question.strip():
        raise ValueError(f"--prompt {question!r} is empty; give a question")
    return files, question or ""


def read_demo_question() -> tuple[list[str], str]:
    example = DEMO / "example.json"
    if not example.is_file():
        raise ValueError(
            f"there is no demo in {DEMO}: it comes with the repository, not with the wheel; give "
            "--model (a folder, or a hub id such as llava-hf/llava-1.5-7b-hf), --image and --prompt"
        )
    return [str(DEMO / "example.png")], json.loads(example.read_text("utf-8"))["question"]


def _load_chat(args: argparse.Namespace, files: list[str], ranks: Ranks) -> Chat:
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
        check_output("--overlay", args.overlay, (".png", ".svg"))
        if not files:
            raise ValueError(f"--overlay {args.overlay} draws on an image; give --image FILE")
    if args.image_aspect is not None:
        check_aspect(args.image_aspect)
    if args.compile and args.no_cache:
        raise ValueError("--compile prepares decoding from the cache; leave it out, or --no-cache")
    with quiet_decoders():
        images = [open_image(file) for file in files]
    name = find_demo() if args.model is None else args.model
    mesh, device = ranks.mesh(args.device), ranks.device(args.device)
    start = time.perf_counter()
    model, processor = load(
        name,
        device,
        args.dtype,
        args.quantize,
        args.revision,
        progress=True,
        mesh=mesh,
        compile=args.compile,
        pack=True,
    )
    load_seconds = time.perf_counter() - start
    if plan.methods and not images:
        _print_note(f"there is no image, so --prune {args.prune} has nothing to prune")
    if args.compile and asks_again(plan, model):
        _print_note(
            "the plan chooses again for every token (mode=mask), so --compile has no effect"
        )
    return Chat(args, model, processor, images, plan, settings, name, load_seconds, ranks)


def _print_note(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)


def find_demo() -> str:
    if not (DEMO / "config.json").is_file():
        raise ValueError(
            f"there is no demo checkpoint in {DEMO}: it comes with the repository, not with the "
            "wheel; give --model a folder, or a hub id such as llava-hf/llava-1.5-7b-hf"
        )
    return str(DEMO)
