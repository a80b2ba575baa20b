"""Small random models, written by transformers and read by our load, and batches for them.

A prompt is written as a string in which `t` is a text token and `I` an image. For example "ttIItt"
is two text tokens, two adjacent images and two text tokens.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minillava import Batch, load, parse_plan
from minillava.pruning import METHODS
from minillava.pruning.base import Context, Keep, Plan

SMALL_FILES = Path(__file__).parent / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
IMAGE, PAD, VOCABULARY = 318, 319, 320
NEVER = (2, IMAGE, PAD)  # their logits are 0, so greedy decoding never ends by chance


def write_model(factory: pytest.TempPathFactory, **shape: Any) -> Any:
    """A random model of another shape than the fixture `model`."""
    return load(write_folder(factory, **shape))[0]


def write_folder(factory: pytest.TempPathFactory, **shape: Any) -> Path:
    """A new folder that write_hf has filled, for a fixture."""
    folder = factory.mktemp("tiny")
    write_hf(folder, **shape)
    return folder


def write_hf(
    folder: Path,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    old_rope: bool = False,
    layers: int = 4,
    width: int = 32,
    inner: int | None = None,
    image_size: int = 56,
    vision_layers: int = 10,
    positions: int = 2048,
    seed: int = 0,
) -> Any:
    """Save a random LLaVA with transformers, add the small files of tiny-a, return its module."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=vision_layers,
            num_attention_heads=3,
            image_size=image_size,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=inner or 2 * width + 8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            rms_norm_eps=2e-5,
            tie_word_embeddings=tied,
        ),
        image_token_index=IMAGE,
        pad_token_id=PAD,
        tie_word_embeddings=tied,
    )
    model = Llava(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():  # decisive logits, no trivial biases and norms
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            p.copy_(noise * 0.15 + ("norm" in name and name.endswith("weight")))
        else:
            p.copy_(noise * (1.0 if "embed_tokens" in name else 1.6 / math.sqrt(p[0].numel())))
    model.lm_head.weight[list(NEVER)] = 0.0
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "generation_config.json"):
        shutil.copy(SMALL_FILES / name, folder)
    pictures = json.loads((SMALL_FILES / "preprocessor_config.json").read_text())
    pictures |= {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    if old_rope:
        rewrite_config(folder, _as_before_transformers_5)
    return model


def _as_before_transformers_5(config: dict[str, Any]) -> None:
    text = config["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]


def rewrite_config(folder: Path, change: Any, name: str = "config.json") -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def write_clip(folder: Path, width: int = 24) -> Path:
    """Save a random CLIP model in a folder in open_clip's layout, and return the folder."""
    import open_clip

    shape = {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 56,
            "patch_size": 14,
            "width": width,
            "head_width": 8,
            "layers": 1,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }
    torch.manual_seed(width)
    clip = open_clip.CLIP(**shape)
    for p in clip.parameters():  # biases and norms are not trivial
        if p.ndim == 1:
            p.data += 0.3 * torch.randn(p.shape)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape}))
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


# ---------------------------------------------------------------- batches


def make_batch(model: Any, *prompts: str, seed: int = 0, focus: Any = None) -> Batch:
    """A left-padded batch of random text and images for prompts such as "ttItt"."""
    N, S = model.config.vision.num_patches, model.config.vision.image_size
    generator = torch.Generator().manual_seed(seed)
    rows, pictures = [], 0
    for prompt in prompts:
        row = [1]
        for sign in prompt[1:] if prompt[0] == "t" else prompt:
            drawn = int(torch.randint(3, IMAGE, (), generator=generator))
            row += [IMAGE] * N if sign == "I" else [drawn]
        rows.append(row if prompt[0] == "t" else row[1:])
        pictures += prompt.count("I")
    pixels = torch.randn(pictures, 3, S, S, generator=generator) if pictures else None
    sizes = [((100, 400), (400, 100), (400, 300))[i % 3] for i in range(pictures)]
    batch = pad_left(rows, pixels, focus)
    return dataclasses.replace(batch, sizes=[(*size, "pad") for size in sizes] or None)


