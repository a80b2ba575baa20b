"""Compare pruning plans on one question about one or more images: `python -m eval.compare`.

    python -m eval.compare --prune fastv:k=2,r=0.75 divprune:keep=16 --out sheet.html
    python -m eval.compare --image F --prompt TEXT --model M --prune PLAN PLAN --out sheet.png

The sheet has a column for each plan beside the unpruned model: the image with the patches that are
left, the answer, tokens, the time of the first token, and the KL divergence of the first token from
the unpruned one. Below are the patches that two plans keep in common, the answers over budgets of
image tokens, and the reasons why patches stayed. A plan that cannot run is a cell with the reason.
Without --image and --prompt it asks the demo's question about the demo's image.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from minillava import load
from minillava.app.ask import find_demo, read_demo_question
from minillava.app.command import (
    CommandParser,
    parse_non_negative_int,
    parse_path,
    parse_positive_int,
    quiet_decoders,
    run_command,
)
from minillava.app.open_image import open_image
from minillava.app.output_file import check_output, replace_whole
from minillava.processing.image import check_aspect
from minillava.pruning import parse_plan_with_files

from .ask import NEW_TOKENS, compare
from .page import write_page
from .record import record
from .runs import Comparison
from .sheet import draw_sheet
from .words import format_table

SUFFIXES = (".png", ".svg", ".html")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: _run(_make_parser().parse_args(arguments), arguments))


def _make_parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = CommandParser(
        prog="python -m eval.compare",
        description=first,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image", metavar="FILE|URL", nargs="+", action="extend", default=[], help="in order")
    add("--prompt", metavar="TEXT", help="the question, put into the checkpoint's template")
    add("--prune", metavar="PLAN", nargs="+", action="extend", required=True, help="plans")
    out_help = "the sheet, or with .html a page that holds everything and needs no server"
    add("--out", metavar="FILE.png|.svg|.html", type=parse_path, required=True, help=out_help)
    budget_help = "image tokens of an image to be left, at which each plan is asked again; without "
    budget_help += "numbers: none; default: 1/2 to 1/32 of all"
    add("--budgets", metavar="N", nargs="*", type=parse_positive_int, help=budget_help)
    new_help = f"default {NEW_TOKENS}"
    add("--max-new-tokens", metavar="N", type=parse_positive_int, default=NEW_TOKENS, help=new_help)
    add("--model", metavar="DIR|HUB_ID", help="checkpoint to load; default: the demo")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--focus", metavar="TEXT", help="text for text-guided methods; default: the question")
    add("--seed", metavar="S", type=parse_non_negative_int, help="for methods that draw at random")
    add("--image-aspect", metavar="A", help="crop or pad; default: the checkpoint's")
    add("--device", metavar="D", default="cpu", help="cpu, cuda or cuda:N; default cpu")
    dtype_help = "float32, float16, bfloat16 or auto (the fastest 16 bits); CPU default: float32"
    add("--dtype", metavar="T", help=dtype_help)
    add("--quantize", metavar="Q", help="int8, int8-dynamic, int4 or nf4")
    add("--json", action="store_true", help="print one object with all reports, not a table")
    return parser


def _run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    files, question = _choose_question(args)
    check_output("--out", args.out, SUFFIXES)
    if args.image_aspect is not None:
        check_aspect(args.image_aspect)
    with quiet_decoders():
        images = [open_image(file) for file in files]
    name = find_demo() if args.model is None else args.model
    model, processor = load(
        name, args.device, args.dtype, args.quantize, args.revision, progress=True, pack=True
    )
    about = {"Command": shlex.join(["python", "-m", "eval.compare", *argv]), "Model": name}
    about["Seed"] = "0, the default" if args.seed is None else str(args.seed)
    comparison = compare(
        model,
        processor,
        images,
        question,
        args.prune,
        budgets=args.budgets,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        focus=args.focus,
        image_aspect=args.image_aspect,
        about=about,
        read=parse_plan_with_files,
        progress=True,
    )
    _save(comparison, args.out)
    print(json.dumps(record(comparison, reports=True)) if args.json else format_table(comparison))


def _choose_question(args: argparse.Namespace) -> tuple[list[str], str]:
    """The image files and the question; the demo's, if none is given."""
    if not args.image and args.prompt is None:
        return read_demo_question()
    if not args.image:
        raise ValueError("a comparison is drawn on images; give at least one with --image FILE")
    if args.prompt is None:
        raise ValueError(f"--image {args.image[0]} has no question; add --prompt TEXT")
    if not args.prompt.strip():
        raise ValueError(f"--prompt {args.prompt!r} is empty; give a question")
    return args.image, args.prompt


def _save(comparison: Comparison, path: Path) -> None:
    """Write the file that the suffix stands for, completely or not at all."""
    kind = path.suffix.lower().lstrip(".")
    with replace_whole(path) as part:
        if kind == "html":
            part.write_text(write_page(comparison), "utf-8")
        else:
            draw_sheet(comparison).save(part, kind)


if __name__ == "__main__":
    sys.exit(main())
