"""Train the demo checkpoint weights/demo from scratch, on a CPU.

There are seven seeded stages. Each saves its state to RUNS/<stage>.pt and resumes from it:

1. tower: the vision tower and the projector learn to describe each patch. The target is a fixed
   code, the sum of the embeddings of the words that describe the patch.
2. reader: the decoder learns to answer from such sums, also with image tokens missing; no image is
   drawn. This stage does not need the first one.
3. joint: both are trained together, from images to answers.
4. settle: the same with more multiple choice, while the learning rate falls.
5. options: with still more of it, and attention is guided from options to letters and back.
6. finish: the same, while the learning rate falls to zero.
7. captions: the same with captions also as follow-up questions, while a rate falls to zero again.

    python -m weights.train_demo --runs DIR                      all unfinished stages
    python -m weights.train_demo --runs DIR --stage reader       one stage
    python -m weights.train_demo --runs DIR --without salience   an ablation, in its own DIR
    python -m weights.train_demo --runs DIR --export captions    writes the checkpoint here
    python -m weights.train_demo --runs DIR --export joint --to FOLDER
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, start_processes

from minillava.app.command import (
    CommandParser,
    end_program,
    parse_float,
    parse_non_negative_int,
    parse_path,
    parse_positive_int,
    run_command,
)

from .demo_accuracy import quick_accuracy, tower_figures
from .demo_data import CONFIG, Batch, Mix, make_batch, tokenizer, write_atomically
from .demo_model import (
    Demo,
    Losses,
    answer_loss,
    noisy_features,
    patch_loss,
    picture_loss,
    random_drop,
    salience_loss,
)
from .export_demo import export, write_example
from .files import explain_os_errors
from .muon import Muon

DEMO = Path(__file__).parent / "demo"


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
    decay: float = 0.3  # share of the steps, at the end, in which the rates fall linearly
    lowest: float = 0.0  # share of the rates at the end
    warmup: int = 100  # steps in which the rates rise linearly
    undropped: int = 0  # steps before image tokens are dropped
    guide: float = 1.0  # factor of the losses of the decoder's attention


SETTLE, OPTIONS = 800, 341  # steps
STAGES = {
    "tower": Stage(steps=2500, images=32, muon=0.02, adam=2e-3, mix=Mix()),
    "reader": Stage(
        steps=1100,
        images=8,
        muon=0.02,
        adam=2e-3,
        mix=Mix(choices=0),
        decay=0.0,
        undropped=300,
        guide=2.0,
    ),
    "joint": Stage(
        steps=900,
        images=16,
        muon=0.015,
        adam=2e-3,
        mix=Mix(choices=1),
        tower_scale=0.2,
        decay=0.0,
        after=("tower", "reader"),
    ),
    "settle": Stage(
        steps=SETTLE,
        images=16,
        muon=0.015,
        adam=2e-3,
        mix=Mix(choices=2, captions=0.6),
        tower_scale=0.3,
        decay=1.0,
        lowest=1 - SETTLE / 3000,
        after=("joint",),
    ),
    "options": Stage(
        steps=OPTIONS,
        images=16,
        muon=0.011,
        adam=1.5e-3,
        mix=Mix(choices=4, captions=0.5),
        tower_scale=0.3,
        decay=1.0,
        lowest=1 - OPTIONS / 1100,
        warmup=30,
        after=("settle",),
    ),
    "finish": Stage(
        steps=300,
        images=16,
        muon=0.011 * (1 - OPTIONS / 1100),
        adam=1.5e-3 * (1 - OPTIONS / 1100),
        mix=Mix(choices=3, captions=0.8),
        tower_scale=0.3,
        decay=1.0,
        warmup=10,
        after=("options",),
    ),
    "captions": Stage(
        steps=1200,
        images=16,
        muon=0.008,
        adam=1e-3,
        mix=Mix(choices=3, captions=0.9),
        tower_scale=0.3,
        decay=1.0,
        warmup=30,
        after=("finish",),
    ),
}


@dataclass(frozen=True)
class Run:
    """What one process trains."""

    name: str
    runs: Path
    seed: int
    losses: Losses
    save_every: float  # seconds
    measure_every: float = 600.0
    workers: int = 1
    rank: int = 0
    address: str = ""
    steps: int = 0  # 0: those of the stage

    @property
    def state(self) -> Path:
        """The file of the last saved state."""
        return self.runs / f"{self.name}.pt"

    @property
    def stage(self) -> Stage:
        stage = STAGES[self.name]
        return replace(stage, steps=self.steps) if self.steps else stage


class Steps:
    """One process's share of a stage's batches, from step `first` on."""

    def __init__(self, run: Run, first: int) -> None:
        self.images, self.draw = run.stage.images // run.workers, run.name != "reader"
        self.mix = run.stage.mix
        self.seed = [[*STAGES].index(run.name), run.seed, run.rank, run.workers]
        self.numbers = range(first, run.stage.steps)

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
    """Learning rate as a share of the full one: a linear rise, constant, a linear fall."""
    falling = stage.steps * stage.decay
    down = (stage.steps - step) / falling if falling else 1.0
    down = stage.lowest + (1 - stage.lowest) * down
    return min(1.0, (step + 1) / stage.warmup, down)


# Running a stage.


def start_stage(run: Run) -> None:
    """Run a stage in single-threaded processes, which divide each step's images. An error of one
    ends all of them and is raised here."""
    with explain_os_errors(run.runs):
        run.runs.mkdir(parents=True, exist_ok=True)
    if not run.state.exists():
        for earlier in run.stage.after:
            find_earlier_stage(run.runs, earlier)
    if run.workers == 1:
        run_stage(run)
        return
    with socket.socket() as probe:  # any free port: after a kill the previous one may be taken
        probe.bind(("127.0.0.1", 0))
        run = replace(run, address=f"tcp://127.0.0.1:{probe.getsockname()[1]}")
    errors: SimpleQueue[Exception] = get_context("spawn").SimpleQueue()
    started = start_processes(run_rank, (run, errors), run.workers, join=False, daemon=True)
    try:
        while not started.join():
            pass
    except ProcessException as error:
        if not errors.empty():
            raise errors.get() from error
        raise ValueError(f"{error}; the same command continues from the last state") from None
    finally:
        for process in started.processes:
            process.kill()


def run_rank(rank: int, run: Run, errors: SimpleQueue[Exception]) -> None:
    """Run a stage as one of several processes. The first error is the cause of the others'."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        run_stage(replace(run, rank=rank))
    except Exception as error:
        errors.put(error)
        raise
    if dist.is_initialized():  # not after a stage that was finished before
        dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, which may have been killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass
class Training:
    """A stage in progress: everything that is saved, and the rates that its schedule scales."""

    model: Demo
    average: dict[str, Tensor]  # running average of the parameters, which is what is exported
    optimizers: list[torch.optim.Optimizer]
    rates: list[list[float]]  # full learning rate of each parameter group of each optimizer
    step: int = 0
    seconds: float = 0.0


def resume(run: Run) -> Training:
    """Load a stage's last saved state, or start it from the weights of the stages before it."""
    stage = run.stage
    model = Demo(run.seed)
    optimizers = make_optimizers(model, stage)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if not run.state.exists():
        for earlier in stage.after:
            load_earlier_stage(model, run.runs, earlier)
        average = {key: p.detach().clone() for key, p in model.named_parameters()}
        return Training(model, average, optimizers, rates)
    saved = torch.load(run.state, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Training(model, saved["average"], optimizers, rates, saved["step"], saved["seconds"])


def run_stage(run: Run) -> None:
    """Train a stage from its last saved state to its end, as one of `workers` processes."""
    torch.set_num_threads(1)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # applies to CPUs too
    stage, training = run.stage, resume(run)
    if training.step >= stage.steps:
        return
    if run.workers > 1:
        dist.init_process_group(
            "gloo", init_method=run.address, rank=run.rank, world_size=run.workers
        )
    if run.rank == 0:
        log(run, f"from step {training.step}, seed {run.seed}, {run.workers} processes, {stage}")
        log(run, f"{run.losses}")
    began, last_saved = time.monotonic() - training.seconds, time.monotonic()
    last_measured = last_saved
    figures: dict[str, float] = {}
    batches = Steps(run, training.step)
    for i in range(len(batches)):
        batch = batches[i]
        noise_seed = run.seed * 1_000_003 + training.step * run.workers + run.rank
        found = train_step(run, training, batch, noise_seed)
        if run.rank:
            continue
        update_average(training)
        for key, value in found.items():
            figures[key] = 0.95 * figures.get(key, value) + 0.05 * value
        step, training.seconds = training.step, time.monotonic() - began
        if step % 25 == 0:
            text = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
            log(run, f"step {step} {training.seconds:.0f} s {text}")
        if time.monotonic() - last_saved > run.save_every or step == stage.steps:
            save(run, training)
            last_saved = time.monotonic()
        if time.monotonic() - last_measured > run.measure_every or step == stage.steps:
            log_accuracy(run, training)
            last_measured = time.monotonic()


def train_step(run: Run, training: Training, batch: Batch, noise_seed: int) -> dict[str, float]:
    """One optimizer step on a batch, with the gradients of all processes; figures for the log."""
    model = training.model
    generator = torch.Generator().manual_seed(noise_seed)
    scale = rate(run.stage, training.step)
    for optimizer, rates in zip(training.optimizers, training.rates, strict=True):
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * scale
    dropping = training.step >= run.stage.undropped
    with torch.autocast("cpu", torch.bfloat16):
        loss, figures = stage_loss(run, model, batch, generator, dropping)
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
    keep = min(0.998, training.step / (training.step + 50) * 0.99)
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
    run: Run, model: Demo, batch: Batch, generator: torch.Generator, dropping: bool
) -> tuple[Tensor, dict[str, float]]:
    """A stage's loss on a batch, and figures for the log."""
    losses = run.losses
    total = torch.zeros(())
    figures: dict[str, float] = {}
    if run.name == "reader":
        image = noisy_features(model, batch.codes, generator)
    else:
        assert batch.pixels is not None
        state, seen = model.encode_images(batch.pixels)
        scale = 1.0 if run.name == "tower" else losses.patches
        patches, tower = patch_loss(model, state, batch)
        looked = salience_loss(seen, batch.salience)
        total = scale * (patches + losses.picture * picture_loss(model, state, batch))
        total = total + losses.class_attention * looked
        figures = {"patches": float(patches.detach()), "class": float(looked.detach())}
        if run.name == "tower":
            return total, {**figures, **tower}
        figures["digit"] = tower.get("digit", 0.0)
        image = model.projector(state[:, 1:])
    drop = random_drop(batch, losses.drop, generator) if dropping and losses.drop else None
    answers, asked, salience, options = answer_loss(model, image, batch, drop)
    figures |= {
        "loss": float(answers.detach()),
        "asked": float(asked.detach()),
        "salience": float(salience.detach()),
        "options": float(options.detach()),
    }
    guided = losses.asked * asked + losses.salience * salience + losses.options * options
    return total + losses.answers * answers + run.stage.guide * guided, figures


