"""One model shared by two processes: the numbers, choices and errors of one process, and half of
the decoder's weights and of the KV cache in each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    GRIDS,
    VOCABULARY,
    assert_close,
    example,
    make_batch,
    rewrite_config,
    rows_kept,
    write_folder,
)
from two_processes import ROOT, Done, Job, Wavering, do, run_two

from minillava.app.ask import _load_chat
from minillava.app.cli import _make_parser
from minillava.app.ranks import Ranks
from minillava.loading.checkpoint import load
from minillava.pruning import METHODS
from minillava.pruning.base import Plan
from minillava.quant.cpu import multiplies_bfloat16
from weights.quantise import quantise

PROMPTS = ("tttItttttt", "tttt", "tItIttt", "tIItt")  # several images, and none
HERE = sorted(METHODS.keys() - GRIDS.keys())  # methods that can run on this model
IN_DECODER = [name for name in HERE if any(s.stage == "decoder" for s in example(name).steps)]
MASKING = [name for name in IN_DECODER if METHODS[name].drops_only]
DEMO = ROOT / "weights" / "demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two query heads for each key, and a vocabulary that two processes cannot halve."""
    folder = write_folder(tmp_path_factory)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, 1))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rewrite_config(folder, lambda config: config["text_config"].update(vocab_size=VOCABULARY + 1))
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: its output head is the embedding, and each query head has its own key."""
    return write_folder(tmp_path_factory, tied=True, kv_heads=4)


@pytest.fixture(scope="module")
def batch(folder: Path) -> Any:
    return make_batch(load(folder)[0], *PROMPTS)


def ask(folder: Path, batch: Any, plan: Any, dtype: str = "float32", **options: Any) -> Job:
    options = {"max_new_tokens": 3, "min_new_tokens": 3} | options
    return Job(folder, batch, plan, {"dtype": dtype}, options)


def run(jobs: Mapping[Any, Job], folder: Path) -> dict[Any, tuple[Done, Done, Done]]:
    """What the first of two processes, the second, and a process alone have after each job."""
    two, models = run_two(folder, list(jobs.values())), dict[Any, Any]()
    alone = [do(job, models) for job in jobs.values()]
    return dict(zip(jobs, zip(*two, alone, strict=True), strict=True))


@pytest.fixture(scope="module")
def done(
    folder: Path, tied: Path, batch: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, tuple[Done, Done, Done]]:
    """One pair of processes does all jobs of the fast tests."""
    jobs: dict[Any, Job] = {
        "plain": ask(folder, batch, ""),
        "no cache": ask(folder, batch, example("sparsevlm"), use_cache=False),
        "sampled": ask(folder, batch, "random:keep=5", temperature=1.0, top_p=0.9, seed=5),
        "no seed": ask(folder, batch, "", temperature=1.0),
        "wavering": ask(folder, batch, Plan((Wavering(),))),
        "too much": ask(folder, batch, "uniform:keep=17"),
        **{("drop", name): ask(folder, batch, example(name)) for name in HERE},
        **{("mask", name): ask(folder, batch, example(name, "mode=mask")) for name in MASKING},
        "tied": ask(tied, make_batch(load(tied)[0], *PROMPTS), example("dart")),
    }
    return run(jobs, tmp_path_factory.mktemp("two"))


def assert_equal(done: tuple[Done, Done, Done], tolerance: float = 1e-4) -> None:
    first, second, alone = (d.result for d in done)
    kept = rows_kept(alone.report)
    assert rows_kept(first.report) == rows_kept(second.report) == kept
    assert first.report.tokens_entering == alone.report.tokens_entering
    assert first.tokens == second.tokens == alone.tokens
    assert torch.equal(first.logits, second.logits)  # the same bits
    assert_close(first.logits, alone.logits, tolerance)


# ---------------------------------------------------------------- the same answers


@pytest.mark.parametrize("name", HERE)
def test_every_method_chooses_and_answers_as_in_one_process(done: Any, name: str) -> None:
    assert_equal(done["drop", name])


@pytest.mark.parametrize("name", MASKING)
def test_masks_are_chosen_again_as_in_one_process(done: Any, name: str) -> None:
    assert_equal(done["mask", name])


@pytest.mark.parametrize("name", ["plain", "no cache", "sampled", "tied"])
def test_other_ways_to_answer(done: Any, name: str) -> None:
    assert_equal(done[name])


def test_without_a_seed_all_processes_draw_the_same(done: Any) -> None:
    first, second, alone = (d.result for d in done["no seed"])
    assert first.tokens == second.tokens
    assert first.tokens != alone.tokens


def test_where_processes_would_choose_differently_the_first_decides(done: Any) -> None:
    assert_equal(done["wavering"])


def test_all_processes_refuse_what_one_refuses(done: Any) -> None:
    first, second, alone = (d.refused for d in done["too much"])
    assert first == second == alone != ""


# ---------------------------------------------------------------- half of it each


def test_each_process_has_half_of_the_decoder(done: Any) -> None:
    first, second, alone = (d.held for d in done["plain"])
    assert first.keys() == second.keys() == alone.keys()
    halved = {name for name in alone if first[name] != alone[name]}
    assert halved == {
        *(n for n in alone if n.startswith("llama.blocks.") and "norm" not in n),
        "llama.lm_head.weight",
    }
    assert all(2 * first[n] == 2 * second[n] == alone[n] for n in halved - {"llama.lm_head.weight"})
    head = first["llama.lm_head.weight"] + second["llama.lm_head.weight"]
    assert head == alone["llama.lm_head.weight"] == 4 * 321 * 32


def test_each_process_reads_what_it_holds(done: Any) -> None:
    for each in done["plain"]:
        assert each.read == sum(each.held.values())


@pytest.mark.parametrize("name", ["plain", ("drop", "pyramiddrop"), ("mask", "fastv")])
def test_each_process_has_half_of_the_cache(done: Any, name: Any) -> None:
    first, second, alone = done[name]
    assert 2 * first.cached == 2 * second.cached == alone.cached > 0
    assert 2 * first.result.report.cache_bytes == alone.result.report.cache_bytes > 0


# ---------------------------------------------------------------- refused


def processes(*shape: int) -> Any:
    """What load() reads of a mesh before it is used."""
    return SimpleNamespace(shape=shape, ndim=len(shape), size=lambda: torch.Size(shape).numel())


@pytest.mark.parametrize(
    ("n", "options", "told"),
    [
        (2, {"quantize": "int8"}, "quantised to int8 "),
        (2, {"quantize": "int4"}, "quantised to int4 "),
        (2, {"dtype": "float16"}, "dtype=float16 .* give dtype=float32"),
        (3, {}, "3 processes .* num_attention_heads=4; start"),
        (4, {}, "4 processes .* num_key_value_heads=2; start"),
    ],
)
def test_what_cannot_be_shared(folder: Path, n: int, options: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load(folder, mesh=processes(n), **options)


def test_stored_integers_cannot_be_shared(tied: Path, tmp_path: Path) -> None:
    quantise(tied, tmp_path / "int8", "int8")
    with pytest.raises(ValueError, match="quantised to int8 "):
        load(tmp_path / "int8", mesh=processes(2))


def test_a_mesh_has_one_dimension(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"mesh has the shape \(2, 1\)"):
        load(folder, mesh=processes(2, 1))


# ---------------------------------------------------------------- the command line


def torchrun(*args: str, told: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "minillava.generate"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, *args],
        env=env | {"OMP_NUM_THREADS": "1"},
        input=told,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
    )


def test_a_chat_reads_prints_and_draws_once(tmp_path: Path) -> None:
    drawing = tmp_path / "kept.png"
    questions = "What digit is red?\n\nWhat digit is yellow?\n"
    plan = ["--prune", "pyramiddrop:layers=3/6/9", "--overlay", str(drawing)]
    image = ["--image", str(DEMO / "example.png")]
    ended = torchrun("--chat", "--json", *image, *plan, told=questions)
    assert ended.returncode == 0, ended.stderr
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(answer["text"][:1], answer["processes"]) for answer in answers] == [("1", 2), ("6", 2)]
    assert [path.name for path in tmp_path.iterdir()] == [drawing.name]
    for report in (answer["report"] for answer in answers):
        rows = sum(lengths[0] for lengths in report["cache_lengths"])
        assert report["cache_bytes"] == 4 * 2 * rows * 32 * 4 / 2  # half of the demo's four heads


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_draws(rank: int, tmp_path: Path) -> None:
    drawing, image = tmp_path / "kept.png", str(DEMO / "example.png")
    args = _make_parser().parse_args(["--image", image, "--prompt", "?", "--overlay", str(drawing)])
    args.max_new_tokens, args.command = 1, "a test"
    chat = _load_chat(args, [image], Ranks(rank))
    chat.answer_prompt(chat.processor.prompt("?", 1), "?")
    assert drawing.exists() == (rank == 0)


FAILING = """
import os
from dataclasses import dataclass
from minillava.pruning.base import Keep, Method

