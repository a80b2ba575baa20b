"""Measure the time and memory of plans and number formats: `python -m eval.latency`.

    python -m eval.latency                                        the demo, unpruned and FastV
    python -m eval.latency --shape 7b --form int8-dynamic --prune fastv:k=2,r=0.75
    python -m eval.latency --model DIR --form float32 int8 --prune divprune:keep=64 --json
    python -m eval.latency --shape 7b --form int8-dynamic --batch 1 4 16

--shape uses random weights of the true shape instead of a checkpoint, because time does not depend
on their values. The prompt has one image. The plans take turns in each round, so that noise on the
machine affects all of them alike. Times are medians over the rounds; the first round warms up and
does not count. --batch answers several requests, equal ones, at a time: a request's first token
comes with the others', and requests/s counts whole answers of --new-tokens tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from minillava import Batch, load
from minillava.app.command import CommandParser, parse_positive_int, run_command
from minillava.attention import causal_attention
from minillava.config import Config, TextConfig, VisionConfig
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.loading.assemble import choose_forms, load_weights
from minillava.loading.checkpoint import DTYPES, QUANTIZE, empty_model, find_device
from minillava.loading.config_file import read_config
from minillava.loading.hub import find_checkpoint
from minillava.loading.native_decode import native_decoding
from minillava.loading.tensor_files import StoredTensor
from minillava.quant.linear import weight_bytes
from minillava.request import Settings, check_plan, prompts_of

from . import cost
from .plans import NONE, TypedPlan, read_plans

SHAPES = {
    "7b": Config(VisionConfig(), TextConfig()),
    "13b": Config(
        VisionConfig(),
        TextConfig(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        ),
    ),
}
FORMS = ("float32", "float16", "bfloat16", *QUANTIZE)
DEMO = Path(__file__).parent.parent / "weights" / "demo"


@dataclass(frozen=True)
class Row:
    """One plan in one number format, in seconds, bytes and FLOPs. Shares: of the unpruned plan."""

    form: str
    plan: str
    batch: int  # requests at a time; times, cache and FLOPs/s are those of all of them
    vision: cost.Spread
    prefill: cost.Spread
    first_token: cost.Spread
    per_token: cost.Spread
    requests_per_second: cost.Spread  # whole answers
    choosing: float  # seconds of the prefill spent in the plan's choices
    layers_alone: float  # seconds of the decoder's layers alone, at one request's row counts
    tokens_entering: list[int]  # of one request
    fastv_share: float
    flops: int  # exact, of one request's prefill
    ideal_speedup: float  # of the prefill, computed from FLOPs
    speedup: float  # of the prefill, measured: median over rounds of the ratio
    cache_bytes: int
    peak_bytes: int
    weight_bytes: int
    bandwidth_share: float  # bytes read for a token per second, relative to the memory bandwidth
    pays: bool


@dataclass(frozen=True)
class Limits:
    """The limits of the machine."""

    bandwidth: float  # bytes per second
    gemm: dict[str, float]  # format -> FLOPs per second of the MLP's first matrix


@dataclass(frozen=True)
class Random(StoredTensor):
    """A tensor that is not in any file: ones for norms, zeros for biases, otherwise Gaussian."""

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if len(self.shape) == 1:
            value = 1.0 if self.name.endswith("weight") else 0.0
            return torch.full(self.shape, value, device=device, dtype=dtype)
        pool = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(len(self.name)))
        pool = (pool * self.shape[-1] ** -0.5).to(dtype)
        values = torch.empty(self.shape, dtype=dtype)
        for piece in values.view(-1).split(len(pool)):
            piece.copy_(pool[: len(piece)])
        return values.to(device)


def random_model(config: Config, form: str, device: torch.device) -> LLaVA:
    """A model of this shape with random weights, as load(pack=True) makes it of float16 files."""
    model = empty_model(config)
    found = {
        name: Random(Path(), name, tuple(tensor.shape), "F16")
        for name, tensor in model.state_dict().items()
    }
    quantize = form if form in QUANTIZE else None
    storage = torch.float16 if quantize else DTYPES[form]
    forms = choose_forms(model, found, quantize, Path())
    load_weights(model, found, device, storage, forms, progress=True)
    model.compiled = native_decoding(model)
    return model


def _image_start(text_tokens: int) -> int:
    return min(35, text_tokens // 2)


def random_batch(
    config: Config, text_tokens: int, device: torch.device, requests: int = 1
) -> Batch:
    """One image within random text: 35 tokens before it (half of a short text), the rest after.

    All requests are equal.
    """
    N, before = config.vision.num_patches, _image_start(text_tokens)
    generator = torch.Generator().manual_seed(0)
    highest = min(config.text.vocab_size, config.image_token_id)
    ids = torch.randint(3, highest, (1, text_tokens + N), generator=generator)
    ids[0, before : before + N] = config.image_token_id
    size = config.vision.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    ids, pixels = ids.expand(requests, -1), pixels.expand(requests, -1, -1, -1)
    return Batch(
        ids.to(device), torch.ones_like(ids, dtype=torch.bool).to(device), pixels.to(device)
    )


def layers_alone(model: LLaVA, entering: Sequence[int]) -> float:
    """Seconds of the decoder's blocks alone, on random rows."""
    D = model.config.text.hidden_size
    rows = {n: torch.randn(n, D, device=model.device, dtype=model.dtype) for n in set(entering)}
    ropes = {n: model.llama.rope(torch.arange(n, device=model.device), model.dtype) for n in rows}

    def run() -> None:
        for block, n in zip(model.llama.blocks, entering, strict=True):
            if n:
                block(rows[n], ropes[n], causal_attention)

    with torch.inference_mode():
        return cost.best_seconds(run, model.device, repeats=1)


