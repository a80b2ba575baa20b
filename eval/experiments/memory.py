"""The memory of one answer: computed from its parts, and measured in a separate process.

The resident memory of a process is more than its model's: it contains the libraries' code, which is
loaded page by page as it is first used, and the remains of earlier models. So a new process first
answers with the demo, in the same number format and under the same plans. What it holds then is
subtracted from the peak while it loads the model and answers one question.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from minillava.generate import generate
from minillava.quant.linear import weight_bytes
from minillava.report import Report

from .. import cost, predict
from ..bench import DEMO, Bench
from ..plans import TypedPlan, read_plans
from ..score import find_task, read_questions


@dataclass(frozen=True)
class Memory:
    """The memory of one prompt and its first token in bytes; None if it cannot be measured."""

    weights: int  # as they are held
    cache: int
    activations: int  # their peak
    measured: int | None  # on a CPU
    cuda: int | None

    @property
    def computed(self) -> int:
        return self.weights + self.cache + self.activations


def memory_of(bench: Bench, plan: TypedPlan, measured: int | None) -> Memory:
    """The memory of the first question under a plan. measured: from measure_peaks()."""
    model, report = bench.model, _first_token(bench, plan)
    entering = [n for (n,) in report.tokens_entering]
    config = model.config
    resolved = plan.plan.resolve(len(entering), config.vision.num_patches)
    return Memory(
        weights=weight_bytes(model),
        cache=report.cache_bytes,
        activations=cost.activation_bytes(entering, config, resolved, model.dtype.itemsize),
        measured=measured,
        cuda=report.peak_bytes,
    )


def measure_peaks(args: argparse.Namespace, plans: Sequence[str]) -> list[int] | list[None]:
    """Measure the bytes of the first question under each plan in a separate process.

    The weights are included. The results are None on a GPU, and if the system cannot reset its peak
    of memory. Raises ValueError if the process fails.
    """
    if args.device != "cpu" or not cost.can_reset_peak():
        return [None] * len(plans)
    task, protocol = find_task(args.task, args.protocol)
    read_questions(task, args.data, protocol, 1)  # refuse missing files before a process is started
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, args, list(plans)), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    send.close()
    try:
        found: list[int] | ValueError | OSError = receive.recv()
    except EOFError:
        raise ValueError(
            "the process that measures memory ended without a result; it may lack memory for "
            f"{args.model}: give a smaller --model"
        ) from None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(found, ValueError | OSError):
        raise found
    return found


def _measure(send: Connection, args: argparse.Namespace, plans: Sequence[str]) -> None:
    try:
        send.send(_peaks(args, plans))
    except (ValueError, OSError) as error:
        send.send(error)


def _peaks(args: argparse.Namespace, plans: Sequence[str]) -> list[int]:
    typed, one = read_plans(plans).values(), argparse.Namespace(**{**vars(args), "limit": 1})
    demo = {"task": "demo", "data": None, "protocol": None, "model": str(DEMO), "revision": None}
    bench = Bench.open(argparse.Namespace(**{**vars(one), **demo}))
    for plan in typed:
        with suppress(ValueError):  # a plan that needs a larger model than the demo
            _first_token(bench, plan)
    del bench
    cost.return_freed_memory()
    before, found = cost.resident_bytes(), []
    bench = Bench.open(one)
    bench.check(list(typed))  # before any plan is measured
    for plan in typed:
        cost.return_freed_memory()
        with cost.peak_memory() as peak:
            _first_token(bench, plan)
            found.append(peak() - before)
    return found


def _first_token(bench: Bench, plan: TypedPlan) -> Report:
    batch = predict.batch_of(bench.processor, [bench.items[0]], bench.run(plan))
    return generate(bench.model, batch, plan.plan, max_new_tokens=1, seed=bench.args.seed).report
