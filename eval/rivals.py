"""Other implementations at the shape of LLaVA-1.5-7B, beside ours: `python -m eval.rivals`.

    python -m eval.rivals                                          everything that is installed
    python -m eval.rivals --peers transformers-bfloat16 openvino-u4 --ours int8-dynamic
    python -m eval.rivals --ours int8-dynamic --prune fastv:k=2,r=0.75 divprune:keep=64

All run in one process with random weights, one image and 620 tokens, and take turns in each round,
so that noise on the machine affects all of them alike. Every second round goes through them
backwards, so that none always follows the same other one. Times are medians over the rounds, and
the first round warms up and does not count. To fit in 24 GiB they have two decoder layers, and the
time of a layer is multiplied by 16 (llama.cpp's by 31: its last layer is shorter and counts once);
the output head counts once and the vision tower is complete.
With a pruning plan our models also have the layers before its last step, which count once, and
their prefill is compared with the time that its layers take alone.

Times to the first token include the image. Implementations without a vision tower (llama.cpp and
OpenVINO here) are given the fastest of transformers' towers in the same run. A peer that is not
installed is left out with a note; pip install 'minillava[test,rivals]' installs all of them
(llama-cpp-python is compiled for this CPU then).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from statistics import median
from typing import Any

import torch

from minillava.app.command import CommandParser, parse_positive_int, run_command
from minillava.config import Config
from minillava.quant.cpu import multiplies_bfloat16

from .latency import FORMS, SHAPES, available_memory, model_bytes, with_layers
from .peers.base import ALL_LAYERS, Measurable, Peer, Times
from .peers.llama_cpp import LlamaCpp
from .peers.openvino import OpenVino
from .peers.ours import full_layers, make_ours
from .peers.transformers import Transformers
from .plans import NONE, TypedPlan, read_plans

KINDS: dict[str, type[Peer]] = {
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}
PEERS = {f"{kind}-{form}": (peer, form) for kind, peer in KINDS.items() for form in peer.forms}
REFERENCE = "transformers bfloat16"
LAST_STEP = 8  # decoder layer at which a plan may prune for the last time


def default_peers() -> list[str]:
    """All peers, 16 bits in the form that is faster on this CPU."""
    slow = {"transformers-float16", "llama.cpp-f16" if multiplies_bfloat16() else "llama.cpp-bf16"}
    return [name for name in PEERS if name not in slow]


def default_forms() -> list[str]:
    return ["bfloat16" if multiplies_bfloat16() else "float16", "int8-dynamic", "int4"]


def take_turns(models: Sequence[Measurable], repeats: int) -> dict[str, Times]:
    """Measure all in turn, in `repeats` rounds after one that does not count; medians, by name."""
    times: dict[str, list[Times]] = {model.name: [] for model in models}
    for number in range(repeats + 1):
        for model in models if number % 2 == 0 else reversed(models):
            times[model.name].append(model.measure())
    return {name: _median(column[1:]) for name, column in times.items()}


def _median(times: Sequence[Times]) -> Times:
    """Field by field; None where there is no such time."""
    found: dict[str, Any] = {}
    for field in fields(Times):
        values = [getattr(t, field.name) for t in times]
        found[field.name] = None if None in values else median(values)
    return Times(**found)


def with_towers(found: Mapping[str, Times]) -> dict[str, Times]:
    """Lend those without a vision tower the fastest of transformers' in this run, if any."""
    theirs = [t.vision for name, t in found.items() if name.startswith("transformers") and t.vision]
    tower = min(theirs, default=None)
    return {
        name: times if times.vision is not None else replace(times, vision=tower)
        for name, times in found.items()
    }


