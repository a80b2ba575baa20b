"""How accurate the stored forms of weights are: `python -m eval.forms`.

    python -m eval.forms                                    every form, on the demo
    python -m eval.forms --model DIR --form bfloat16 int8   these forms of a checkpoint

float32 answers the demo's held-out questions. Every form is then given the same tokens, and its
distribution of each next token is compared with that of float32:

- KL: mean Kullback-Leibler divergence of the form's distribution from float32's, in nats;
- top-1: share of tokens for which both find the same token the likeliest;
- bytes: the weights as this machine holds them; arithmetic: what it computes with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minillava import Batch, load
from minillava.app.cli import DEMO
from minillava.app.command import CommandParser, parse_path, parse_positive_int, run_command
from minillava.cache import KVCache
from minillava.engine import decode, hidden_states_read, prefill
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.loading.checkpoint import QUANTIZE, find_device
from minillava.pruning.base import Plan
from minillava.quant.linear import weight_bytes
from minillava.report import describe_arithmetic
from minillava.request import prompts_of

from .demo import questions

FORMS = ("bfloat16", "float16", *QUANTIZE)
NEW_TOKENS = 16  # the longest answer but a caption's


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


def compare(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence and whether the likeliest token is the same, of each token that was answered.

    expected, found (B, n, V) logits; where `expected` is NaN there is no token. Each (tokens,).
    """
    real = ~expected[..., 0].isnan()  # (B, n)
    p, q = (x[real].double().log_softmax(-1) for x in (expected, found))  # (tokens, V)
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def measure(model: LLaVA, form: str, answers: Sequence[Answered]) -> Row:
    pairs = [compare(a.logits, follow(model, a)) for a in answers]
    kl, same = (torch.cat(column).double().mean().item() for column in zip(*pairs, strict=True))
    return Row(form, kl, same, weight_bytes(model), describe_arithmetic(model)[0])


def run(args: argparse.Namespace) -> list[Row]:
    device = find_device(args.device)
    model, processor = load(args.model, device, "float32", progress=True)
    groups = questions(processor, args.seed, args.limit, None)
    answers = [answer(model, batch) for batch, _ in groups]
    rows = [measure(model, "float32", answers)]
    del model
    for form in args.form:
        quantize = form if form in QUANTIZE else None
        model, _ = load(args.model, device, None if quantize else form, quantize, progress=True)
        rows.append(measure(model, form, answers))
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
    parser = CommandParser(prog="python -m eval.forms", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default=str(DEMO), metavar="DIR|HUB_ID", help="default: the demo")
    add("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    add("--limit", type=parse_positive_int, default=96, metavar="N", help="questions, default 96")
    add("--seed", type=parse_positive_int, default=2026, help="of the scenes, default 2026")
    add("--device", default="cpu", help="cpu, cuda or cuda:N; default cpu")
    add("--out", type=parse_path, metavar="FILE.json", help="also write one object for each form")
    args = parser.parse_args(argv)
    rows = run(args)
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