def find_earlier_stage(runs: Path, earlier: str) -> Path:
    """The state of an earlier stage (ValueError if it is not there)."""
    path = runs / f"{earlier}.pt"
    if not path.exists():
        raise ValueError(f"{path} is not there; train its stage first: --stage {earlier}")
    return path


def load_earlier_stage(model: Demo, runs: Path, earlier: str) -> None:
    """Load the averaged weights of an earlier stage, but only the parts that it trained."""
    saved = torch.load(find_earlier_stage(runs, earlier), weights_only=True)["average"]
    parts = {"tower": ("vision", "projector", "heads"), "reader": ("llama",)}
    wanted = parts.get(earlier, ("vision", "projector", "heads", "llama"))
    state = {key: value for key, value in saved.items() if key.startswith(wanted)}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra, extra
    assert all(key == "codes" or not key.startswith(wanted) for key in missing), missing


def save(run: Run, training: Training) -> None:
    """Save a stage's state, from where `resume` loads it."""
    state = {
        "model": training.model.state_dict(),
        "average": training.average,
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
        "step": training.step,
        "seconds": training.seconds,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(run.state, buffer.getvalue())


def log(run: Run, text: str) -> None:
    """Print a line with the time, and append it to the stage's log."""
    line = f"{time.strftime('%H:%M:%S')} {run.name}: {text}"
    print(line, flush=True)
    with explain_os_errors(run.runs), (run.runs / f"{run.name}.log").open("a") as file:
        file.write(line + "\n")


@torch.no_grad()
def log_accuracy(run: Run, training: Training) -> None:
    """Log the averaged weights' accuracy on a small held-out set, under several plans."""
    model = training.model
    current = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.load_state_dict({**training.average, "codes": model.codes})
    with torch.autocast("cpu", torch.bfloat16):
        if run.name == "tower":
            lines = [tower_figures(model)]
        else:
            lines = quick_accuracy(model, 80, draw=run.name != "reader")
    for line in lines:
        log(run, f"held out at {training.step}: {line}")
    model.load_state_dict({**current, "codes": model.codes})


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m weights.train_demo",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--runs", type=parse_path, required=True, help="folder of the states and logs"
    )
    parser.add_argument("--stage", choices=STAGES, help="train only this stage")
    parser.add_argument("--seed", type=parse_non_negative_int, default=1, help="of the whole run")
    parser.add_argument("--workers", type=parse_positive_int, default=2, help="processes")
    parser.add_argument("--steps", type=parse_non_negative_int, default=0, help="another length")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="LOSS", help="losses left out (ablation)"
    )
    parser.add_argument("--save-every", type=parse_float, default=100.0, metavar="SECONDS")
    parser.add_argument("--measure-every", type=parse_float, default=600.0, metavar="SECONDS")
    parser.add_argument(
        "--export",
        choices=STAGES,
        help="write a checkpoint from this stage (tower, reader: with both)",
    )
    parser.add_argument(
        "--to", type=parse_path, default=DEMO, help="its folder; default: weights/demo"
    )
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.export:
        write_demo(args.runs, args.export, args.to, args.seed)
        return
    losses = Losses().without(args.without)
    for name in [args.stage] if args.stage else STAGES:
        start_stage(
            Run(
                name,
                args.runs,
                args.seed,
                losses,
                args.save_every,
                args.measure_every,
                args.workers,
                steps=args.steps,
            )
        )


def write_demo(runs: Path, stage: str, folder: Path, seed: int) -> None:
    """Write a checkpoint from a stage's averaged weights."""
    model = Demo(seed)
    for earlier in STAGES["joint"].after if stage in STAGES["joint"].after else (stage,):
        load_earlier_stage(model, runs, earlier)
    parts = ("vision.", "projector.", "llama.")
    weights = {k: p.detach() for k, p in model.named_parameters() if k.startswith(parts)}
    with explain_os_errors(folder):
        export(folder, CONFIG, weights, tokenizer().serialized_model_proto())
        write_example(folder)


if __name__ == "__main__":
    end_program(main())