def format_table(found: Mapping[str, Times]) -> str:
    """The times as a Markdown table, with ratios to transformers and to the fastest of the peers.

    A peer is every row that is not ours. A cell is empty where nothing was measured.
    """
    complete = with_towers(found)
    first = {n: t.vision + t.prefill for n, t in complete.items() if t.vision is not None}
    peers = [name for name in found if not name.startswith("minillava")]
    best_first = min((first[n] for n in peers if n in first), default=None)
    best_token = min((found[n].per_token for n in peers), default=None)
    heads = """vision, s | prefill, s | first token, s | of transformers' | of the fastest peer's |
        next ones, ms | of the fastest peer's | prefill of its layers alone"""
    names = ["", *(" ".join(head.split()) for head in heads.split("|"))]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for name, t in found.items():
        lent = "*" if t.vision is None and name in first else ""
        cells = [
            _cell(complete[name].vision) + lent,
            _cell(t.prefill),
            _cell(first.get(name)),
            _ratio(first.get(name), first.get(REFERENCE)),
            _ratio(first.get(name), best_first),
            f"{1e3 * t.per_token:.0f}",
            _ratio(t.per_token, best_token),
            _ratio(t.prefill, t.layers_alone),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def _ratio(seconds: float | None, reference: float | None) -> str:
    return _cell(None if seconds is None or reference is None else seconds / reference)


def describe_machine() -> str:
    native = "in hardware" if multiplies_bfloat16() else "emulated"
    kind = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"CPU: {kind}, bfloat16 {native}, {threads} thread{'s' * (threads > 1)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.rivals",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--peers", nargs="*", choices=PEERS, default=default_peers(), help="default: all that pay")
    add("--ours", nargs="*", choices=FORMS, default=default_forms(), help="our forms")
    add("--prune", nargs="*", default=["fastv:k=2,r=0.75"], metavar="PLAN", help="plans of ours")
    add("--tokens", type=parse_positive_int, default=620, help="tokens of the prompt, default 620")
    add("--layers", type=parse_positive_int, default=2, help="decoder layers, default 2")
    add("--repeats", type=parse_positive_int, default=2, help="measured rounds, default 2")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    shape, plans = SHAPES["7b"], read_plans([NONE, *args.prune])
    config = with_layers(shape, args.layers)
    missing = {name: _missing_packages(PEERS[name][0]) for name in args.peers}
    peers = [name for name, packages in missing.items() if not packages]
    _check(args, config, peers, plans)
    for name, packages in missing.items():
        if packages:
            print(_left_out(name, packages), file=sys.stderr)
    models: list[Measurable] = []
    for name in peers:
        peer, form = PEERS[name]
        models.append(peer(form, config, args.tokens))
    for form in dict.fromkeys(args.ours):
        models += make_ours(form, config, args.tokens, plans)
    found = take_turns(models, args.repeats)
    print(f"{describe_machine()}; {args.layers} of {ALL_LAYERS} decoder layers\n")
    print(table := format_table(found))
    if "*" in table:
        print("\n\\* transformers' time; this implementation has no vision tower here")
    print(f"{time.perf_counter() - began:.0f} s in all", file=sys.stderr)


def _missing_packages(peer: type[Peer]) -> list[str]:
    return [name for name in peer.packages if importlib.util.find_spec(name) is None]


def _left_out(name: str, packages: Sequence[str]) -> str:
    extra = "test" if name.startswith("transformers") else "rivals"
    return (
        f"note: {name} is left out, because {' and '.join(packages)} is not installed; "
        f"pip install 'minillava[{extra}]'"
    )


def _check(
    args: argparse.Namespace, config: Config, peers: Sequence[str], plans: Mapping[str, TypedPlan]
) -> None:
    """Refuse what cannot run before minutes of work (ValueError)."""
    patches, layers = config.vision.num_patches, config.text.num_hidden_layers
    if args.tokens <= patches:
        raise ValueError(f"--tokens {args.tokens} must be more than the image's {patches}")
    if layers > ALL_LAYERS - LAST_STEP:
        raise ValueError(f"--layers {layers} must be at most {ALL_LAYERS - LAST_STEP}")
    if not peers and not args.ours:
        raise ValueError("nothing is left to measure; give --peers or --ours")
    for text, typed in plans.items():
        for method in typed.plan.methods:
            method.check(ALL_LAYERS, patches, (0,))
        if (last := full_layers(typed.plan)) > LAST_STEP:
            raise ValueError(
                f"--prune {text} prunes at layer {last}, but only a few layers are measured here "
                f"(at most {LAST_STEP}); measure it with python -m eval.latency --shape 7b"
            )
    needed, free = _needed_memory(args.ours, config, peers, plans), available_memory()
    if needed > free:
        raise ValueError(
            f"these models need {needed / 1e9:.1f} GB of memory together, and {free / 1e9:.1f} GB "
            "are free; name fewer of them with --peers and --ours, or fewer --layers"
        )


def _needed_memory(
    forms: Sequence[str], config: Config, peers: Sequence[str], plans: Mapping[str, TypedPlan]
) -> float:
    """About the bytes of all models at once, with 2 GB for activations and libraries."""
    theirs = sum(
        kind.forms[form] * model_bytes(shape, "float32") / 4
        for kind, form in (PEERS[name] for name in peers)
        for shape in kind.shapes(config)
    )
    deeper = config.text.num_hidden_layers + max(full_layers(p.plan) for p in plans.values())
    config = with_layers(config, deeper)
    return theirs + sum(model_bytes(config, form) for form in forms) + 2e9


if __name__ == "__main__":
    sys.exit(main())