def pad_left(
    rows: Sequence[Sequence[int]], pixels: Tensor | None, focus: Any = None, pad: int = PAD
) -> Batch:
    T = max(map(len, rows))
    ids = torch.tensor([[pad] * (T - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (T - len(row)) + [True] * len(row) for row in rows])
    return Batch(ids, mask, pixels, focus)


def alone(model: Any, batch: Batch, b: int) -> Batch:
    """Sample b as a batch of size 1 without padding."""
    N = model.config.vision.num_patches
    samples = [ids[mask] for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    pictures = [int((ids == model.config.image_token_id).sum()) // N for ids in samples]
    first = sum(pictures[:b])
    pixels = batch.pixels[first : first + pictures[b]] if pictures[b] else None
    ids = samples[b][None]
    focus = None if batch.focus is None else [batch.focus[b]]
    sizes = batch.sizes[first : first + pictures[b]] if batch.sizes and pictures[b] else None
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), pixels, focus, sizes)


# ---------------------------------------------------------------- plans

# Values for options that a method requires or whose defaults are meant for a large model, by name.
# With them a method acts on a model of four layers and 16 tokens per image.
VALUES = {
    "keep": "5",
    "dominant": "6",
    "contextual": "3",
    "layer": "2",
    "layers": "1/2/3",
    "final": "3",
    "basis": "2",
    "merge": "0.0",
    "total": "0.04",
    "individual": "1.0",
    "patches": "1/4-6/9",
    "depth": "4",
    "target": "5",
}
GRIDS = {"mustdrop": 6}  # patches along a side of an image that a method needs; others take 4
SEVERAL = {"keep": "8/5/3", "delete": "4/0/5/0"}


def grid_for(request: pytest.FixtureRequest) -> int:
    """Patches along a side of an image in a test about the method `name`, if it is about one."""
    callspec = getattr(request.node, "callspec", None)
    return GRIDS.get(callspec.params.get("name", ""), 4) if callspec else 4


@cache
def example(name: str, *more: str) -> Plan:
    """A plan of this method that prunes the small model; `more` are further options."""
    options = {}
    for field in dataclasses.fields(METHODS[name]):
        if "tuple" in str(field.type) and field.name in SEVERAL:
            options[field.name] = SEVERAL[field.name]
        elif field.name in VALUES:
            options[field.name] = VALUES[field.name]
        elif field.name == "clip":
            options[field.name] = clip_folder()
        elif field.default is dataclasses.MISSING:
            raise KeyError(f"{name} needs {field.name}: add a value for the tests to VALUES")
    spelled = [f"{option}={value}" for option, value in options.items()]
    return parse_plan(f"{name}:{','.join([*spelled, *more])}")


@cache
def clip_folder() -> str:
    """Folder of a random CLIP model for the methods that encode text with it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return str(write_clip(folder))


# ---------------------------------------------------------------- recording


@contextmanager
def watching(*modules: torch.nn.Module) -> Iterator[list[list[Tensor]]]:
    """One list per module, which receives the output of each call (a copy if it is a tensor)."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def note(outputs: list[Tensor]) -> Any:
        return lambda module, inputs, output: outputs.append(
            output.clone() if isinstance(output, Tensor) else output
        )

    hooks = [
        module.register_forward_hook(note(outputs))
        for module, outputs in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watching_inputs(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the first argument of each call of the module."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    yield seen
    hook.remove()


def choices(monkeypatch: pytest.MonkeyPatch, method: Any) -> list[tuple[Context, Keep]]:
    """A list that receives the context and the result of each call of `method.choose`."""
    seen: list[tuple[Context, Keep]] = []
    choose = method.choose

    def noting(self: Any, c: Context) -> Keep:
        seen.append((c, choose(self, c)))
        return seen[-1][1]

    monkeypatch.setattr(method, "choose", noting)
    return seen


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that a program printed: exactly one line on stderr, and nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


def rows_kept(report: Any) -> list[tuple[Any, ...]]:
    """What each step of a plan did, without the numbers that it ranked by: these are rounded
    differently by other devices, and where processes add up each other's results."""
    return [
        (k.rule, k.stage, k.layer, k.positions, k.extra, k.order, k.merged_into, k.digest)
        for k in report.kept
    ]


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference is at most `tolerance` times the root mean square of `expected`."""
    assert ours.shape == expected.shape, f"{tuple(ours.shape)} against {tuple(expected.shape)}"
    expected = expected.double()
    if expected.numel():
        difference = (ours.double() - expected).abs().max() / expected.square().mean().sqrt()
        assert difference <= tolerance, f"differs by {difference:.2e} x rms"


def assert_same_weights(ours: Tensor, expected: Tensor) -> None:
    """For weights of a softmax: the tolerance is relative to 1, not to the mean of all weights."""
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
