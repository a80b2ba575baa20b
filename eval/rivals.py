"""The times of other implementations at the shape of LLaVA-1.5-7B: `python -m eval.rivals`.

    python -m eval.rivals                                      transformers in bfloat16 and ours
    python -m eval.rivals --ours float16 int8-dynamic          these forms of ours
    python -m eval.rivals --llama-bench BIN --gguf FILE        llama.cpp as well

transformers (of the extra `test`) and minillava run with random weights, SDPA attention, one image
and 620 tokens, in turn in one process. To fit in any memory, they have two decoder layers, and the
decoder's time is multiplied by 16; the vision tower is complete. The ratio is that of the
first token's time to transformers'. llama-bench measures the prefill of 620 tokens and single
tokens of a GGUF file, without any vision.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minillava.app.command import CommandParser, parse_positive_int, run_command
from minillava.generate import generate
from minillava.quant.linear import multiplies_bfloat16

from .latency import FORMS, SHAPES, random_batch, random_model

LAYERS, ALL_LAYERS = 2, 32
TOKENS = 4  # generated tokens that are timed in a round
_CPU = torch.device("cpu")


def _random_transformers_model(dtype: torch.dtype) -> Any:
    """LLaVA-1.5-7B of transformers with random weights and LAYERS decoder layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    config: Any = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=LAYERS,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        image_token_index=32000,
    )
    config._attn_implementation = "sdpa"
    make: Any = Llava._from_config
    return make(config, dtype=dtype).eval()


@dataclass(frozen=True)
class Times:
    """Seconds of a model with LAYERS decoder layers; head: those of a token in the output head."""

    vision: float  # tower and projector
    prefill: float
    per_token: float
    head: float

    def scale(self) -> dict[str, float]:
        """Seconds with all decoder layers."""
        times = ALL_LAYERS // LAYERS
        prefill = self.prefill * times
        return {
            "vision": self.vision,
            "prefill": prefill,
            "first_token": self.vision + prefill,
            "per_token": (self.per_token - self.head) * times + self.head,
        }


class Transformers:
    """LLaVA of transformers, with random weights."""

    def __init__(self, dtype: str, tokens: int) -> None:
        self.name = f"transformers {dtype}"
        self.model = _random_transformers_model(getattr(torch, dtype))
        self.pixels = torch.randn(1, 3, 336, 336, dtype=self.model.dtype)
        self.ids = torch.randint(3, 31000, (1, tokens))

    @torch.inference_mode()
    def measure(self) -> Times:
        model, language, head = self.model, self.model.model.language_model, self.model.lm_head
        start = time.perf_counter()
        model.get_image_features(pixel_values=self.pixels)
        vision = time.perf_counter()
        out = language(input_ids=self.ids, use_cache=True)
        head(out.last_hidden_state[:, -1:])
        prefill = time.perf_counter()
        one = {"input_ids": self.ids[:, :1], "past_key_values": out.past_key_values}
        for _ in range(TOKENS):
            row = language(**one, use_cache=True).last_hidden_state
            head(row)
        token = time.perf_counter()
        head(row)
        end = time.perf_counter()
        return Times(vision - start, prefill - vision, (token - prefill) / TOKENS, end - token)


class Ours:
    """minillava in one of its forms, with random weights."""

    def __init__(self, form: str, tokens: int) -> None:
        self.name = f"minillava {form}"
        shape = SHAPES["7b"]
        config = replace(shape, text=replace(shape.text, num_hidden_layers=LAYERS))
        self.model = random_model(config, form, _CPU)
        self.batch = random_batch(config, tokens - config.vision.num_patches, _CPU)

    @torch.inference_mode()
    def measure(self) -> Times:
        n = TOKENS + 1
        report = generate(self.model, self.batch, max_new_tokens=n, min_new_tokens=n).report
        row = torch.zeros(1, self.model.config.text.hidden_size, dtype=self.model.dtype)
        start = time.perf_counter()
        self.model.llama.logits(row)
        return Times(report.vision, report.prefill, report.per_token, time.perf_counter() - start)


def take_turns(models: Sequence[Transformers | Ours], repeats: int) -> dict[str, dict[str, float]]:
    """Measure all in turn, in `repeats` rounds after one that does not count; medians, by name.

    Noise of the machine then affects all of them alike.
    """
    rounds = [[model.measure() for model in models] for _ in range(repeats + 1)][1:]
    found = {}
    for model, times in zip(models, zip(*rounds, strict=True), strict=True):
        scaled = [t.scale() for t in times]
        found[model.name] = {what: median(t[what] for t in scaled) for what in scaled[0]}
    return found


def llama_cpp_times(bench: str, gguf: str, tokens: int, threads: int) -> dict[str, float]:
    """Seconds of a prefill and of a token, measured by llama-bench (ValueError if it fails)."""
    command = [bench, "-m", gguf, "-p", str(tokens), "-n", "8", "-t", str(threads), "-o", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ValueError(f"--llama-bench {bench} failed ({said[-1] if said else error})") from None
    try:
        prefill, token = json.loads(done.stdout)
        return {
            "prefill": prefill["avg_ns"] / 1e9,
            "per_token": token["avg_ns"] / 1e9 / token["n_gen"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--llama-bench {bench} printed something else than its results as JSON "
            f"({type(error).__name__}: {error}); give llama.cpp's llama-bench"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.rivals",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--ours", nargs="+", choices=FORMS, default=["bfloat16", "int8-dynamic"], help="our forms")
    add("--tokens", type=parse_positive_int, default=620, help="tokens of the prompt, default 620")
    add("--repeats", type=parse_positive_int, default=2, help="measured runs, default 2")
    add("--llama-bench", metavar="BIN")
    add("--gguf", metavar="FILE", help="a 7B model for llama-bench, random or real")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    _check(args)
    began = time.perf_counter()
    theirs = Transformers(args.dtype, args.tokens)
    ours = [Ours(form, args.tokens) for form in args.ours]
    found = take_turns([theirs, *ours], args.repeats)
    if args.llama_bench:
        threads = torch.get_num_threads()
        found["llama.cpp"] = llama_cpp_times(args.llama_bench, args.gguf, args.tokens, threads)
    native = "in hardware" if multiplies_bfloat16() else "emulated"
    kind = torch.backends.cpu.get_cpu_capability()
    print(f"CPU: {kind}, bfloat16 {native}, {torch.get_num_threads()} threads")
    first = found[theirs.name]["first_token"]
    for name, times in found.items():
        ratio = f", ratio {times['first_token'] / first:.2f}" if "first_token" in times else ""
        print(f"{name}: {', '.join(f'{w} {v:.3f} s' for w, v in times.items())}{ratio}")
    print(f"{time.perf_counter() - began:.0f} s in all", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    """Refuse wrong options before minutes of work (ValueError)."""
    if bool(args.llama_bench) != bool(args.gguf):
        raise ValueError("--llama-bench and --gguf belong together; give both or neither")
    if args.llama_bench and shutil.which(args.llama_bench) is None:
        raise ValueError(
            f"--llama-bench {args.llama_bench} is no program; give llama.cpp's llama-bench"
        )
    if args.gguf and not Path(args.gguf).is_file():
        raise ValueError(f"there is no file --gguf {args.gguf}; give the GGUF file of a 7B")
    if args.tokens <= SHAPES["7b"].vision.num_patches:
        raise ValueError(f"--tokens {args.tokens} must be more than the image's 576")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed; pip install 'minillava[test]'")


if __name__ == "__main__":
    sys.exit(main())
