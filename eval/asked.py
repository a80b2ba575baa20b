"""One question about images on the command line of eval.attention and eval.smallest."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minillava import Batch, load
from minillava.app.ask import read_demo_question
from minillava.app.canvas import Drawing
from minillava.app.chat import check_length
from minillava.app.command import CommandParser, parse_non_negative_int, parse_path, quiet_decoders
from minillava.app.open_image import open_image
from minillava.app.output_file import check_output, replace_whole
from minillava.llava import LLaVA
from minillava.loading.checkpoint import DTYPES, QUANTIZE
from minillava.processing.image import check_aspect
from minillava.processing.processor import Processor
from minillava.pruning.base import Plan

from .plans import read_plan

DEMO = Path(__file__).parent.parent / "weights" / "demo"


@dataclass(frozen=True)
class Asked:
    """A question with its images and plan, and the model that answers it."""

    args: argparse.Namespace
    model: LLaVA
    processor: Processor
    images: list[Image.Image]
    question: str
    batch: Batch
    plan: Plan
    command: str  # as typed

    @property
    def aspect(self) -> str:
        return self.args.image_aspect or self.processor.aspect

    def about(self) -> dict[str, str]:
        """What a picture's file says about its origin."""
        return {"Command": self.command, "Model": self.args.model, "Seed": str(self.args.seed)}

    def save(self, drawing: Drawing) -> None:
        """Save a drawing to --out, completely or not at all."""
        with replace_whole(self.args.out) as part:
            drawing.save(part, self.args.out.suffix.lower().lstrip("."))


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the options of a question: --image, --prompt, --model and their like."""
    parser = CommandParser(
        prog=f"python -m {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image", metavar="FILE|URL", nargs="+", action="extend", default=[], help="in order")
    add("--prompt", metavar="TEXT", help="the question; without image and prompt: the demo's")
    add("--out", type=parse_path, metavar="FILE", help="the picture, FILE.png or FILE.svg")
    add("--model", default=str(DEMO), metavar="DIR|HUB_ID", help="default: the demo")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N; default cpu")
    add("--dtype", choices=DTYPES)
    add("--quantize", choices=QUANTIZE)
    add("--image-aspect", metavar="A", help="crop or pad; default: the checkpoint's")
    parser.set_defaults(prune="none", focus=None, seed=0)
    return parser


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add --prune, --focus and --seed."""
    add = parser.add_argument
    add("--prune", metavar="PLAN", help="pruning methods, for example fastv:k=2,r=0.5")
    add("--focus", metavar="TEXT", help="text for text-guided methods; default: the question")
    add("--seed", type=parse_non_negative_int, metavar="S", help="of random methods; default 0")


def open_question(args: argparse.Namespace, argv: Sequence[str], name: str) -> Asked:
    """Check the command line, open the images and load the model. Raises ValueError."""
    files, question = args.image, args.prompt
    if not files and question is None:
        files, question = read_demo_question()
    if not files:
        raise ValueError(f"--prompt {question!r} has no image; give one with --image FILE")
    if question is None or not question.strip():
        raise ValueError(f"--image {files[0]} has no question; give one with --prompt TEXT")
    if args.out is not None:
        check_output("--out", args.out, (".png", ".svg"))
    if args.image_aspect is not None:
        check_aspect(args.image_aspect)
    parsed = read_plan(args.prune).plan
    with quiet_decoders():
        images = [open_image(file) for file in files]
    model, processor = load(
        args.model, args.device, args.dtype, args.quantize, args.revision, progress=True, pack=True
    )
    check_length(model, question)
    prompt = processor.prompt(question, len(images))
    focus = parsed.focus if args.focus is None else args.focus
    batch = processor([prompt], [images], args.image_aspect, parsed.tokens or "hf", focus)
    command = shlex.join(["python", "-m", name, *argv])
    return Asked(args, model, processor, images, question, batch, parsed, command)
