"""Work that is shared by the processes of torchrun; without torchrun there is one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
            raise ValueError(
                "another process of torchrun has ended; the same command continues from here"
            ) from None
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


ALONE = Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group of torchrun, and leave it at the end.

    The backend is gloo on every device, because only small Python objects are exchanged, never
    tensors. The timeout is long because a process that is ready waits for the slowest one.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank())
    finally:
        dist.destroy_process_group()
