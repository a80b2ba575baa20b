"""Killed, doubled and distributed runs of eval.run end with the answers of an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval import run
from eval.plans import file_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PLAN = "random:keep=9"  # draws at random: each question has a seed of its own
NAME = f"{file_name(PLAN)}.jsonl"
LIMIT = 100
ARGUMENTS = ["-m", "eval.run", "--limit", str(LIMIT), "--prune", PLAN]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SECONDS = 240  # that a command may take on a busy machine

Process = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The answers of one undisturbed process."""
    out = tmp_path_factory.mktemp("whole")
    finish(out)
    return answers(out)


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Processes that a test has started; the sessions of all are killed at its end."""
    found: list[Process] = []
    yield found
    for process in found:
        kill(process)


def start(started: list[Process], *command: str) -> Process:
    """Start a command in a session of its own."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    started.append(process)
    return process


def kill(process: Process) -> None:
    """Kill a process and the workers of torchrun that it has started, which have own sessions."""
    workers = workers_of(process) if process.poll() is None else []
    for pid in (process.pid, *workers):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    process.communicate()


def torchrun(node: int, port: int, workers: int, out: Path) -> list[str]:
    """The command of one of two agents on this machine."""
    nodes = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(workers)]
    where = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return ["-m", "torch.distributed.run", *nodes, *where, *ARGUMENTS, "--out", str(out)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def finish(out: Path) -> None:
    assert run.main([*ARGUMENTS[2:], "--out", str(out)]) == 0


def lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def answers(out: Path) -> list[str]:
    """The texts of all questions, each of which has one complete line."""
    rows = lines(out / NAME)
    assert [row["metadata"]["number"] for row in rows] == list(range(LIMIT))
    assert (out / NAME).read_bytes().endswith(b"\n")
    assert not list(out.glob("*.part-*"))
    assert not list(out.glob("*.writing"))
    return [row["text"] for row in rows]


def wait_for_lines(files: Sequence[Path], process: Process, least: int = 1) -> None:
    """Wait until each of the files has some lines."""
    until = time.monotonic() + SECONDS
    while any(not file.exists() or file.read_bytes().count(b"\n") < least for file in files):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < until
        time.sleep(0.005)


def workers_of(agent: Process) -> list[int]:
    """The processes that an agent of torchrun has started, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        with contextlib.suppress(OSError):  # it has ended
            entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            named = [entry for entry in entries if entry.startswith(b"RANK=")]
            ranks |= {int(entry.removeprefix(b"RANK=")): child for entry in named}
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments(
    seed: int, whole: list[str], tmp_path: Path, started: list[Process]
) -> None:
    draw, path, kept = random.Random(seed), tmp_path / NAME, 0
    for _ in range(5):
        process = start(started, *ARGUMENTS, "--out", str(tmp_path))
        if draw.random() < 0.75:  # while it answers, otherwise while it loads
            wait_for_lines([path], process, min(len(lines(path)) + 1, LIMIT))
        time.sleep(draw.uniform(0, 0.6))
        kill(process)
        assert len(lines(path)) >= kept  # none is lost
        kept = len(lines(path))
    finish(tmp_path)
    assert answers(tmp_path) == whole


def test_of_two_processes_in_one_folder_one_is_refused(
    whole: list[str], tmp_path: Path, started: list[Process]
) -> None:
    command = [*ARGUMENTS, "--out", str(tmp_path)]
    both = [start(started, *command), start(started, *command)]
    told = [process.communicate(timeout=SECONDS)[1].decode() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) in ([0, 0], [0, 2])  # the second may have come after the first
    for code, text in zip(codes, told, strict=True):
        if code:
            (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
            assert "another process writes to" in error
    assert answers(tmp_path) == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_of_torchrun(
    rank: int, whole: list[str], tmp_path: Path, started: list[Process]
) -> None:
    torch_run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    agent = start(started, *torch_run, str(free_port()), *ARGUMENTS, "--out", str(tmp_path))
    parts = [tmp_path / f"{NAME}.part-{i}" for i in range(2)]
    wait_for_lines(parts, agent)
    os.kill(workers_of(agent)[rank], signal.SIGKILL)
    agent.communicate(timeout=SECONDS)
    assert agent.returncode != 0
    kept = sum(len(lines(part)) for part in parts)
    assert 2 <= kept < LIMIT
    finish(tmp_path)
    assert answers(tmp_path) == whole


def test_two_agents_write_one_result(
    whole: list[str], tmp_path: Path, started: list[Process]
) -> None:
    port = free_port()
    agents = [start(started, *torchrun(node, port, 2, tmp_path)) for node in range(2)]
    printed = [agent.communicate(timeout=SECONDS) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert [b"| `random:keep=9` |" in out for out, _ in printed] == [True, False]
    assert answers(tmp_path) == whole
    result = json.loads((tmp_path / NAME).with_suffix(".json").read_text())
    assert result["processes"] == 4
    assert result["score"]["missing"] == result["score"]["duplicates"] == 0
    # each process has a share of the questions, and its own first two batches
    told = [row["metadata"] for row in lines(tmp_path / NAME)]
    assert [row["number"] for row in told if not row["warm"]] == list(range(8))


@pytest.mark.parametrize("node", [0, 1])
def test_after_the_kill_of_an_agent_the_same_command_finishes(
    node: int, whole: list[str], tmp_path: Path, started: list[Process]
) -> None:
    port = free_port()
    agents = [start(started, *torchrun(i, port, 1, tmp_path)) for i in range(2)]
    parts = [tmp_path / f"{NAME}.part-{i}" for i in range(2)]
    wait_for_lines(parts, agents[0])
    kill(agents[node])  # as if its machine had failed
    other = agents[1 - node]
    said = other.communicate(timeout=SECONDS)[1].decode()
    assert other.returncode != 0, said
    kept = sum(len(lines(part)) for part in parts)
    assert 2 <= kept < LIMIT
    port = free_port()
    again = [start(started, *torchrun(i, port, 1, tmp_path)) for i in range(2)]
    told = [agent.communicate(timeout=SECONDS)[1].decode() for agent in again]
    assert [agent.returncode for agent in again] == [0, 0], told
    assert answers(tmp_path) == whole
