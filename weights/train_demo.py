"""Train the demo checkpoint weights/demo from nothing, on a CPU.

Four stages; each is seeded, writes weights/runs/<stage>.pt every few minutes and goes on from there
when it is started again:

1. tower: the vision tower and the projector learn to say, patch by patch, what is there, against a
   fixed code: a patch should become the sum of the embeddings of the words for it.
2. reader: the decoder learns to answer from exactly such sums, without any picture being drawn.
   It needs nothing from stage 1 and can run beside it.
3. joint: both together, from pictures to answers.
4. finish: the same with the learning rate going to zero; then the checkpoint is written.

    python -m weights.train_demo                     every stage that is not finished, then export
    python -m weights.train_demo --stage reader      one stage
    python -m weights.train_demo --export joint      write weights/demo from a stage's last state
    python -m weights.train_demo --evaluate 7        accuracy on fresh held-out scenes, per kind
"""

from __future__ import annotations

import argparse
import io
import socket
import sys
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
    parse_float,
    parse_non_negative_int,
    parse_positive_int,
    run_command,
)

from .demo_data import CONFIG, RUNS, Batch, Mix, make_batch, tokenizer, write_whole
from .demo_model import Demo, Muon, answer_loss, patch_loss, symbols
from .export_demo import Shown, export, measure, summary, write_example

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """What a stage trains and for how long."""

    steps: int
    pictures: int  # per step
    muon: float  # learning rate of the matrices inside blocks
    adam: float  # of everything else
    mix: Mix  # of questions behind each picture
    tower_scale: float = 1.0  # the tower's learning rates relative to the decoder's
    after: tuple[str, ...] = ()  # stages whose weights it starts from
    decay: float = 0.3  # share of the steps in which the rates fall linearly to zero
    warmup: int = 100


STAGES = {
    "tower": Stage(steps=2000, pictures=64, muon=0.02, adam=2e-3, mix=Mix()),
    "reader": Stage(steps=680, pictures=16, muon=0.02, adam=2e-3, mix=Mix(choices=1), decay=0.0),
    "joint": Stage(
        steps=1500,
        pictures=16,
        muon=0.015,
        adam=2e-3,
        mix=Mix(),
        tower_scale=0.2,
        decay=0.0,
        after=("tower", "reader"),
    ),
    "finish": Stage(
        steps=2600,
        pictures=16,
        muon=0.015,
        adam=2e-3,
        mix=Mix(choices=3, captions=0.4),
        tower_scale=0.3,
        decay=1.0,
        after=("joint",),
    ),
}


class Steps(Dataset[Batch]):
    """A worker's share of the batches of a stage from step `first` on."""

    def __init__(self, stage: str, seed: int, first: int, rank: int, workers: int) -> None:
        self.pictures, self.draw = STAGES[stage].pictures // workers, stage != "reader"
        self.mix = STAGES[stage].mix
        self.seed = [[*STAGES].index(stage), seed, rank, workers]
        self.numbers = range(first, STAGES[stage].steps)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Batch:
        rng = np.random.default_rng([*self.seed, self.numbers[i]])
        return make_batch(rng, self.pictures, self.draw, "train", self.mix)


