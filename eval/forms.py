"""How accurate the stored forms of weights are: `python -m eval.forms`.

    python -m eval.forms                                    every form, on the demo
    python -m eval.forms --model DIR --form bfloat16 int8   these forms of a checkpoint
    python -m eval.forms --model DIR --text FILE            on running text

float32 answers the demo's held-out questions. Every form is then given the same tokens, and its
distribution of each next token is compared with that of float32. With --text, both read the file
in pieces of 256 tokens, and the distributions after every token are compared:

- KL: mean Kullback-Leibler divergence of the form's distribution from float32's, in nats;
- top-1: share of tokens for which both find the same token the likeliest;
- bytes: the weights as this machine holds them; arithmetic: what it computes with.

Answers of a model to what it was trained for are almost certain, so that rounding moves them
little; running text has uncertain tokens and shows more of it (weights/train_text.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava import Batch, load
from minillava.app.cli import DEMO
from minillava.app.command import CommandParser, parse_path, parse_positive_int, run_command
from minillava.app.output_file import check_output, replace_whole
from minillava.attention import causal_attention
from minillava.cache import KVCache
from minillava.engine import decode, hidden_states_read, prefill
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.loading.checkpoint import QUANTIZE, find_device
from minillava.processing.processor import Processor
from minillava.pruning.base import Plan
from minillava.quant.linear import weight_bytes
from minillava.report import describe_arithmetic
from minillava.request import prompts_of

from .demo import questions

FORMS = ("bfloat16", "float16", *QUANTIZE)
NEW_TOKENS = 16  # the longest answer but a caption's
QUESTIONS, PIECES = 96, 32  # by default
PIECE = 256  # tokens of text that are read at once


@dataclass(frozen=True)
class Row:
    """One form, compared with float32 over all tokens of all answers."""

    form: str
    kl: float
    top_1: float
    weight_bytes: int
    arithmetic: str


@dataclass(frozen=True)
class Answered:
    """A batch of questions as float32 answered it."""

    batch: Batch
    tokens: Tensor  # (B, n) ids that were fed; after a sample's end they are arbitrary
    logits: Tensor  # (B, n, V) what each was chosen from; NaN after a sample's end


def answer(model: LLaVA, batch: Batch) -> Answered:
    """The greedy answers of float32."""
    result = generate(model, batch, max_new_tokens=NEW_TOKENS, output_logits=True)
    assert result.logits is not None
    tokens = result.logits.nan_to_num(0.0).argmax(-1)  # (B, n)
    return Answered(batch, tokens, result.logits)


@torch.inference_mode()
def follow(model: LLaVA, answered: Answered) -> Tensor:
    """Logits (B, n, V) of another model that is given the same tokens one by one."""
    batch, plan, text = answered.batch, Plan(), model.config.text
    encoded = None
    if batch.pixels is not None:
        encoded = model.encode(batch.pixels, hidden_states_read(model, plan))
    cache = KVCache(text, answered.tokens.shape[1], model.dtype, model.device)
    logits, state = prefill(model, prompts_of(model, batch), encoded, plan, cache)
    steps = [logits]
    for tokens in answered.tokens.T[:-1]:
        steps.append(decode(model, tokens.to(model.device), state))
    return torch.stack(steps, dim=1)


@torch.inference_mode()
def read(model: LLaVA, ids: Tensor) -> Tensor:
    """Logits (1, T, V) after each of the ids (T,) of a text."""
    x = model.embed(ids)  # (T, D)
    rope = model.llama.rope(torch.arange(len(ids)), model.dtype)
    for layer in range(model.config.text.num_hidden_layers):
        x = model.block(layer)(x, rope, causal_attention)
    return model.llama.logits(x)[None]


def read_text(file: Path) -> str:
    """The text of the file that --text names. Raises ValueError if it cannot be read."""
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise ValueError(
            f"--text {file} cannot be read ({error.strerror}); give a text file"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file} is not UTF-8 ({error}); give a text file") from None


def pieces(processor: Processor, file: Path, text: str, limit: int) -> list[Tensor]:
    """The first `limit` pieces of a file's text, PIECE ids each (ValueError if it is shorter than
    one)."""
    ids = torch.tensor(processor.tokenizer.encode(text))
    if len(ids) < PIECE:
        raise ValueError(f"--text {file} has {len(ids)} tokens; give a text of at least {PIECE}")
    return list(ids[: PIECE * limit].split(PIECE))[: len(ids) // PIECE]


def compare(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence and whether the likeliest token is the same, of each token that was answered.

    expected, found (B, n, V) logits; where `expected` is NaN there is no token. Each (tokens,).
    """
    real = ~expected[..., 0].isnan()  # (B, n)
    p, q = (x[real].double().log_softmax(-1) for x in (expected, found))  # (tokens, V)
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


