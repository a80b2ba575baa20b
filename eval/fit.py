"""Fit options to samples: the layer of VTW, the table of FitPrune, the budget of any other method.

    python -m eval.fit vtw [--threshold 0.003]     the layer from which image tokens are withdrawn
    python -m eval.fit fitprune --save 60          a delete= list that saves 60 % of the FLOPs
    python -m eval.fit ivcprune:layer=4,average=60 the options that let 60 tokens enter a layer

Without --samples, they are fitted to the demo checkpoint on its scenes; with --samples FILE, to
--model. FILE has one JSON object on each line, with `image` (a path relative to FILE) and `text`
(the question).

VTW (lzhxmu/VTW 34a4199, --findk): for each layer K, the divergence KL(p without the image from
layer K on | p with it) of the first answer token is averaged over the samples. The result is the
first layer, from 5 on, where it is at most the threshold: 0.003 for LLaVA-1.5-7B, 0.0005 for 13B.

FitPrune (ywh187/FitPrune 2b70a5d, statistical_analysis.py): let a(i, j) be the largest attention
weight over heads. Each image token receives a sum of a from the image rows and one from the text
rows. A layer deletes the image tokens that are among the weakest by both sums. "Weakest" means: as
many of the smallest as can be deleted while the rest keeps 1 - alpha of the total in the unpruned
model. Deleting stops as soon as the FLOPs of the image tokens are low enough. alpha is bisected to
0.01. The table is what the last alpha deleted after each layer, averaged over samples and rounded
down. The released script does not define what happens if the limit is never reached; here one token
stays. All samples run as one batch, so that the layers of all can be counted together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from minillava import Batch, load, parse_plan
from minillava.app.command import (
    CommandParser,
    parse_float,
    parse_non_negative_int,
    parse_path,
    parse_positive_int,
    run_command,
)
from minillava.app.open_image import open_header
from minillava.config import TextConfig
from minillava.engine import hidden_states_read, prefill
from minillava.generate import generate
from minillava.llava import LLaVA
from minillava.pruning import Context, Keep, Method, Plan
from minillava.pruning.average import AveragePlan, entering, most_entering, nearest_variant
from minillava.pruning.base import Stage
from minillava.pruning.fitprune import strongest
from minillava.request import prompts_of

from .plans import read_plan
from .tasks.files import read_text
from .typed import refuse_special_file

# ---------------------------------------------------------------- VTW


def divergences(model: LLaVA, batches: Sequence[Batch], layers: Sequence[int]) -> Tensor:
    """KL(withdrawn | full) of the first new token, averaged over samples, for each layer (L,)."""

    def log_p(batch: Batch, plan: str | None) -> Tensor:
        result = generate(model, batch, parse_plan(plan), 1, output_logits=True)
        assert result.logits is not None
        return result.logits[0, 0].log_softmax(-1)

    total = torch.zeros(len(layers))
    for batch in batches:
        full = log_p(batch, None)
        for i, layer in enumerate(layers):
            p = log_p(batch, f"vtw:layer={layer}")
            total[i] += (p.exp() * (p - full)).sum().cpu()
    return total / len(batches)


def first_below(values: Tensor, layers: Sequence[int], threshold: float) -> int:
    """The first layer whose value is at most the threshold (ValueError if there is none)."""
    found = [layer for layer, v in zip(layers, values.tolist(), strict=True) if v <= threshold]
    if not found:
        raise ValueError(
            f"threshold={threshold} is below all of layers {layers[0]} to {layers[-1]}; the "
            f"smallest divergence is {float(values.min()):.6f}: give a larger --threshold"
        )
    return found[0]


# ---------------------------------------------------------------- FitPrune


@dataclass
class Record:
    """The record of one pass over all samples. Sums are [layer][sample]: (by image, by text)."""

    config: TextConfig
    n_samples: int
    alpha: float | None = None  # None: only record the sums, delete nothing
    target: float = 0.0  # FLOPs per sample
    limits: list[list[tuple[float, float]]] = field(default_factory=list)
    sums: list[list[tuple[float, float]]] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)  # [layer], sum over samples
    entering: list[int] = field(default_factory=list)  # [sample]
    flops: float = 0.0
    reached: bool = False

    def attention_flops(self, n: int) -> float:
        D = self.config.hidden_size
        return 3 * n * D**2 + 2 * n**2 * D

    def other_flops(self, n: int) -> float:
        D, M = self.config.hidden_size, self.config.intermediate_size
        return n * D**2 + 3 * n * D * M

    def all_flops(self, n: int) -> float:
        return self.attention_flops(n) + self.other_flops(n)

    def start_layer(self, layer: int) -> None:
        """Before a layer deletes: set `reached` if the remaining FLOPs are already few enough."""
        later = self.config.num_hidden_layers - 1 - layer
        forecast = 0.0
        for n in self.entering:
            self.flops += self.attention_flops(n)
            forecast += self.other_flops(n) + later * self.all_flops(n)
        if self.alpha is not None and (self.flops + forecast) / self.n_samples <= self.target:
            self.reached = True

    def delete(self, layer: int, sample: int, by_image: Tensor, by_text: Tensor) -> Tensor:
        """The image tokens that a layer deletes: (n,) bool."""
        sums = (float(by_image.sum()), float(by_text.sum()))
        self.sums[layer].append(sums)
        gone = torch.zeros(len(by_image), dtype=torch.bool)
        if self.alpha is not None and not self.reached:
            least = [(1 - self.alpha) * x for x in self.limits[layer][sample]]
            gone = weakest(by_image, least[0]) & weakest(by_text, least[1])
        self.deleted[layer] += int(gone.sum())
        self.entering[sample] = len(gone) - int(gone.sum())
        self.flops += self.other_flops(self.entering[sample])
        return gone


def weakest(weights: Tensor, least: float) -> Tensor:
    """The smallest of (n,) that can go while the rest sums to at least `least`: (n,) bool."""
    order = weights.sort(stable=True).indices
    left = weights.sum() - weights[order].cumsum(0)  # after 1, 2, ... are gone
    allowed = int((left >= least).long().cumprod(0).sum())
    gone = torch.zeros(len(weights), dtype=torch.bool)
    gone[order[: min(allowed, len(weights) - 1)].cpu()] = True
    return gone


@dataclass(frozen=True)
class Fitting(Method):
    """Drops after every layer but the last what its record says. Samples arrive in their order."""

    record: Record

    name: ClassVar[str] = "fitting"

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return tuple(
            ("decoder", layer + 1) for layer in range(self.record.config.num_hidden_layers - 1)
        )

    def choose(self, c: Context) -> Keep:
        layer, record = c.stage_index, self.record
        sample = len(record.sums[layer])
        if sample == 0:
            record.start_layer(layer)
        asked = (c.candidates, c.text_rows)
        by_image, by_text = (strongest(c, rows) / len(rows) for rows in asked)
        gone = record.delete(layer, sample, by_image, by_text)
        return Keep((~gone).nonzero()[:, 0].to(c.candidates.device))


def one_pass(model: LLaVA, batch: Batch, record: Record) -> Record:
    """Run all samples once and fill the record."""
    L, N = model.config.text.num_hidden_layers, model.config.vision.num_patches
    record.sums, record.deleted = [[] for _ in range(L - 1)], [0] * L
    record.entering = [N] * record.n_samples
    plan, prompts = Plan((Fitting(record),)), prompts_of(model, batch)
    assert batch.pixels is not None
    with torch.inference_mode():
        encoded = model.encode(batch.pixels, hidden_states_read(model, plan))
        prefill(model, prompts, encoded, plan)
    record.start_layer(L - 1)
    return record


def fit(model: LLaVA, batch: Batch, percent: int) -> tuple[int, ...]:
    """Tokens to delete after each layer, to save `percent` of the FLOPs of the image tokens."""
    config, n = model.config.text, len(batch.ids)
    limits = one_pass(model, batch, Record(config, n)).sums
    full = Record(config, 1).all_flops(model.config.vision.num_patches)
    target = full * config.num_hidden_layers * (1 - percent / 100)
    low, high, record = 0.0, 1.0, None
    while high - low > 0.01 + 1e-6:
        alpha = (low + high) / 2
        record = one_pass(model, batch, Record(config, n, alpha, target, limits))
        low, high = (low, alpha) if record.reached else (alpha, high)
    assert record is not None
    return tuple(count // n for count in record.deleted)


# ---------------------------------------------------------------- a budget


@dataclass(frozen=True)
class Reached:
    """A method with one value of its strength, and the image tokens that it lets into a layer."""

    method: Method
    averages: list[float]  # [sample] mean over layers

    @property
    def mean(self) -> float:
        return statistics.mean(self.averages)


@dataclass(frozen=True)
class Trial:
    """A method whose option `strength` is varied, and the samples that it is tried on."""

    model: LLaVA
    batches: Sequence[Batch]
    method: Method

    def measure(self, value: float) -> Reached:
        """The method with this value on all samples."""
        option: dict[str, Any] = {self.method.strength: value}
        changed = replace(self.method, **option)
        return Reached(changed, average_of_samples(self.model, self.batches, changed))

    def approach(self, low: float, high: float, average: float) -> list[Reached]:
        """All that bisection tries to come near to an average, the ends first. Between whole
        numbers it tries whole numbers."""
        whole = isinstance(low, int) and isinstance(high, int)
        tried = [self.measure(low), self.measure(high)]
        rising = tried[0].mean <= tried[1].mean
        for _ in range(16):
            middle = (low + high) // 2 if whole else (low + high) / 2
            if middle in (low, high):
                break
            tried.append(self.measure(middle))
            if (tried[-1].mean < average) == rising:
                low = middle
            else:
                high = middle
        return tried


def fit_average(model: LLaVA, batches: Sequence[Batch], method: Method, average: float) -> Reached:
    """The method with the value of its option `strength` whose mean over samples is nearest.

    Where the number of tokens does not depend on the image, that is what average= finds. Else the
    mean has to rise, or to fall, with the option. A number of tokens is tried from 1 to N, a
    number with a point between its bounds, at most 1 unless it has others. Raises ValueError if the
    method has no such option, or the mean cannot be reached.
    """
    patches = model.config.vision.num_patches
    if not method.adaptive:
        layers = model.config.text.num_hidden_layers
        solved = nearest_variant(method, average, layers, patches)
        return Reached(solved, average_of_samples(model, batches, solved))
    rule = next((r for name, _, r in method.options() if name == method.strength), None)
    if rule is None:
        raise ValueError(
            f"{method.label}: average={average} needs an option to vary, but no option of this "
            "method says how many tokens stay; use another method"
        )
    low, high = (
        (1, patches) if rule["amount"] else (float(rule["low"] or 0), float(rule["high"] or 1))
    )
    tried = Trial(model, batches, method).approach(low, high, average)
    means = [reached.mean for reached in tried]
    nearest = min(tried, key=lambda reached: abs(reached.mean - average))
    if not min(means) <= average <= max(means):
        raise ValueError(
            f"{method.label}: average={average} is out of reach on these samples; the nearest is "
            f"average={nearest.mean:.1f} ({method.strength}="
            f"{getattr(nearest.method, method.strength)})"
        )
    return nearest


def average_of_samples(model: LLaVA, batches: Sequence[Batch], method: Method) -> list[float]:
    """Image tokens that enter a layer, mean over layers, of each sample."""
    found: list[float] = []
    for batch in batches:
        found += entering(generate(model, batch, Plan((method,)), 1).report.image_tokens_entering)
    return found


# ---------------------------------------------------------------- samples


def samples(file: Path | None, n: int, seed: int) -> list[tuple[str, Image.Image]]:
    """Pairs of question and image: the first n of the file, or n of the demo's scenes.

    Raises ValueError for a malformed line.
    """
    if file is None:
        from weights import scenes

        return [(e.question, scene.image) for scene, e in scenes.held_out(seed, n, None)]
    lines = ((i, x) for i, x in enumerate(read_text(file).split("\n"), 1) if x.strip())
    found: list[tuple[str, Image.Image]] = []
    for i, line in itertools.islice(lines, n):
        try:
            sample = json.loads(line)
            text, name = str(sample["text"]), str(sample["image"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f'{file}, line {i}: {line[:60]!r} must be {{"image": FILE, "text": QUESTION}}; '
                "correct it"
            ) from None
        try:
            refuse_special_file(file.parent / name)
            image = open_header(file.parent / name)
            image.load()
        except Exception as error:  # decoders raise many types on damaged data
            raise ValueError(f"{file}, line {i}: {error}; correct the path") from None
        found.append((text, image))
    if not found:
        raise ValueError(f"{file} has no samples; give one JSON object a line")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.fit",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("method", help="vtw, fitprune, or a plan of one method with average=")
    add("--model", default=str(Path(__file__).parent.parent / "weights" / "demo"))
    add("--samples", type=parse_path, metavar="FILE.jsonl")
    add("--number", type=parse_positive_int, default=20, help="number of samples, default 20")
    add("--seed", type=parse_non_negative_int, default=0)
    add("--threshold", type=parse_float, help="of vtw, default 0.003")
    add("--first", type=parse_non_negative_int, help="of vtw: first layer to try, default 5")
    add("--save", type=parse_positive_int, help="of fitprune: percent of the FLOPs, default 60")
    return run_command(lambda: _run(parser.parse_args(argv)))


# option -> the method that has it, and its default
OPTIONS = {"threshold": ("vtw", 0.003), "first": ("vtw", 5), "save": ("fitprune", 60)}


def _run(args: argparse.Namespace) -> None:
    for name, (method, default) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.method != method:
            raise ValueError(f"--{name} is an option of {method}, not of {args.method}; omit it")
    if args.save > 99:
        raise ValueError(
            f"--save {args.save} must be a percentage from 1 to 99; give a smaller one"
        )
    if not args.threshold >= 0:
        raise ValueError(f"--threshold {args.threshold} must be 0 or more; give a larger one")
    budget = None if args.method in ("vtw", "fitprune") else read_plan(args.method).plan
    if budget is not None and not isinstance(budget, AveragePlan):
        raise ValueError(
            f"{args.method} must be vtw, fitprune, or a plan with average=, such as "
            "ivcprune:layer=4,average=60"
        )
    pairs = samples(args.samples, args.number, args.seed)
    model, processor = load(args.model)
    prompts = [processor.prompt(text, 1) for text, _ in pairs]
    images = [[image] for _, image in pairs]
    if args.method == "fitprune":
        table = fit(model, processor(prompts, images=images), args.save)
        print(f"fitprune:delete={'/'.join(map(str, table))}")
        return
    batches = [processor([p], images=[i]) for p, i in zip(prompts, images, strict=True)]
    if budget is not None:
        print(describe(model, fit_average(model, batches, budget.methods[0], budget.average)))
        return
    n_layers = model.config.text.num_hidden_layers
    layers = range(args.first, n_layers)
    if not layers:
        raise ValueError(
            f"--first {args.first}, but the model has {n_layers} layers; give a smaller number"
        )
    found = divergences(model, batches, layers)
    for layer, value in zip(layers, found.tolist(), strict=True):
        print(f"layer {layer:2}  {value:.6f}")
    print(f"vtw:layer={first_below(found, layers, args.threshold)}")


def describe(model: LLaVA, found: Reached) -> str:
    """The fitted plan on the first line, and below it what it lets into a layer."""
    layers, N = model.config.text.num_hidden_layers, model.config.vision.num_patches
    method, each = found.method, found.averages
    changed = [
        f"{name}={'/'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value, _ in method.options()
        if value != type(method).__dataclass_fields__[name].default
    ]
    most = most_entering(Plan((method,)), layers, N)
    cap = "" if most is None else f", never more than {most:.1f}"
    return (
        f"{method.name}:{','.join(changed)}\n"
        f"image tokens that enter a layer: mean {found.mean:.1f}, standard deviation "
        f"{statistics.pstdev(each):.1f}, from {min(each):.1f} to {max(each):.1f}{cap} "
        f"({len(each)} samples)"
    )


if __name__ == "__main__":
    sys.exit(main())