@dataclass
class Measured:
    """The measurements of one plan, a value for each round so far."""

    clock: cost.Clock = field(default_factory=cost.Clock)
    batch: int = 1
    new_tokens: int = 1
    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    entering: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int = 0


def measure(
    model: LLaVA,
    form: str,
    plans: Mapping[str, TypedPlan],
    batch: Batch,
    new_tokens: int,
    repeats: int,
    bandwidth: float,
) -> list[Row]:
    """Measure all plans in turn, in `repeats` rounds after one for warming up.

    The first plan must be the unpruned one: the others are compared with it.
    """
    layers, patches = model.config.text.num_hidden_layers, model.config.vision.num_patches
    settings, prompts = Settings(new_tokens, new_tokens, (), 0.0, 1.0, 0), prompts_of(model, batch)
    for typed in plans.values():  # refuse all that cannot run before any plan is timed
        check_plan(model, prompts, typed.plan.resolve(layers, patches), settings)
    B = len(batch.ids)
    results = {text: Measured(batch=B, new_tokens=new_tokens) for text in plans}
    for turn in range(repeats + 1):
        for text, m in results.items():
            plan = cost.with_timed_choices(plans[text].plan, model, m.clock)
            report = generate(
                model, batch, plan, max_new_tokens=new_tokens, min_new_tokens=new_tokens, seed=0
            ).report
            if turn:
                for name in ("vision", "prefill", "first_token", "per_token"):
                    getattr(m, name).append(getattr(report, name))
            else:
                m.clock.seconds = 0.0
                m.entering = [layer[0] for layer in report.tokens_entering]
                m.cache_bytes, m.peak_bytes = report.cache_bytes, report.peak_bytes or 0
    unpruned = results[next(iter(plans))]
    return [_row(model, form, text, m, unpruned, bandwidth) for text, m in results.items()]


def _row(
    model: LLaVA, form: str, text: str, m: Measured, unpruned: Measured, bandwidth: float
) -> Row:
    config = model.config.text
    flops = cost.decoder_flops(m.entering, config)
    ratios = [a / b for a, b in zip(unpruned.prefill, m.prefill, strict=True)]
    speedup = cost.Spread.of(ratios).median
    per_token = cost.Spread.of(m.per_token)
    # A token reads one row of the embedding, or all of it if it is also the output head.
    table = 0 if config.tie_word_embeddings else model.llama.embed_tokens.weight.nbytes
    read = weight_bytes(model.llama) - table + m.cache_bytes
    return Row(
        form=form,
        plan=text,
        batch=m.batch,
        vision=cost.Spread.of(m.vision),
        prefill=cost.Spread.of(m.prefill),
        first_token=cost.Spread.of(m.first_token),
        per_token=per_token,
        requests_per_second=cost.Spread.of(
            [
                m.batch / (first + (m.new_tokens - 1) * later)
                for first, later in zip(m.first_token, m.per_token, strict=True)
            ]
        ),
        choosing=m.clock.seconds / len(m.prefill),
        layers_alone=layers_alone(model, m.entering),
        tokens_entering=m.entering,
        fastv_share=cost.fastv_share(m.entering, unpruned.entering[0], config),
        flops=flops,
        ideal_speedup=cost.decoder_flops(unpruned.entering, config) / flops,
        speedup=speedup,
        cache_bytes=m.cache_bytes,
        peak_bytes=m.peak_bytes,
        weight_bytes=weight_bytes(model),
        bandwidth_share=read / per_token.median / bandwidth if per_token.median else 0.0,
        pays=text == NONE or speedup > 1,
    )


