"""Train a small Llama on text, to measure stored forms of weights: `python -m weights.train_text`.

The demo answers almost every question with certainty, so rounding its weights hardly changes its
distributions. A model of running text is uncertain at most tokens and shows every rounding. This
one has six layers of width 256 and is trained on the docstrings of Python's library, torch, numpy
and scikit-learn as installed here. DST becomes a llava-hf folder in float32 whose vision tower is
tiny and untrained, with `held-out.txt`, text that was not used in training:

    python -m weights.train_text DST
    python -m eval.forms --model DST --text DST/held-out.txt

One core takes about 11 minutes. The state is saved in DST/training.pt every 50 steps; the same
command resumes from it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.app.command import CommandParser, parse_path, run_command
from minillava.config import Config, TextConfig, VisionConfig
from minillava.llama import Block
from minillava.llava import LLaVA
from minillava.quant.cpu import multiplies_bfloat16

from .demo_data import write_atomically
from .export_demo import export
from .files import explain_os_errors
from .muon import Muon

PACKAGES = ("torch", "numpy", "sklearn")  # beside Python's own library
SHORTEST = 200  # characters of a docstring
HELD_OUT = 32  # one docstring in so many is not used in training
HELD_OUT_CHARACTERS = 100_000
PIECES, BOS = 2048, 1
STEPS, SEQUENCES, LENGTH = 400, 16, 256  # a step has SEQUENCES of LENGTH tokens
SAVE_EVERY = 50  # steps
MUON, ADAM, DECAY = 0.02, 2e-3, 0.4  # learning rates, and the share of steps in which they fall
SEED = 1
CONFIG = Config(
    VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ),
    TextConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=PIECES + 64,
        max_position_embeddings=2048,
    ),
    image_token_id=PIECES,
)


# ---------------------------------------------------------------- text


def docstrings(folder: Path) -> Iterator[str]:
    """The docstrings of all Python files below a folder, in the order of their paths."""
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.relative_to(folder).parts:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of invalid escapes
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, ValueError):  # a test file of something invalid
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds))
        yield from (text for text in found if text and len(text) >= SHORTEST)


def read_texts() -> tuple[list[str], list[str]]:
    """Docstrings for training, and those held out, each once."""
    folders = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"{name} is not installed; pip install 'minillava[train]'")
        folders.append(Path(spec.origin).parent)
    texts = dict.fromkeys(text for folder in folders for text in docstrings(folder))
    split: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        split[digest % HELD_OUT == 0].append(text)
    return split


def train_tokenizer(texts: Sequence[str]) -> bytes:
    """A Llama-style BPE with byte fallback, learned from every eighth text."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts[::8] for line in text.splitlines()]),
        model_writer=written,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def encode(pieces: bytes, texts: Sequence[str]) -> Tensor:
    """All texts in one row of ids, each after BOS."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    return torch.tensor([i for ids in tokenizer.encode([*texts]) for i in (BOS, *ids)])


def write_data(data: Path, held_out: Path) -> None:
    """Write the ids of all texts and the tokenizer to one file, the held-out text to another."""
    texts, others = read_texts()
    characters = sum(map(len, texts))
    print(f"{len(texts)} docstrings, {characters:,} characters; {len(others)} held out", flush=True)
    write_atomically(held_out, "\n\n".join(others)[:HELD_OUT_CHARACTERS].encode())
    pieces, buffer = train_tokenizer(texts), io.BytesIO()
    torch.save({"pieces": pieces, "ids": encode(pieces, texts).int()}, buffer)
    write_atomically(data, buffer.getvalue())


# ---------------------------------------------------------------- model


def new_model() -> LLaVA:
    """Random weights; small ones in the layers that add to the residual stream."""
    torch.manual_seed(SEED)
    model = LLaVA(CONFIG)
    for name, p in model.llama.named_parameters():
        if p.ndim == 2:
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 if "blocks" not in name else (0.1 if small else 1.0) * p.shape[1] ** -0.5
            nn.init.normal_(p, std=std)
    return model


def logits_of(model: LLaVA, ids: Tensor) -> Tensor:
    """ids (P, T) -> float32 logits (P T, V)."""
    (P, T), llama = ids.shape, model.llama

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.view(P, T, -1, y.shape[-1]).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (P, H, T, Dh)
        return y.transpose(1, 2).reshape(P * T, -1, y.shape[-1])

    x = llama.embed_tokens(ids).flatten(0, 1)  # (P T, D)
    rope = llama.rope(torch.arange(T).repeat(P))
    for block in llama.blocks:
        x = cast(Block, block)(x, rope, attend)
    return llama.logits(x)


def make_optimizers(model: LLaVA) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    parameters = dict(model.llama.named_parameters())
    matrices = [p for name, p in parameters.items() if "blocks" in name and p.ndim == 2]
    others = [p for name, p in parameters.items() if "blocks" not in name or p.ndim == 1]
    return [
        Muon([{"params": matrices, "lr": MUON}]),
        torch.optim.AdamW(others, lr=ADAM, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def train_step(model: LLaVA, optimizers: list[torch.optim.Optimizer], ids: Tensor) -> float:
    """One step on ids (P, T + 1); returns the loss in nats for each token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
        logits = logits_of(model, ids[:, :-1])
        loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.llama.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def set_rates(optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """The rates rise for 50 steps, stay, and fall linearly to 0."""
    share = min(1.0, (step + 1) / 50, (STEPS - step) / (STEPS * DECAY))
    for optimizer, full in zip(optimizers, (MUON, ADAM), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = full * share


def train(folder: Path, ids: Tensor) -> LLaVA:
    """Train from the last saved state in the folder to the end."""
    model, path = new_model(), folder / "training.pt"
    optimizers, first = make_optimizers(model), 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]
    began, mean = time.process_time(), 0.0
    for step in range(first, STEPS):
        set_rates(optimizers, step)
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        starts = torch.randint(len(ids) - LENGTH - 1, (SEQUENCES,), generator=generator)
        rows = torch.stack([ids[i : i + LENGTH + 1] for i in starts]).long()
        loss = train_step(model, optimizers, rows)
        mean = loss if step == first else 0.95 * mean + 0.05 * loss
        if (step + 1) % SAVE_EVERY == 0:
            seconds = time.process_time() - began
            print(f"step {step + 1} of {STEPS}, {seconds:.0f} s, loss {mean:.3f}", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomically(path, buffer.getvalue())
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m weights.train_text",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("dst", type=parse_path, metavar="DST", help="folder to write or resume")
    return run_command(lambda: _run(parser.parse_args(argv).dst))


def _run(folder: Path) -> None:
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data = folder / "training-data.pt"
    if not data.exists():
        write_data(data, folder / "held-out.txt")
    found = torch.load(data, weights_only=True)
    print(f"{len(found['ids']):,} tokens", flush=True)
    model = train(folder, found["ids"])
    with explain_os_errors(folder):
        export(folder, CONFIG, model.state_dict(), found["pieces"], torch.float32)


if __name__ == "__main__":
    sys.exit(main())