def optimizers(model: Demo, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, Adam for the rest.

    Embeddings move slowly: a word in the question finds the patches that show it because both are
    the same vector to begin with.
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
    """Learning rate relative to its top: warm-up, flat, linear fall to zero."""
    falling = stage.steps * stage.decay
    down = (stage.steps - step) / falling if falling else 1.0
    return min(1.0, (step + 1) / stage.warmup, down)


# Running a stage.


def start(name: str, seed: int, workers: int, save_every: float) -> None:
    """Run a stage in `workers` processes of one thread each, which share every step's pictures."""
    tokenizer()  # written before anyone else looks for it
    with socket.socket() as probe:  # any free port; after a kill the last one may still be taken
        probe.bind(("127.0.0.1", 0))
        meet = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    others = [
        get_context("spawn").Process(target=run, args=(name, seed, rank, workers, save_every, meet))
        for rank in range(1, workers)
    ]
    for process in others:
        process.start()
    run(name, seed, 0, workers, save_every, meet)
    for process in others:
        process.join()
    if others:
        dist.destroy_process_group()


def run(name: str, seed: int, rank: int, workers: int, save_every: float, meet: str) -> None:
    """Train a stage from its last saved state to its end, as process `rank` of `workers`."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # holds for CPUs too
    stage, path = STAGES[name], RUNS / f"{name}.pt"
    model = Demo(seed)
    step, seconds = 0, 0.0
    opts = optimizers(model, stage)
    tops = [[group["lr"] for group in optimizer.param_groups] for optimizer in opts]
    average = {key: p.detach().clone() for key, p in model.named_parameters()}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        step, seconds = saved["step"], saved["seconds"]
        for optimizer, state in zip(opts, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    else:
        for earlier in stage.after:
            take(model, earlier)
        average = {key: p.detach().clone() for key, p in model.named_parameters()}
    if step >= stage.steps:
        return
    if rank == 0:
        log(name, f"from step {step}, seed {seed}, {workers} processes, {stage}")
    began, last_saved = time.monotonic() - seconds, time.monotonic()
    figures: dict[str, float] = {}
    loader = DataLoader(
        Steps(name, seed, step, rank, workers),
        batch_size=None,
        num_workers=1,
        prefetch_factor=6,
        multiprocessing_context="spawn",
    )
    for batch in loader:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step * workers + rank)
        for optimizer, top in zip(opts, tops, strict=True):
            for group, lr in zip(optimizer.param_groups, top, strict=True):
                group["lr"] = lr * rate(stage, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss, found = stage_loss(name, model, batch, generator)
        loss.backward()
        if workers > 1:
            share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if rank:
            continue
        keep = min(0.998, step / (step + 50))
        with torch.no_grad():
            for key, p in model.named_parameters():
                average[key].lerp_(p, 1 - keep)
        for key, value in found.items():
            figures[key] = 0.95 * figures.get(key, value) + 0.05 * value
        if step % 50 == 0:
            told = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
            log(name, f"step {step} {time.monotonic() - began:.0f} s {told}")
        if time.monotonic() - last_saved > save_every or step == stage.steps:
            save(path, model, average, opts, step, time.monotonic() - began)
            last_saved = time.monotonic()
            check(name, model, average, step)


def share_gradients(model: Demo) -> None:
    """Every process gets the mean of all gradients."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def stage_loss(
    name: str, model: Demo, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    if name == "reader":
        answers, missed = answer_loss(model, symbols(model, batch.codes, generator), batch)
        figures = {"loss": float(answers.detach()), "missed": float(missed.detach())}
        return answers + 0.2 * missed, figures
    assert batch.pixels is not None
    state = model.see(batch.pixels)
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


def take(model: Demo, earlier: str) -> None:
    """Start from an earlier stage's averaged weights: only those that it trained."""
    saved = torch.load(RUNS / f"{earlier}.pt", weights_only=True)["average"]
    parts = {"tower": ("vision", "projector", "heads"), "reader": ("llama",)}
    wanted = parts.get(earlier, ("vision", "projector", "heads", "llama"))
    state = {key: value for key, value in saved.items() if key.startswith(wanted)}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra, extra
    assert all(key == "codes" or not key.startswith(wanted) for key in missing), missing


def save(
    path: Path,
    model: Demo,
    average: dict[str, Tensor],
    opts: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer in opts],
        "step": step,
        "seconds": seconds,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def log(name: str, text: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {name}: {text}"
    print(line, flush=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{name}.log").open("a") as file:
        file.write(line + "\n")


# Accuracy.


@torch.no_grad()
def check(name: str, model: Demo, average: dict[str, Tensor], step: int) -> None:
    """Log the averaged weights' accuracy per kind on a small held-out set."""
    current = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.load_state_dict({**average, "codes": model.codes})
    if name == "tower":
        batch = make_batch(np.random.default_rng(99), 200, True, "held-out", Mix())
        assert batch.pixels is not None
        _, figures = patch_loss(model, model.see(batch.pixels), batch.codes)
    else:
        batch = make_batch(np.random.default_rng(99), 60, name != "reader", "held-out", Mix())
        figures = accuracy(model, batch)
    log(name, f"held out at {step}: " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    model.load_state_dict({**current, "codes": model.codes})


@torch.no_grad()
def accuracy(model: Demo, batch: Batch) -> dict[str, float]:
    """Share of answers whose every token is the most likely one, which is what greedy decoding
    gives."""
    if batch.pixels is None:
        image = batch.codes @ model.codes
    else:
        image = model.projector(model.see(batch.pixels)[:, 1:])
    best = model.llama.logits(model.read(image, batch)[0]).argmax(-1)  # (P, T)
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
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--seed", type=parse_non_negative_int, default=1)
    parser.add_argument(
        "--workers", type=parse_positive_int, default=2, help="processes of one thread each"
    )
    parser.add_argument("--save-every", type=parse_float, default=120.0, metavar="SECONDS")
    parser.add_argument("--export", choices=STAGES, help="write weights/demo from this stage")
    parser.add_argument(
        "--evaluate", type=parse_non_negative_int, metavar="SEED", help="measure weights/demo"
    )
    parser.add_argument(
        "--n", type=parse_positive_int, default=1800, help="questions of --evaluate"
    )
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.evaluate is not None:
        report(args.evaluate, args.n)
        return
    if not args.export:
        for name in [args.stage] if args.stage else STAGES:
            start(name, args.seed, args.workers, args.save_every)
    if not args.stage:
        write_demo(args.export or "finish", args.seed)


def write_demo(stage: str, seed: int) -> None:
    model = Demo(seed)
    take(model, stage)
    parts = ("vision.", "projector.", "llama.")
    weights = {k: p.detach() for k, p in model.named_parameters() if k.startswith(parts)}
    export(HERE / "demo", CONFIG, weights, tokenizer().serialized_model_proto())
    write_example(HERE / "demo")


def report(seed: int, n: int) -> None:
    """Accuracy of weights/demo in per cent, per kind, with the picture and without."""
    columns = {shown: measure(HERE / "demo", seed, n, shown) for shown in get_args(Shown)}
    print(f"seed {seed}, {n} questions, every kind equally often; captions are not part of all")
    print("".join(f"{title:>12}" for title in ("kind", *columns)))
    for kind in columns["picture"]:
        print(f"{kind:>12}" + "".join(f"{100 * f[kind]:12.1f}" for f in columns.values()))


if __name__ == "__main__":
    sys.exit(main())
