"""Many threads on one model, and many runs in one process: the same bits, and no growth."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from minillava import load, parse_plan
from minillava.app.cli import DEMO
from minillava.generate import Result, generate
from minillava.pruning import METHODS

FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
    {"quantize": "int8"},
    {"quantize": "int8-dynamic"},
    {"quantize": "int4"},
)


def plans(name: str) -> Iterator[str]:
    """Options of a method in each mode that it has."""
    yield ""
    if METHODS[name].drops_only:
        yield "mode=mask"


@pytest.mark.slow
def test_eight_threads_give_what_each_run_gives_alone(tmp_path: Path) -> None:
    """All methods, modes and stored forms, in an order in which neighbours differ in all three."""
    tiny.write_hf(tmp_path, width=64)
    models = [load(tmp_path, **form)[0] for form in FORMS]
    batch = tiny.make_batch(models[0], "tItIttt", "tttt", "tIItt")
    jobs = [
        (model, tiny.example(name, *filter(None, [mode])), {"temperature": t, "seed": 3})
        for name in METHODS.keys() - tiny.GRIDS.keys()
        for mode in plans(name)
        for t, model in enumerate(models)
    ]

    def run(job: Any) -> Result:
        model, plan, options = job
        return generate(model, batch, plan, 4, output_logits=True, **options)

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(run, jobs))
    assert len(jobs) == len(alone) > 200
    for mine, expected in zip(together, alone, strict=True):
        assert mine.tokens == expected.tokens
        assert torch.equal(mine.logits.nan_to_num(), expected.logits.nan_to_num())
        assert mine.report.kept == expected.report.kept


def held() -> dict[str, int]:
    """What this process holds: Python objects, tensors, open files, threads, resident bytes."""
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "objects": len(objects),
        "tensors": sum(issubclass(type(x), torch.Tensor) for x in objects),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_thousand_generations_and_two_hundred_loads_leave_nothing() -> None:
    """On the demo model, with plans of all kinds. What a tenth of it leaves is cached for good."""
    model, processor = load(DEMO)
    with Image.open(DEMO / "example.png") as image:
        prompt = "USER: <image>\nWhat is in the picture? ASSISTANT:"
        batch = processor([prompt], images=[[image.convert("RGB")]])
    # the demo has no text tower for two of them, another grid, and three times the layers that the
    # examples of fitprune and autoprune count on
    needs_more = {"trim", "cdpruner", "fitprune", "autoprune", *tiny.GRIDS}
    names = [name for name in METHODS if name not in needs_more]
    samples: list[dict[str, int]] = []
    for i in range(1000):
        if i % 5 == 0:
            model, processor = load(DEMO, quantize=(None, "int8", "int4")[i // 5 % 3])
        more = ["mode=mask"] if i % 2 and METHODS[names[i % len(names)]].drops_only else []
        plan = parse_plan("") if i % 7 == 0 else tiny.example(names[i % len(names)], *more)
        result = generate(model, batch, plan, 3, use_cache=i % 3 > 0)
        assert len(result.tokens[0]) >= 1
        del result
        if i % 100 == 99:
            samples.append(held())
    assert processor is not None
    print(*samples, sep="\n")
    first, last = samples[0], samples[-1]  # after a load of the same form
    assert last["objects"] - first["objects"] < 100
    for what in ("tensors", "files", "threads"):
        assert last[what] <= first[what], what
    assert last["bytes"] - first["bytes"] < 50e6