def run(args: argparse.Namespace) -> tuple[list[Row], Limits]:
    """Measure all plans on each format in turn, with one model in memory at a time."""
    device = find_device(args.device)
    if args.layers and args.shape is None:
        raise ValueError(f"--layers {args.layers} is of --shape; give --shape 7b or 13b with it")
    plans = read_plans([NONE, *args.prune])
    _check(args, plans)
    limits = Limits(cost.memory_bandwidth(device), {})
    rows: list[Row] = []
    for form in args.form:
        cost.return_freed_memory()
        with cost.peak_memory() as peak:
            began = time.perf_counter()
            model = _model(args, form, device)
            print(f"{form}: {time.perf_counter() - began:.1f} s to load", file=sys.stderr)
            found = []
            for requests in args.batch:
                batch = random_batch(model.config, args.text_tokens, device, requests)
                found += measure(
                    model, form, plans, batch, args.new_tokens, args.repeats, limits.bandwidth
                )
            highest = peak()
        up, text = model.llama.get_submodule("blocks.0.mlp.up_proj"), model.config.text
        limits.gemm[form] = cost.gemm_rate(
            up, batch.ids.shape[1], text.hidden_size, text.intermediate_size, model
        )
        rows += [replace(row, peak_bytes=row.peak_bytes or highest) for row in found]
        del model, up
    return rows, limits


def _model(args: argparse.Namespace, form: str, device: torch.device) -> LLaVA:
    if args.shape is None:
        quantize = form if form in QUANTIZE else None
        dtype = None if quantize else form
        return load(args.model, device, dtype, quantize, progress=True, pack=True)[0]
    return random_model(_config(args), form, device)


def _config(args: argparse.Namespace) -> Config:
    if args.shape is None:
        return read_config(find_checkpoint(args.model) / "config.json")
    config = SHAPES[args.shape]
    layers = args.layers or config.text.num_hidden_layers
    return with_layers(config, layers)


def with_layers(config: Config, layers: int) -> Config:
    """The same shape with another number of decoder layers."""
    return replace(config, text=replace(config.text, num_hidden_layers=layers))


def _check(args: argparse.Namespace, plans: Mapping[str, TypedPlan]) -> None:
    """Refuse plans, lengths and forms that a model does not allow, before it is loaded or made
    (ValueError)."""
    config = _config(args)
    layers, patches = config.text.num_hidden_layers, config.vision.num_patches
    most = config.text.max_position_embeddings
    if args.text_tokens + patches > most:
        raise ValueError(
            f"--text-tokens {args.text_tokens} and the image's {patches} are more than the model's "
            f"{most} positions; give at most {most - patches}"
        )
    start = _image_start(args.text_tokens)
    for typed in plans.values():
        for method in typed.plan.resolve(layers, patches).methods:
            method.check(layers, patches, (start,))
    if args.shape is None:
        return
    rows = args.text_tokens + patches + args.new_tokens
    for form in args.form:
        itemsize = 2 if form in ("float16", "bfloat16") else 4
        cache = cost.cache_bytes([rows] * layers, config.text, itemsize)
        _refuse_too_large(config, form, cache * max(args.batch))


def model_bytes(config: Config, form: str) -> float:
    """About the memory of a model's weights in one of FORMS."""
    values = sum(t.numel() for t in empty_model(config).state_dict().values())
    small = {"int4": 0.75, "nf4": 0.7}
    size = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, **small}.get(form, 1.2)
    return values * size


