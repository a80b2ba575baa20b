"""What two methods learn from samples before they can run: VTW's layer, FitPrune's table.

    python -m eval.fit vtw [--threshold 0.003]          the layer from which images are withdrawn
    python -m eval.fit fitprune --save 60               a delete= list that saves 60 % of the FLOPs

Without --samples they are fitted to the demo checkpoint on its own scenes; with --samples FILE, one
JSON object a line with `image` (a path beside the file) and `text` (the question), to --model.

VTW (lzhxmu/VTW 34a4199, --findk): over the samples the mean divergence KL(p without the image from
layer K on | p with it) of the first answered token; the layer is the first, from 5 on, at or below
the threshold: 0.003 for LLaVA-1.5-7B, 0.0005 for 13B.

FitPrune (ywh187/FitPrune 2b70a5d, statistical_analysis.py): with a(i, j) the largest weight over
heads, each layer may lose the image tokens that are among the weakest both by image rows and by
text rows, the weakest being as many as can go with either sum still at 1 - alpha of what it is
in the unpruned model. It stops where the FLOPs of the image tokens are low enough; alpha is
bisected to 0.01, and what the last alpha deleted behind each layer, averaged and rounded down, is
the table. The released script leaves it open what happens where no limit is met; here one token
stays. All samples run as one batch, so that the layers of all can be counted together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from minillava import Batch, load, parse_plan
from minillava.config import TextConfig
from minillava.generate import generate, prompts_of
from minillava.llava import LLaVA
from minillava.processor import Processor
from minillava.pruning import Context, Keep, Method, Plan
from minillava.pruning.base import Stage

# ---------------------------------------------------------------- VTW


def divergences(model: LLaVA, batches: Sequence[Batch], layers: Sequence[int]) -> Tensor:
    """KL(withdrawn | full) of the first new token, mean over samples: one for each layer."""

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
    found = [layer for layer, v in zip(layers, values.tolist(), strict=True) if v <= threshold]
    if not found:
        raise ValueError(
            f"threshold={threshold} is below all of layers {layers[0]} to {layers[-1]}; the "
            f"smallest divergence is {float(values.min()):.6f}"
        )
    return found[0]


# ---------------------------------------------------------------- FitPrune


@dataclass
class Record:
    """What one pass over all samples finds. Sums are [layer][sample]: by image, by text."""

    config: TextConfig
    n_samples: int
    alpha: float | None = None  # None: nothing is deleted, sums are recorded
    target: float = 0.0  # FLOPs a sample
    limits: list[list[tuple[float, float]]] = field(default_factory=list)
    sums: list[list[tuple[float, float]]] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)  # [layer], all samples
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

    def begin(self, layer: int) -> None:
        """Before a layer's deletions: is what is left to compute few enough FLOPs?"""
        later = self.config.num_hidden_layers - 1 - layer
        forecast = 0.0
        for n in self.entering:
            self.flops += self.attention_flops(n)
            forecast += self.other_flops(n) + later * self.all_flops(n)
        if self.alpha is not None and (self.flops + forecast) / self.n_samples <= self.target:
            self.reached = True

    def delete(self, layer: int, sample: int, by_image: Tensor, by_text: Tensor) -> Tensor:
        """Which image tokens go (n,) bool."""
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
    """The smallest of (n,) that can go with a sum of `least` staying: (n,) bool."""
    order = weights.sort(stable=True).indices
    left = weights.sum() - weights[order].cumsum(0)  # after 1, 2, ... are gone
    allowed = int((left >= least).long().cumprod(0).sum())
    gone = torch.zeros(len(weights), dtype=torch.bool)
    gone[order[: min(allowed, len(weights) - 1)].cpu()] = True
    return gone


@dataclass(frozen=True)
class Fitting(Method):
    """Drops behind every layer but the last what its record says; samples come in their order."""

    record: Record

    name: ClassVar[str] = "fitting"

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        return tuple(
            ("decoder", layer + 1) for layer in range(self.record.config.num_hidden_layers - 1)
        )

    def choose(self, c: Context) -> Keep:
        d, layer, record = c.decoder, c.part, self.record
        assert d is not None
        sample = len(record.sums[layer])
        if sample == 0:
            record.begin(layer)
        by_image, by_text = (d.strongest(rows)[d.rows] for rows in (d.rows, d.text_rows))
        gone = record.delete(layer, sample, by_image, by_text)
        return Keep((~gone).nonzero()[:, 0].to(d.rows.device))


def one_pass(model: LLaVA, batch: Batch, record: Record) -> Record:
    L, N = model.config.text.num_hidden_layers, model.config.vision.num_patches
    record.sums, record.deleted = [[] for _ in range(L - 1)], [0] * L
    record.entering = [N] * record.n_samples
    plan, prompts = Plan((Fitting(record),)), prompts_of(model, batch)
    assert batch.pixels is not None
    with torch.inference_mode():
        model.prefill(prompts, model.encode(batch.pixels, plan), plan)
    record.begin(L - 1)
    return record


def fit(model: LLaVA, batch: Batch, percent: int) -> tuple[int, ...]:
    """Tokens to delete behind each layer, for so many percent fewer FLOPs of the image tokens."""
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


# ---------------------------------------------------------------- samples


def samples(
    processor: Processor, file: Path | None, n: int, seed: int
) -> Iterator[tuple[str, Image.Image]]:
    """Prompts and their pictures: the file's first n, or n of the demo's scenes."""
    if file is None:
        from weights import scenes

        pairs = [(e.question, scene.image) for scene, e in scenes.held_out(seed, n, None)]
    else:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()][:n]
        pairs = [(x["text"], Image.open(file.parent / x["image"])) for x in lines]
    return ((processor.prompt(text, 1), image) for text, image in pairs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("method", choices=["vtw", "fitprune"])
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "weights" / "demo"))
    parser.add_argument("--samples", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--number", type=int, default=20, help="samples, default 20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.003, help="vtw, default 0.003")
    parser.add_argument("--first", type=int, default=5, help="vtw: first layer tried, default 5")
    parser.add_argument("--save", type=int, default=60, help="fitprune: percent, default 60")
    args = parser.parse_args(argv)
    try:
        model, processor = load(args.model)
        pairs = list(samples(processor, args.samples, args.number, args.seed))
        if args.method == "vtw":
            layers = range(args.first, model.config.text.num_hidden_layers)
            batches = [processor([prompt], images=[[image]]) for prompt, image in pairs]
            found = divergences(model, batches, layers)
            for layer, value in zip(layers, found.tolist(), strict=True):
                print(f"layer {layer:2}  {value:.6f}")
            print(f"vtw:layer={first_below(found, layers, args.threshold)}")
        else:
            prompts, images = zip(*pairs, strict=True)
            batch = processor(list(prompts), images=[[image] for image in images])
            table = fit(model, batch, args.save)
            print(f"fitprune:delete={'/'.join(map(str, table))}")
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
