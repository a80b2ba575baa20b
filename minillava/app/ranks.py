"""The processes that torchrun has started; without torchrun there is one.

Either they share the work, and each has a model of its own (`process_group`, for eval.run), or they
share one model, and all do the same (`answer_together`, for the command line).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

PATIENCE = timedelta(days=30)  # a process that is ready waits for the slowest one, or for a person
LOST = "another process of torchrun has ended; give the same command again"
# what torch says then, in a RuntimeError
_LOST = re.compile("gloo|nccl|connection|broken pipe|socket", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes, and the rank on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def gather(self, act: Callable[[], T]) -> list[T]:
        """Call `act` in every process; return the results of all, in the order of ranks.

        If it fails in one process, all raise ValueError with the message of the first that failed,
        so that no process waits for another forever.
        """
        value, error = None, ""
        try:
            value = act()
        except (ValueError, OSError, MemoryError) as failure:
            if self.size == 1:
                raise
            error = str(failure) or type(failure).__name__
        if self.size == 1:
            return [value]  # type: ignore[list-item]
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, (value, error))
        except RuntimeError:  # the library has no type of its own for a lost connection
            raise ValueError(LOST) from None
        for _, error in outcomes:
            if error:
                raise ValueError(error)
        return [value for value, _ in outcomes]

    def run_in_first(self, act: Callable[[], T]) -> T:
        """Call `act` in the first process only; return its result in all."""
        return self.gather(lambda: act() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def device(self, name: str) -> str:
        """The device of this process: "cuda" becomes "cuda:N", a GPU for each process."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name

    def mesh(self, device: str) -> DeviceMesh | None:
        """What load() takes so that the processes share one model; None: there is one process.

        Raises ValueError for a device that they cannot share out between them.
        """
        if self.size == 1:
            return None
        if device not in ("cpu", "cuda"):
            raise ValueError(
                f"device={device!r} for {self.size} processes, but must be cuda (each takes the "
                "GPU with its own number) or cpu; choose one of them"
            )
        gpus = torch.cuda.device_count()
        if device == "cuda" and self.local >= gpus:
            raise ValueError(
                f"process {self.local} of this machine has no GPU of its own, since torch sees "
                f"{gpus}; start no more processes than GPUs (--nproc-per-node), or use device='cpu'"
            )
        return init_device_mesh(device, (self.size,))


ALONE = Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group of torchrun, and leave it at the end.

    The backend is gloo on every device, because only small Python objects are exchanged, never
    tensors.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank())
    finally:
        dist.destroy_process_group()


@contextmanager
def answer_together() -> Iterator[Ranks]:
    """Join the process group of torchrun to share one model.

    When a process fails, the others cannot go on. The first one that fails raises its error, and
    the others, which then lose the connection, exit with 2 and print nothing.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size, dist.get_node_local_rank())
    except BaseException as error:
        first = _is_first(store)
        if isinstance(error, Exception):  # others, like Ctrl-C, print nothing
            if not first:
                sys.exit(2)
            sys.stderr = sys.__stderr__  # see silence_other_ranks()
            if isinstance(error, RuntimeError) and _LOST.search(str(error)):
                raise ValueError(LOST) from error
        raise
    finally:
        dist.destroy_process_group()


def _is_first(store: Store) -> bool:
    """Whether no other process has asked this before."""
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:  # torchrun itself has ended, and the store with it
        return True