def _refuse_too_large(config: Config, form: str, cache: int) -> None:
    """Raise ValueError for a shape that does not fit in the free memory of the machine.

    cache: bytes of the KV caches of one batch.
    """
    needed, free = model_bytes(config, form) + cache + 2e9, available_memory()
    if needed > free:
        raise ValueError(
            f"--form {form} needs {needed / 1e9:.1f} GB of memory for this shape, "
            f"{cache / 1e9:.1f} GB of it for caches, and {free / 1e9:.1f} GB are free; take a "
            "smaller form, fewer --layers, or a smaller --batch"
        )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that a new process can allocate: free memory and the cache of files."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
    except OSError:  # not Linux: then the allocation itself fails
        return math.inf
    found = dict(line.split(":", 1) for line in lines)
    return 1024 * int(found["MemAvailable"].removesuffix("kB"))


# ---------------------------------------------------------------- output


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = """form | plan | batch | vision s | prefill s | first token s | per token ms |
        requests/s | speed-up | ideal | FastV's FLOPs | GFLOPs | choosing ms | layers alone s |
        tokens entering | cache MB | weights GB | process's peak GB | of bandwidth"""
    names = [" ".join(name.split()) for name in head.split("|")]
    lines = ["| " + " | ".join(names) + " |", "|---|---" + "|---:" * (len(names) - 2) + "|"]
    for r in rows:
        cells = [
            r.form,
            f"`{r.plan}`",
            str(r.batch),
            f"{r.vision.median:.3f}",
            f"{r.prefill.median:.3f}",
            f"{r.first_token.median:.3f}",
            f"{1e3 * r.per_token.median:.1f}",
            f"{r.requests_per_second.median:.3g}",
            f"{r.speedup:.2f}",
            f"{r.ideal_speedup:.2f}",
            f"{100 * r.fastv_share:.1f} %",
            f"{r.flops / 1e9:.1f}",
            f"{1e3 * r.choosing:.1f}",
            f"{r.layers_alone:.3f}",
            run_lengths(r.tokens_entering),
            f"{r.cache_bytes / 1e6:.1f}",
            f"{r.weight_bytes / 1e9:.2f}",
            f"{r.peak_bytes / 1e9:.2f}",
            f"{100 * r.bandwidth_share:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_lengths(counts: Sequence[int]) -> str:
    """[620, 620, 188] -> 2 x 620, 1 x 188."""
    return ", ".join(f"{len(list(same))} x {n}" for n, same in itertools.groupby(counts))


def as_json(rows: Sequence[Row], limits: Limits) -> str:
    found = {"machine": describe_machine(limits), "limits": limits, "rows": rows}
    return json.dumps(found, default=asdict)


def describe_machine(limits: Limits) -> str:
    rates = ", ".join(f"{form} {rate / 1e9:.0f}" for form, rate in limits.gemm.items())
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; memory reads {limits.bandwidth / 1e9:.1f} GB/s; the MLP's "
        f"first matrix runs at GFLOP/s: {rates}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.latency",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=str(DEMO), metavar="DIR|HUB_ID", help="default: the demo")
    which.add_argument(
        "--shape", choices=SHAPES, help="random weights of a true shape instead of --model"
    )
    add = parser.add_argument
    add("--layers", type=parse_positive_int, help="number of decoder layers, with --shape")
    add("--prune", nargs="+", default=["fastv:k=2,r=0.5"], metavar="PLAN")
    add("--form", nargs="+", default=["float32"], choices=FORMS)
    add(
        "--text-tokens",
        type=parse_positive_int,
        default=44,
        help="text tokens of the prompt, default 44",
    )
    add("--new-tokens", type=parse_positive_int, default=8)
    add(
        "--batch",
        type=parse_positive_int,
        nargs="+",
        default=[1],
        metavar="B",
        help="requests at a time, default 1",
    )
    add("--repeats", type=parse_positive_int, default=3, help="measured rounds, default 3")
    add("--device", default="cpu")
    add("--json", action="store_true", help="print one JSON object with every number")

    def act() -> None:
        args = parser.parse_args(argv)
        rows, limits = run(args)
        text = f"{describe_machine(limits)}\n\n{format_table(rows)}"
        print(as_json(rows, limits) if args.json else text)
        for row in rows:
            if not row.pays:
                print(
                    f"warning: {row.plan} does not pay off here: its prefill takes "
                    f"{1 / row.speedup:.2f} times as long as the unpruned one"
                    + (f" in batches of {row.batch}" if len(args.batch) > 1 else ""),
                    file=sys.stderr,
                )

    return run_command(act)


if __name__ == "__main__":
    sys.exit(main())
