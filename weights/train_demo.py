"""Train the demo checkpoint weights/demo from scratch, on a CPU.

There are four seeded stages. Each saves its state to weights/runs/<stage>.pt every few minutes and
resumes from it:

1. tower: the vision tower and the projector learn to describe each patch. The target is a fixed
   code: the sum of the embeddings of the words that describe the patch.
2. reader: the decoder learns to answer from such sums; no image is drawn. This stage does not need
   stage 1 and can run at the same time.
3. joint: both are trained together, from images to answers.
4. finish: the same, while the learning rate falls to zero. Then the checkpoint is written.

    python -m weights.train_demo                     all unfinished stages, then the export
    python -m weights.train_demo --stage reader      one stage
    python -m weights.train_demo --export joint      write weights/demo from a stage's last state
    python -m weights.train_demo --evaluate 7        accuracy on new held-out scenes, per kind
"""

from __future__ import annotations

import argparse
import io
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from minillava.app.command import (
    CommandParser,
    end_program,
    parse_float,
    parse_non_negative_int,
    parse_positive_int,
    run_command,
)

from .demo_data import CONFIG, RUNS, Batch, Mix, make_batch, tokenizer, write_atomically
from .demo_model import Demo, Muon, answer_loss, noisy_features, patch_loss
from .export_demo import Shown, export, measure, summary, write_example

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """Length, learning rates and data of a stage."""

    steps: int
    images: int  # per step
    muon: float  # learning rate of the matrices inside blocks
    adam: float  # of everything else
    mix: Mix  # of questions about each image
    tower_scale: float = 1.0  # learning rates of the vision tower relative to the decoder's
    after: tuple[str, ...] = ()  # stages whose weights this one starts from
    decay: float = 0.3  # share of the steps, at the end, in which the rates fall linearly to 0
    warmup: int = 100  # steps in which the rates rise linearly


STAGES = {
    "tower": Stage(steps=2000, images=64, muon=0.02, adam=2e-3, mix=Mix()),
    "reader": Stage(steps=680, images=16, muon=0.02, adam=2e-3, mix=Mix(choices=1), decay=0.0),
    "joint": Stage(
        steps=1500,
        images=16,
        muon=0.015,
        adam=2e-3,
        mix=Mix(),
        tower_scale=0.2,
        decay=0.0,
        after=("tower", "reader"),
    ),
    "finish": Stage(
        steps=2600,
        images=16,
        muon=0.015,
        adam=2e-3,
        mix=Mix(choices=3, captions=0.4),
        tower_scale=0.3,
        decay=1.0,
        after=("joint",),
    ),
}


class Steps(Dataset[Batch]):
    """One process's share of a stage's batches, from step `first` on."""

    def __init__(self, stage: str, seed: int, first: int, rank: int, workers: int) -> None:
        self.images, self.draw = STAGES[stage].images // workers, stage != "reader"
        self.mix = STAGES[stage].mix
        self.seed = [[*STAGES].index(stage), seed, rank, workers]
        self.numbers = range(first, STAGES[stage].steps)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Batch:
        rng = np.random.default_rng([*self.seed, self.numbers[i]])
        return make_batch(rng, self.images, self.draw, "train", self.mix)