@dataclass(frozen=True)
class Questions:
    """Answers of float32, and how another model follows them."""

    answers: Sequence[Answered]

    def logits(self, model: LLaVA) -> list[tuple[Tensor, Tensor]]:
        """(expected, found) of each batch."""
        return [(a.logits, follow(model, a)) for a in self.answers]


@dataclass(frozen=True)
class Text:
    """Pieces of a text with the logits of float32, and how another model reads them."""

    ids: Sequence[Tensor]
    expected: Sequence[Tensor]

    def logits(self, model: LLaVA) -> list[tuple[Tensor, Tensor]]:
        found = (read(model, ids) for ids in self.ids)
        return list(zip(self.expected, found, strict=True))

    def loss(self) -> float:
        """float32's loss in nats for each token."""
        pairs = zip(self.ids, self.expected, strict=True)
        losses = [F.cross_entropy(logits[0, :-1], ids[1:]) for ids, logits in pairs]
        return torch.stack(losses).mean().item()


def measure(model: LLaVA, form: str, asked: Questions | Text) -> Row:
    pairs = [compare(expected, found) for expected, found in asked.logits(model)]
    kl, same = (torch.cat(column).double().mean().item() for column in zip(*pairs, strict=True))
    return Row(form, kl, same, weight_bytes(model), describe_arithmetic(model)[0])


def ask(
    model: LLaVA, processor: Processor, args: argparse.Namespace, given: str | None
) -> Questions | Text:
    """Let float32 answer the questions or read the text that is given."""
    if given is None:
        groups = questions(processor, args.seed, args.limit or QUESTIONS, None)
        return Questions([answer(model, batch) for batch, _ in groups])
    ids = pieces(processor, args.text, given, args.limit or PIECES)
    text = Text(ids, [read(model, piece).cpu() for piece in ids])
    print(f"{sum(map(len, ids)):,} tokens; float32's loss is {text.loss():.3f} nats for each\n")
    return text


def run(args: argparse.Namespace) -> list[Row]:
    device = find_device(args.device)
    if args.out is not None:
        check_output("--out", args.out, (".json",))
    given = None if args.text is None else read_text(args.text)
    model, processor = load(args.model, device, "float32", progress=True)
    asked = ask(model, processor, args, given)
    rows = [measure(model, "float32", asked)]
    del model
    for form in args.form:
        quantize = form if form in QUANTIZE else None
        model, _ = load(args.model, device, None if quantize else form, quantize, progress=True)
        rows.append(measure(model, form, asked))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = ["| form | KL | top-1 | weights, bytes | arithmetic |", "|---|---:|---:|---:|---|"]
    for r in rows:
        numbers = f"{r.kl:.1e} | {100 * r.top_1:.2f} % | {r.weight_bytes:,}"
        lines.append(f"| `{r.form}` | {numbers} | {r.arithmetic} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = CommandParser(
        prog="python -m eval.forms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default=str(DEMO), metavar="DIR|HUB_ID", help="default: the demo")
    add("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    add("--text", type=parse_path, metavar="FILE", help="read this text, not the demo's questions")
    limits = f"questions, default {QUESTIONS}, or pieces of {PIECE} tokens of --text, {PIECES}"
    add("--limit", type=parse_positive_int, metavar="N", help=limits)
    add("--seed", type=parse_positive_int, default=2026, help="of the scenes, default 2026")
    add("--device", default="cpu", help="cpu, cuda or cuda:N; default cpu")
    add("--out", type=parse_path, metavar="FILE.json", help="also write one object for each form")
    args = parser.parse_args(argv)
    rows = run(args)
    print(table(rows))
    if args.out is not None:
        with replace_whole(args.out) as part:
            part.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