@dataclass(frozen=True)
class Failing(Method):
    def stages(self):
        return (("embed", 0),)

    def choose(self, c):
        if os.environ["RANK"] == "{rank}":
            {act}
        return Keep(c.shuffled()[:5])
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("raise ValueError('only here')", "only here"),
        ("os.kill(os.getpid(), 9)", "another process of torchrun has ended"),
    ],
)
def test_a_failure_of_one_process_ends_both(tmp_path: Path, rank: int, act: str, told: str) -> None:
    file = tmp_path / "failing.py"
    file.write_text(FAILING.format(rank=rank, act=act))
    ended = torchrun("--prune", f"{file}:Failing")
    assert ended.returncode == 1  # torchrun's own code
    assert ended.stdout == ""
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert told in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--prune", "nonsense"], "no pruning method 'nonsense'"),
        (["--quantize", "int8"], "quantised to int8"),
        (["--device", "cuda:0"], "device='cuda:0' for 2 processes"),
    ],
)
def test_an_error_of_both_processes_is_printed_once(args: list[str], told: str) -> None:
    ended = torchrun(*args)
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert told in line


# ---------------------------------------------------------------- everything


@pytest.mark.slow
def test_all_methods_modes_and_ways_of_decoding(
    folder: Path, tied: Path, batch: Any, tmp_path: Path
) -> None:
    jobs: dict[Any, Job] = {}
    for path in (folder, tied):
        prompts = batch if path == folder else make_batch(load(path)[0], *PROMPTS)
        for name in HERE:
            more = [[]]
            if METHODS[name].drops_only:
                more += [["mode=mask"], ["scope=all"], ["scope=all", "mode=mask"]]
            more += [["positions=compact"], ["positions=original"]]
            for options in more:
                for use_cache in (True, False):
                    plan = example(name, *options)
                    jobs[path, plan.text, use_cache] = ask(path, prompts, plan, use_cache=use_cache)
    failed = {}
    for name, each in run(jobs, tmp_path).items():
        try:
            assert_equal(each)
        except AssertionError as error:
            failed[name] = str(error)
    assert not failed
    assert len(jobs) > 4 * 2 * len(HERE)


@pytest.mark.slow
@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU does not compute in bfloat16")
def test_bfloat16(folder: Path, batch: Any, tmp_path: Path) -> None:
    """No further from float32 than one process is, whose sums are rounded once less often."""
    plans = ("", "fastv:layer=2,keep=5")
    done = run({text: ask(folder, batch, text, "bfloat16") for text in plans}, tmp_path)
    exact = do(ask(folder, batch, ""), {}).result.logits[:, 0]
    for first, second, alone in done.values():
        assert first.result.report.arithmetic == "bfloat16"
        assert torch.equal(first.result.logits, second.result.logits)
        assert rows_kept(first.result.report) == rows_kept(second.result.report)
        assert 2 * first.cached == alone.cached
    errors = [(each.result.logits[:, 0] - exact).square().mean().sqrt() for each in done[""]]
    assert errors[0] <= 1.5 * errors[2]


def test_a_shared_decoder_is_not_compiled(folder: Path) -> None:
    with pytest.raises(ValueError, match="compile=True is for one process"):
        load(folder, mesh=processes(2), compile=True)
