"""The times of other implementations at the shape of LLaVA-1.5-7B: `python -m eval.rivals`.

    python -m eval.rivals                                          transformers in bfloat16
    python -m eval.rivals --llama-bench BIN --gguf FILE            llama.cpp as well

transformers (of the extra `test`) runs its LLaVA with random weights, SDPA attention, one image and
620 tokens. So that it fits in any memory, it has two decoder layers, and the decoder's time is
multiplied by 16; the vision tower is complete. llama-bench measures the prefill of 620 tokens and
single tokens of a GGUF file, without any vision. Compare with `python -m eval.latency`.
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
from pathlib import Path
from typing import Any

import torch

from minillava.app.command import CommandParser, parse_positive_int, run_command

from . import cost

LAYERS, ALL_LAYERS = 2, 32
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


def transformers_times(dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of vision tower with projector, of the prefill of all 32 layers, and of a token."""
    model = _random_transformers_model(dtype)
    pixels = torch.randn(1, 3, 336, 336, dtype=dtype)
    ids = torch.randint(3, 31000, (1, tokens))
    language, head = model.model.language_model, model.lm_head

    def prefill() -> Any:
        out = language(input_ids=ids, use_cache=True)
        return head(out.last_hidden_state[:, -1:]), out.past_key_values

    with torch.inference_mode():
        vision = cost.best_seconds(
            lambda: model.get_image_features(pixel_values=pixels), _CPU, repeats
        )
        prefilling = cost.best_seconds(prefill, _CPU, repeats)
        _, cache = prefill()

        def step() -> None:
            language(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

        one = cost.best_seconds(step, _CPU, 3 * repeats)
        row = torch.randn(1, 1, 4096, dtype=dtype)
        last = cost.best_seconds(lambda: head(row), _CPU, 3 * repeats)
    times = ALL_LAYERS // LAYERS
    return {
        "vision": vision,
        "prefill": prefilling * times,
        "first_token": vision + prefilling * times,
        "per_token": one * times + last,
    }


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
    add("--tokens", type=parse_positive_int, default=620, help="tokens of the prompt, default 620")
    add("--repeats", type=parse_positive_int, default=2, help="measured runs, default 2")
    add("--llama-bench", metavar="BIN")
    add("--gguf", metavar="FILE", help="a 7B model for llama-bench, random or real")
    return run_command(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    _check(args)
    began = time.perf_counter()
    times = transformers_times(getattr(torch, args.dtype), args.tokens, args.repeats)
    found = {f"transformers {args.dtype}": times}
    if args.llama_bench:
        threads = torch.get_num_threads()
        found["llama.cpp"] = llama_cpp_times(args.llama_bench, args.gguf, args.tokens, threads)
    for name, times in found.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.3f} s" for what, value in times.items()))
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
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed; pip install 'minillava[test]'")


if __name__ == "__main__":
    sys.exit(main())
