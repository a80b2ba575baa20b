"""Two processes that share one model, for the tests of loading/parallel.py.

run_two() starts this file twice. Both processes do the jobs that they are given, in their order,
and return what happened: the Result of a generation, or the text of a ValueError.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from minillava import load, parse_plan
from minillava.cache import KVCache
from minillava.generate import generate
from minillava.loading import tensor_files
from minillava.pruning.base import Context, Keep, Method, Stages

ROOT = Path(__file__).parents[1]
SECONDS = 300


@dataclass(frozen=True)
class Job:
    """Load a model (if it is not the one of the job before), and generate with it."""

    folder: Path
    batch: Any
    plan: Any = ""  # text, or a Plan
    load: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Done:
    """What one process has after a job. Bytes are those of its own tensors."""

    result: Any = None
    refused: str = ""
    read: int = 0  # bytes that were read from the checkpoint's files
    held: dict[str, int] = field(default_factory=dict)  # parameter -> bytes
    cached: int = 0  # bytes of the KV cache that the prefill reserved


@dataclass(frozen=True)
class Wavering(Method):
    """Chooses something else in every process, as if their devices rounded differently."""

    name, drops_only = "wavering", False

    def stages(self) -> Stages:
        return (("embed", 0), ("decoder", 2))

    def choose(self, c: Context) -> Keep:
        rank = dist.get_rank() if dist.is_initialized() else 0
        k = 3 + rank if c.stage_index == 0 else 2
        merged = c.features()[rank : rank + k]
        extra = merged[:1] if rank == 0 or c.stage_index else None
        return Keep(torch.arange(k) + rank, merged=merged, extra=extra)


@dataclass(frozen=True)
class CountedFile:
    """An open safetensors file, or a tensor in it, that counts the bytes which are read."""

    opened: Any
    done: Done

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._count(self.opened.get_tensor(name))

    def get_slice(self, name: str) -> CountedFile:
        return CountedFile(self.opened.get_slice(name), self.done)

    def __getitem__(self, part: Any) -> torch.Tensor:
        return self._count(self.opened[part])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)

    def _count(self, value: torch.Tensor) -> torch.Tensor:
        self.done.read += value.nbytes
        return value


def do(job: Job, models: dict[Any, Any], mesh: Any = None) -> Done:
    """Without a mesh: in this process alone, with the whole model."""
    done, open_file, reserve = Done(), tensor_files._open_safetensors, KVCache.reserve

    @contextmanager
    def counted_file(path: Path) -> Iterator[Any]:
        with open_file(path) as file:
            yield CountedFile(file, done)

    def count_reserved(self: KVCache, layers: Any, lengths: Any) -> None:
        reserve(self, layers, lengths)
        done.cached += sum(self.keys[i].nbytes + self.values[i].nbytes for i in layers)

    key = (job.folder, *job.load.items())
    tensor_files._open_safetensors, KVCache.reserve = counted_file, count_reserved
    try:
        if key not in models:
            models.clear()
            models[key] = load(job.folder, mesh=mesh, **job.load)[0]
        model = models[key]
        plan = parse_plan(job.plan) if isinstance(job.plan, str) else job.plan
        done.result = generate(model, job.batch, plan, output_logits=True, **job.options)
        parameters = dict(model.named_parameters())
        done.held = {n: p.nbytes for n, p in parameters.items()}
    except ValueError as error:
        done.refused = str(error)
    finally:
        tensor_files._open_safetensors, KVCache.reserve = open_file, reserve
    return done


def run_two(folder: Path, jobs: list[Job]) -> tuple[list[Done], list[Done]]:
    """What the first and the second process have after each job."""
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    # nothing outside this machine can reach them
    env = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    both = [
        subprocess.Popen([*command, str(rank), str(folder)], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=SECONDS)[1].decode() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(told)
    first, second = (pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2))
    return first, second


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh, models = init_device_mesh("cpu", (2,)), dict[Any, Any]()
    jobs = pickle.loads((folder / "jobs").read_bytes())
    (folder / str(rank)).write_bytes(pickle.dumps([do(job, models, mesh) for job in jobs]))
    dist.destroy_process_group()


if __name__ == "__main__":
    # the jobs name their classes by the module's name
    import two_processes

    two_processes.main(int(sys.argv[1]), Path(sys.argv[2]))