def make_optimizers(model: Demo, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the other parameters.

    Embeddings get a low learning rate: a word in a question finds the patches that show it because
    both start as the same vector.
    """
    matrices: dict[float, list[nn.Parameter]] = defaultdict(list)
    others: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        scale = stage.tower_scale if name.startswith(("vision", "projector", "heads")) else 1.0
        if name == "llama.embed_tokens.weight":
            scale = 0.03
        (matrices if "blocks" in name and p.ndim == 2 else others)[scale].append(p)
    muon = Muon([{"params": ps, "lr": stage.muon * scale} for scale, ps in matrices.items()])
    adam = torch.optim.AdamW(
        [{"params": ps, "lr": stage.adam * scale} for scale, ps in others.items()],
        betas=(0.9, 0.97),
        weight_decay=0.0,
    )
    return [muon, adam]


def rate(stage: Stage, step: int) -> float:
    """Learning rate as a share of the full one: a linear rise, constant, a linear fall to 0."""
    falling = stage.steps * stage.decay
    down = (stage.steps - step) / falling if falling else 1.0
    return min(1.0, (step + 1) / stage.warmup, down)


# Running a stage.


def start_stage(name: str, seed: int, workers: int, save_every: float) -> None:
    """Run a stage in `workers` single-threaded processes, which divide each step's images."""
    tokenizer()  # trained and stored before other processes look for it
    with socket.socket() as probe:  # any free port: after a kill the previous one may be taken
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    others = [
        get_context("spawn").Process(
            target=run_stage, args=(name, seed, rank, workers, save_every, address)
        )
        for rank in range(1, workers)
    ]
    for process in others:
        process.start()
    run_stage(name, seed, 0, workers, save_every, address)
    for process in others:
        process.join()
    if others:
        dist.destroy_process_group()


@dataclass
class Training:
    """A stage in progress: everything that is saved, and the rates that its schedule scales."""

    model: Demo
    average: dict[str, Tensor]  # running average of the parameters, which is what is exported
    optimizers: list[torch.optim.Optimizer]
    rates: list[list[float]]  # full learning rate of each parameter group of each optimizer
    step: int = 0
    seconds: float = 0.0


def resume(name: str, seed: int) -> Training:
    """Load a stage's last saved state, or start it from the weights of the stages before it."""
    stage, path = STAGES[name], RUNS / f"{name}.pt"
    model = Demo(seed)
    optimizers = make_optimizers(model, stage)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if not path.exists():
        for earlier in stage.after:
            load_earlier_stage(model, earlier)
        average = {key: p.detach().clone() for key, p in model.named_parameters()}
        return Training(model, average, optimizers, rates)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Training(model, saved["average"], optimizers, rates, saved["step"], saved["seconds"])


def run_stage(
    name: str, seed: int, rank: int, workers: int, save_every: float, address: str
) -> None:
    """Train a stage from its last saved state to its end, as process `rank` of `workers`."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=workers)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # applies to CPUs too
    stage, training = STAGES[name], resume(name, seed)
    if training.step >= stage.steps:
        return
    if rank == 0:
        log(name, f"from step {training.step}, seed {seed}, {workers} processes, {stage}")
    began, last_saved = time.monotonic() - training.seconds, time.monotonic()
    figures: dict[str, float] = {}
    loader = DataLoader(
        Steps(name, seed, training.step, rank, workers),
        batch_size=None,
        num_workers=1,
        prefetch_factor=6,
        multiprocessing_context="spawn",
    )
    for batch in loader:
        noise_seed = seed * 1_000_003 + training.step * workers + rank
        found = train_step(name, training, batch, noise_seed)
        if rank:
            continue
        update_average(training)
        for key, value in found.items():
            figures[key] = 0.95 * figures.get(key, value) + 0.05 * value
        step, training.seconds = training.step, time.monotonic() - began
        if step % 50 == 0:
            text = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
            log(name, f"step {step} {training.seconds:.0f} s {text}")
        if time.monotonic() - last_saved > save_every or step == stage.steps:
            save(name, training)
            last_saved = time.monotonic()
            log_accuracy(name, training)


def train_step(name: str, training: Training, batch: Batch, noise_seed: int) -> dict[str, float]:
    """One optimizer step on a batch, with the gradients of all processes; figures for the log."""
    model = training.model
    generator = torch.Generator().manual_seed(noise_seed)
    scale = rate(STAGES[name], training.step)
    for optimizer, rates in zip(training.optimizers, training.rates, strict=True):
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * scale
    with torch.autocast("cpu", torch.bfloat16):
        loss, figures = stage_loss(name, model, batch, generator)
    loss.backward()
    if dist.is_initialized():
        share_gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in training.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    training.step += 1
    return figures


@torch.no_grad()
def update_average(training: Training) -> None:
    """Average the parameters over about the last 500 steps, fewer at the beginning."""
    keep = min(0.998, training.step / (training.step + 50))
    for key, p in training.model.named_parameters():
        training.average[key].lerp_(p, 1 - keep)


def share_gradients(model: Demo) -> None:
    """Replace the gradients by their mean over all processes."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def stage_loss(
    name: str, model: Demo, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """A stage's loss on a batch, and figures for the log."""
    if name == "reader":
        answers, missed = answer_loss(model, noisy_features(model, batch.codes, generator), batch)
        figures = {"loss": float(answers.detach()), "missed": float(missed.detach())}
        return answers + 0.2 * missed, figures
    assert batch.pixels is not None
    state = model.encode_images(batch.pixels)
    loss, figures = patch_loss(model, state, batch.codes)
    if name == "tower":
        return loss, {"loss": float(loss.detach()), **figures}
    answers, missed = answer_loss(model, model.projector(state[:, 1:]), batch)
    figures = {
        "loss": float(answers.detach()),
        "missed": float(missed.detach()),
        "digit": figures.get("digit", 0.0),
    }
    return answers + 0.1 * loss + 0.05 * missed, figures


def load_earlier_stage(model: Demo, earlier: str) -> None:
    """Load the averaged weights of an earlier stage, but only the parts that it trained."""
    saved = torch.load(RUNS / f"{earlier}.pt", weights_only=True)["average"]
    parts = {"tower": ("vision", "projector", "heads"), "reader": ("llama",)}
    wanted = parts.get(earlier, ("vision", "projector", "heads", "llama"))
    state = {key: value for key, value in saved.items() if key.startswith(wanted)}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra, extra
    assert all(key == "codes" or not key.startswith(wanted) for key in missing), missing


def save(name: str, training: Training) -> None:
    """Save a stage's state to runs/, from where `resume` loads it."""
    state = {
        "model": training.model.state_dict(),
        "average": training.average,
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
        "step": training.step,
        "seconds": training.seconds,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(RUNS / f"{name}.pt", buffer.getvalue())


def log(name: str, text: str) -> None:
    """Print a line with the time, and append it to the stage's log in runs/."""
    line = f"{time.strftime('%H:%M:%S')} {name}: {text}"
    print(line, flush=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{name}.log").open("a") as file:
        file.write(line + "\n")


# Accuracy.


@torch.no_grad()
def log_accuracy(name: str, training: Training) -> None:
    """Log the averaged weights' accuracy on a small held-out set, for each kind of question."""
    model = training.model
    current = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.load_state_dict({**training.average, "codes": model.codes})
    if name == "tower":
        batch = make_batch(np.random.default_rng(99), 200, True, "held-out", Mix())
        assert batch.pixels is not None
        _, figures = patch_loss(model, model.encode_images(batch.pixels), batch.codes)
    else:
        batch = make_batch(np.random.default_rng(99), 60, name != "reader", "held-out", Mix())
        figures = accuracy(model, batch)
    text = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
    log(name, f"held out at {training.step}: {text}")
    model.load_state_dict({**current, "codes": model.codes})


@torch.no_grad()
def accuracy(model: Demo, batch: Batch) -> dict[str, float]:
    """Share of exactly right answers for each kind of question.

    An answer is right if each of its tokens is the most likely one: then greedy decoding gives it.
    """
    if batch.pixels is None:
        image = batch.codes @ model.codes
    else:
        image = model.projector(model.encode_images(batch.pixels)[:, 1:])
    best = model.llama.logits(model.decode(image, batch)[0]).argmax(-1)  # (P, T)
    wrong = (best != batch.targets) & (batch.targets >= 0)
    right: dict[str, list[bool]] = defaultdict(list)
    for p, kinds in enumerate(batch.kinds):
        for i, kind in enumerate(kinds, start=1):
            right[kind].append(not bool(wrong[p, batch.segments[p] == i].any()))
    return summary(right)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m weights.train_demo",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=STAGES, help="train only this stage")
    parser.add_argument("--seed", type=parse_non_negative_int, default=1, help="of the whole run")
    parser.add_argument(
        "--workers", type=parse_positive_int, default=2, help="single-threaded processes"
    )
    parser.add_argument(
        "--save-every",
        type=parse_float,
        default=120.0,
        metavar="SECONDS",
        help="between two saved states",
    )
    parser.add_argument("--export", choices=STAGES, help="write weights/demo from this stage")
    parser.add_argument(
        "--evaluate",
        type=parse_non_negative_int,
        metavar="SEED",
        help="measure weights/demo on scenes of this seed",
    )
    parser.add_argument(
        "--n", type=parse_positive_int, default=1800, help="number of questions for --evaluate"
    )
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.evaluate is not None:
        report(args.evaluate, args.n)
        return
    if not args.export:
        for name in [args.stage] if args.stage else STAGES:
            start_stage(name, args.seed, args.workers, args.save_every)
    if not args.stage:
        write_demo(args.export or "finish", args.seed)


def write_demo(stage: str, seed: int) -> None:
    """Write weights/demo from a stage's averaged weights."""
    model = Demo(seed)
    load_earlier_stage(model, stage)
    parts = ("vision.", "projector.", "llama.")
    weights = {k: p.detach() for k, p in model.named_parameters() if k.startswith(parts)}
    export(HERE / "demo", CONFIG, weights, tokenizer().serialized_model_proto())
    write_example(HERE / "demo")


def report(seed: int, n: int) -> None:
    """Print the accuracy of weights/demo in per cent per kind, with the image and without."""
    columns = {shown: measure(HERE / "demo", seed, n, shown) for shown in get_args(Shown)}
    print(f"seed {seed}, {n} questions, the same number of each kind; 'all' leaves out captions")
    print("".join(f"{title:>12}" for title in ("kind", *columns)))
    for kind in columns["image"]:
        print(f"{kind:>12}" + "".join(f"{100 * f[kind]:12.1f}" for f in columns.values()))


if __name__ == "__main__":
    end_program(main())
