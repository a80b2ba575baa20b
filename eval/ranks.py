"""Several processes on one piece of work, started by torchrun; without it there is one."""

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
    """This process among all, and on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def gather(self, act: Callable[[], T]) -> list[T]:
        """What `act` gives in each process, in the order of ranks, for all of them.

        If it fails in one, all raise ValueError with the words of the first that failed, so that
        none waits for another in vain.
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
        dist.all_gather_object(outcomes, (value, error))
        for _, error in outcomes:
            if error:
                raise ValueError(error)
        return [value for value, _ in outcomes]

    def run_in_first(self, act: Callable[[], T]) -> T:
        """What `act` gives in the first process, where alone it runs."""
        return self.gather(lambda: act() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def device(self, name: str) -> str:
        """cuda without a number: each process has its own card."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name


ALONE = Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The process group that torchrun has prepared. Only words pass through it, never tensors, so
    it is gloo on every device; who is ready waits for the slowest, however long that takes."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank())
    finally:
        dist.destroy_process_group()
