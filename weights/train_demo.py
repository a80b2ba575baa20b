"""Train the demo checkpoint weights/demo from nothing, on a CPU.

Four stages; each is seeded, writes weights/runs/<stage>.pt every few minutes and goes on from there
when it is started again:

1. tower: the vision tower and the projector learn to say, patch by patch, what is there, against a
   fixed code: a patch should become the sum of the embeddings of the words for it.
2. reader: the decoder learns to answer from exactly such sums, without any picture being drawn.
   It needs nothing from stage 1 and can run beside it.
3. joint: both together, from pictures to answers.
4. finish: the same with the learning rate going to zero; then the checkpoint is written.

    python -m weights.train_demo                     every stage that is not finished, then export
    python -m weights.train_demo --stage reader      one stage
    python -m weights.train_demo --export joint      write weights/demo from a stage's last state
    python -m weights.train_demo --evaluate 7        accuracy on fresh held-out scenes, per kind

All questions of a picture stand behind one shared prefix (`USER: <image>`): each sees the prefix
and itself, its positions go on from the prefix, so that rows and gradients are those of separate
prompts at a fraction of the cost.
"""

from __future__ import annotations

import argparse
import io
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from minillava.clip import CLIPVision
from minillava.config import Config, TextConfig, VisionConfig
from minillava.llama import Llama
from minillava.llava import Projector

from . import scenes
from .export_demo import MEAN, STD, Shown, export, measure, summary, write_example

HERE = Path(__file__).parent
RUNS = HERE / "runs"

VOCAB = 640  # pieces, <image>, <pad>, and unused rows up to a multiple of 64
PIECES = 600
IMAGE_ID, PAD_ID, BOS, EOS = PIECES, PIECES + 1, 1, 2
VISION = VisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    image_size=scenes.SIZE,
    patch_size=14,
)
TEXT = TextConfig(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    vocab_size=VOCAB,
    max_position_embeddings=2048,
)
CONFIG = Config(vision=VISION, text=TEXT, image_token_id=IMAGE_ID)
FEATURE = VISION.num_hidden_layers - 1  # hidden state -2 of the tower


@dataclass(frozen=True)
class Stage:
    """What a stage trains and for how long."""

    steps: int
    pictures: int  # per step
    muon: float  # learning rate of the matrices inside blocks
    adam: float  # of everything else
    tower_scale: float = 1.0  # the tower's learning rates relative to the decoder's
    after: tuple[str, ...] = ()  # stages whose weights it starts from
    decay: float = 0.3  # share of the steps in which the rates fall linearly to zero
    warmup: int = 100


STAGES = {
    "tower": Stage(steps=2000, pictures=64, muon=0.02, adam=2e-3),
    "reader": Stage(steps=680, pictures=16, muon=0.02, adam=2e-3, decay=0.0),
    "joint": Stage(
        steps=1500,
        pictures=16,
        muon=0.015,
        adam=2e-3,
        tower_scale=0.2,
        decay=0.0,
        after=("tower", "reader"),
    ),
    "finish": Stage(
        steps=3000,
        pictures=16,
        muon=0.015,
        adam=2e-3,
        tower_scale=0.3,
        decay=1.0,
        after=("joint",),
    ),
}


# Text: a SentencePiece of our own, and prompts exactly as Hugging Face's processor encodes them.


def train_tokenizer() -> bytes:
    """Llama-style BPE with byte fallback whose pieces are the words of the scenes."""
    words: dict[str, int] = defaultdict(int)
    rng = np.random.default_rng(0)
    for _ in range(400):
        things = scenes.make_things(rng, "train")
        for example in scenes.questions(things, rng, list(scenes.KINDS)):
            for word in f"USER {example.question} ASSISTANT {example.answer}".split():
                words[word.strip("?.,:()")] += 1
    lines = []
    for word, count in sorted(words.items()):
        # "(Which" gives the piece without a space in front: a question's first word stands so
        lines += [word] * min(count, 60) + ([f"({word}"] * 30 if word[0].isupper() else [])
    lines += [f"{mark}" for mark in map(chr, range(33, 127))] * 3
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@lru_cache
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    path = RUNS / "tokenizer.model"
    if not path.exists():
        _write(path, train_tokenizer())
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


@lru_cache
def prefix_ids() -> tuple[int, ...]:
    """`USER: <image>` widened to its placeholders."""
    return (BOS, *tokenizer().encode("USER: "), *[IMAGE_ID] * VISION.num_patches)


def segment_ids(example: scenes.Example) -> tuple[list[int], list[int]]:
    """Ids of what follows the picture in the prompt, and of the answer."""
    question = tokenizer().encode(f"\n{example.question} ASSISTANT:")
    return question, [*tokenizer().encode(example.answer), EOS]


# Batches, made in another process: pure functions of (stage, step).


@dataclass(frozen=True)
class Batch:
    """P pictures with T rows each: the prefix, then questions with answers, then padding."""

    codes: Tensor  # (P, N, codes) which words belong to which patch
    pixels: Tensor | None  # (P, 3, S, S) uint8
    ids: Tensor  # (P, T)
    segments: Tensor  # (P, T) 0 for the prefix, 1.. for the questions, -1 for padding
    positions: Tensor  # (P, T)
    targets: Tensor  # (P, T) the next id where it belongs to an answer, else -100
    weights: Tensor  # (P, T) of each target in the loss
    looks: Tensor  # (P, T) bit i is set where the target is about the picture's thing i
    owners: Tensor  # (P, N) number of the thing on each patch, or -1
    kinds: list[list[str]]  # per picture, the kind of each segment from 1 on


ROWS = 192  # of questions and answers behind each prefix


def make_batch(rng: np.random.Generator, pictures: int, draw: bool, split: scenes.Split) -> Batch:
    drawn, packed, codes, owners = [], [], [], []
    for _ in range(pictures):
        things = scenes.make_things(rng, split)
        kinds = ["caption", "choice", "choice", *rng.choice([*_SHARES], 10, p=_CHANCES)]
        packed.append(pack(scenes.questions(things, rng, kinds), things))
        codes.append(patch_codes(things))
        owners.append(patch_owners(things))
        if draw:
            drawn.append(np.asarray(scenes.draw(things, rng)))
    return collate(packed, codes, owners, drawn)


# Of the short questions; the hard ones come more often.
_SHARES = {"digit": 1, "shape": 1, "colour": 2, "what": 1, "where": 2.5, "count": 2, "yes-no": 2.5}
_CHANCES = np.array([*_SHARES.values()]) / sum(_SHARES.values())


def pack(
    examples: Sequence[scenes.Example], things: Sequence[scenes.Thing]
) -> tuple[NDArray[np.int64], list[str]]:
    """As many examples as fit behind one prefix: (6, T), ids to looks as in Batch."""
    prefix = prefix_ids()
    T = len(prefix) + ROWS
    rows = np.full((6, T), -1, dtype=np.int64)
    rows[0], rows[2], rows[3], rows[4], rows[5] = PAD_ID, 0, -100, 0, 0
    rows[0, : len(prefix)] = prefix
    rows[1, : len(prefix)] = 0
    rows[2, : len(prefix)] = range(len(prefix))
    at, kinds = len(prefix), []
    for example in examples:
        question, answer = segment_ids(example)
        ids = question + answer[:-1]
        end = at + len(ids)
        if end > T:
            continue
        kinds.append(example.kind)
        rows[0, at:end] = ids
        rows[1, at:end] = len(kinds)
        rows[2, at:end] = range(len(prefix), len(prefix) + len(ids))
        rows[3, end - len(answer) : end] = answer
        rows[4, end - len(answer) : end] = 1 if example.kind == "caption" else 4
        rows[5, end - len(answer) : end - 1] = looks(example, things, answer[:-1])
        at = end
    return rows, kinds


def looks(
    example: scenes.Example, things: Sequence[scenes.Thing], answer: Sequence[int]
) -> list[int]:
    """For each token of the answer, the things it is about, as bits."""
    if example.kind != "caption":
        return [sum(1 << i for i, t in enumerate(things) if t.name in example.about)] * len(answer)
    comma = tokenizer().piece_to_id(",")
    ends = np.cumsum([0, *(token == comma for token in answer)])
    return [1 << int(i) for i in ends[:-1]]


def collate(
    packed: Sequence[tuple[NDArray[np.int64], list[str]]],
    codes: Sequence[NDArray[np.float32]],
    owners: Sequence[NDArray[np.int64]],
    drawn: Sequence[NDArray[np.uint8]],
) -> Batch:
    rows = torch.from_numpy(np.stack([rows for rows, _ in packed], axis=1))  # (6, P, T)
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) if drawn else None
    ids, segments, positions, targets, weights, looks = rows
    names = [kinds for _, kinds in packed]
    coded, owned = torch.from_numpy(np.stack(codes)), torch.from_numpy(np.stack(owners))
    return Batch(
        coded, pixels, ids, segments, positions, targets, weights.float(), looks, owned, names
    )


class Steps(Dataset[Batch]):
    """A worker's share of the batches of a stage from step `first` on."""

    def __init__(self, stage: str, seed: int, first: int, rank: int, workers: int) -> None:
        self.pictures, self.draw = STAGES[stage].pictures // workers, stage != "reader"
        self.seed = [[*STAGES].index(stage), seed, rank, workers]
        self.numbers = range(first, STAGES[stage].steps)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Batch:
        rng = np.random.default_rng([*self.seed, self.numbers[i]])
        return make_batch(rng, self.pictures, self.draw, "train")


# The code: which words are true of a patch.

NAMES = (*scenes.DIGITS, *scenes.SHAPES)
_WORDS = (*NAMES, *scenes.COLOURS, "top", "bottom", "left", "right", "center", "digit", "shape")
_CENTRE, _EMPTY, _ROW = len(_WORDS), len(_WORDS) + 1, len(_WORDS) + 2
N_CODES = _ROW + 2 * VISION.grid
N_LABELS = len(NAMES) + len(scenes.COLOURS)


def patch_codes(things: Sequence[scenes.Thing]) -> NDArray[np.float32]:
    """(N, codes) of 0 and 1: the words of the thing on the patch, and where the patch is."""
    grid, size = VISION.grid, VISION.patch_size
    codes = np.zeros((grid, grid, N_CODES), np.float32)
    codes[..., _EMPTY] = 1
    for i in range(grid):
        codes[i, :, _ROW + i] = 1
        codes[:, i, _ROW + grid + i] = 1
    middle = (np.arange(grid) + 0.5) * size
    for thing in things:
        left, top, right, bottom = thing.box
        columns = np.flatnonzero((middle > left) & (middle < right))
        rows = np.flatnonzero((middle > top) & (middle < bottom))
        words = [thing.name, thing.colour, *thing.place.split()]
        words.append("digit" if thing.is_digit else "shape")
        area = codes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        area[..., _EMPTY] = 0
        area[..., [_WORDS.index(word) for word in words]] = 1
        codes[int((top + bottom) / 2 / size), int((left + right) / 2 / size), _CENTRE] = 1
    return codes.reshape(-1, N_CODES)


def patch_owners(things: Sequence[scenes.Thing]) -> NDArray[np.int64]:
    """(N,) which thing covers the patch, or -1."""
    grid, size = VISION.grid, VISION.patch_size
    middle = (np.arange(grid) + 0.5) * size
    owners = np.full((grid, grid), -1)
    for i, thing in enumerate(things):
        left, top, right, bottom = thing.box
        inside = (middle > top) & (middle < bottom), (middle > left) & (middle < right)
        owners[np.ix_(*inside)] = i
    return owners.reshape(-1)


def code_vectors(embedding: Tensor, generator: torch.Generator) -> Tensor:
    """(codes, D): the embeddings of the words, random vectors for the rest."""
    ids = [tokenizer().encode(word) for word in _WORDS]
    assert all(len(i) == 1 for i in ids), "every word of the code is one piece"
    rest = torch.randn(N_CODES - len(_WORDS), embedding.shape[1], generator=generator)
    return torch.cat((embedding[[i[0] for i in ids]], EMBEDDING_STD * rest))


# The model in training.

EMBEDDING_STD = 0.25
LOOKING = (2, 3, 4, 5)  # blocks whose first head is taught where to look


class Heads(nn.Module):
    """Read-outs that exist in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.name = nn.Linear(VISION.hidden_size, len(NAMES) + 1)
        self.colour = nn.Linear(VISION.hidden_size, len(scenes.COLOURS) + 1)
        self.picture = nn.Linear(VISION.hidden_size, N_LABELS)  # from the class token


class Demo(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vision = CLIPVision(VISION)
        self.projector = Projector(CONFIG)
        self.llama = Llama(TEXT)
        self.heads = Heads()
        for name, p in self.named_parameters():
            if "norm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(
                ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
            ):
                nn.init.normal_(p, std=0.1 * p.shape[1] ** -0.5, generator=generator)
            elif p.ndim == 1 or "embed_tokens" in name or "position_embedding" in name:
                nn.init.normal_(p, std=EMBEDDING_STD, generator=generator)
            else:
                nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
        with torch.no_grad():  # copying a word is easy when reading and writing agree
            self.llama.lm_head.weight.copy_(self.llama.embed_tokens.weight)
            for block in self.llama.blocks:  # and finding it when asking and offering do
                block.attn.k_proj.weight.copy_(block.attn.q_proj.weight)
        codes = code_vectors(self.llama.embed_tokens.weight.detach(), generator)
        self.register_buffer("codes", codes)
        self.codes: Tensor

    def see(self, pixels: Tensor) -> Tensor:
        """(P, 3, S, S) uint8 -> hidden state of the feature layer (P, 1 + N, C)."""
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        x = (pixels.float() / 255 - mean) / std
        with sdpa_kernel(SDPBackend.MATH):  # the fast one for sequences as short as these
            return self.vision(x, (FEATURE,))[FEATURE]

    def read(self, image: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Image rows (P, N, D) in the place of the placeholders -> last hidden rows (P, T, D), and
        the attention (P, T, N) that one head of each of the LOOKING blocks pays to the patches.
        """
        P, T = batch.ids.shape
        x = self.llama.embed_tokens(batch.ids)  # (P, T, D)
        a = len(prefix_ids()) - VISION.num_patches
        x = torch.cat((x[:, :a], image.to(x.dtype), x[:, a + VISION.num_patches :]), dim=1)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        hidden = _hidden(batch.segments, dtype)  # (P, 1, T, T)
        attention: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # written out: with a mask, on a CPU, training through SDPA takes twice as long
            q, k, v = (y.view(P, T, -1, TEXT.head_dim).transpose(1, 2) for y in (q, k, v))
            scores = (q * TEXT.head_dim**-0.5) @ k.mT + hidden  # (P, H, T, T)
            paid = scores.softmax(-1)
            attention.append(paid[:, 0, :, a : a + VISION.num_patches])
            y = paid @ v  # (P, H, T, Dh)
            return y.transpose(1, 2).reshape(P * T, -1, TEXT.head_dim)

        rope = self.llama.rope(batch.positions.flatten(), dtype)
        x = x.flatten(0, 1)
        for block in self.llama.blocks:
            x = block(x, rope, attend)
        return x.view(P, T, -1), [attention[i] for i in LOOKING]


def _hidden(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, T) -> (P, 1, T, T): 0 where a row sees: prefix and own segment, up to itself."""
    row, column = segments[:, :, None], segments[:, None, :]
    before = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    seen = ((column == 0) | (row == column)) & before
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e9)[:, None]


def patch_loss(model: Demo, state: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, float]]:
    """How well the feature layer (P, 1 + N, C) says what each patch shows."""
    patches = state[:, 1:]
    split = len(NAMES), len(NAMES) + len(scenes.COLOURS)
    empty = codes[..., _EMPTY]
    weight = 1 - 0.7 * empty
    weight = weight / weight.sum()
    loss = torch.zeros(())
    figures = {}
    covered = empty == 0
    centre = codes[..., _CENTRE] == 1
    for what, part in (
        ("name", codes[..., : split[0]]),
        ("colour", codes[..., split[0] : split[1]]),
    ):
        label = torch.cat((part, empty[..., None]), dim=-1).argmax(-1)  # (P, N)
        logits = getattr(model.heads, what)(patches).float()
        each = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        loss = loss + (each.view_as(weight) * weight).sum()
        figures[what] = float((logits.argmax(-1) == label)[centre].float().mean())
        digits = centre & (label < len(scenes.DIGITS))
        if what == "name" and digits.any():
            figures["digit"] = float((logits.argmax(-1) == label)[digits].float().mean())
    target = codes @ model.codes
    apart = (model.projector(patches).float() - target).square().mean(-1) / target.square().mean()
    loss = loss + 2 * (apart * weight).sum()
    figures["apart"] = float(apart[covered].mean().detach())
    present = codes[..., : split[1]].amax(1)  # (P, labels)
    loss = loss + 0.3 * F.binary_cross_entropy_with_logits(
        model.heads.picture(state[:, 0]).float(), present
    )
    return loss, figures


def answer_loss(model: Demo, image: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers, and how much the looking heads miss what a token is about."""
    hidden, attention = model.read(image, batch)
    asked = batch.targets >= 0
    logits = model.llama.logits(hidden[asked])
    each = F.cross_entropy(logits, batch.targets[asked], reduction="none")
    weight = batch.weights[asked]
    bits = 1 << batch.owners.clamp(min=0)
    meant = ((batch.looks[:, :, None] & bits[:, None]) > 0) & (batch.owners >= 0)[:, None]
    rows = batch.looks > 0
    missed = [-(paid[rows].float() * meant[rows]).sum(-1).add(1e-4).log() for paid in attention]
    share = batch.weights[rows] / batch.weights[rows].sum()
    return (each * weight).sum() / weight.sum(), (torch.stack(missed).mean(0) * share).sum()


def symbols(model: Demo, codes: Tensor, generator: torch.Generator) -> Tensor:
    """(P, N, codes) -> (P, N, D): image rows as a good tower would give them, not quite clean."""
    P, N, _ = codes.shape
    blurred = codes.clone()
    lost = torch.rand(P, N, generator=generator) < 0.15  # now and then a patch says nothing
    blurred[..., :_CENTRE] *= ~lost[..., None]
    clean = blurred @ model.codes
    return clean + 0.3 * EMBEDDING_STD * torch.randn(clean.shape, generator=generator)


# Optimisation.


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), by shape of the matrices."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.02, "momentum": 0.95, "decay": 0.02})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-scale)


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz: each (m, n) matrix of the stack with its singular values brought near one."""
    wide = x.shape[1] <= x.shape[2]
    y = (x if wide else x.mT).bfloat16()
    y = y / (y.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y if wide else y.mT).to(x.dtype)


def optimizers(model: Demo, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, Adam for the rest.

    Embeddings move slowly: a word in the question finds the patches that show it because both are
    the same vector to begin with.
    """
    matrices: dict[float, list[nn.Parameter]] = defaultdict(list)
    others: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        scale = stage.tower_scale if name.startswith(("vision", "projector", "heads")) else 1.0
        if name == "llama.embed_tokens.weight":
            scale = 0.03
        (matrices if "blocks" in name and p.ndim == 2 else others)[scale].append(p)
    muon = Muon([{"params": ps, "lr": stage.muon * scale} for scale, ps in matrices.items()])
    adam = torch.optim.AdamW(
        [{"params": ps, "lr": stage.adam * scale} for scale, ps in others.items()],
        betas=(0.9, 0.97),
        weight_decay=0.0,
    )
    return [muon, adam]


def rate(stage: Stage, step: int) -> float:
    """Learning rate relative to its top: warm-up, flat, linear fall to zero."""
    falling = stage.steps * stage.decay
    down = (stage.steps - step) / falling if falling else 1.0
    return min(1.0, (step + 1) / stage.warmup, down)


# Running a stage.


def start(name: str, seed: int, workers: int, save_every: float) -> None:
    """Run a stage in `workers` processes of one thread each, which share every step's pictures."""
    others = [
        get_context("spawn").Process(target=run, args=(name, seed, rank, workers, save_every))
        for rank in range(1, workers)
    ]
    for process in others:
        process.start()
    run(name, seed, 0, workers, save_every)
    for process in others:
        process.join()


def run(name: str, seed: int, rank: int, workers: int, save_every: float) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        address = f"tcp://127.0.0.1:{29400 + [*STAGES].index(name)}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=workers)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # holds for CPUs too
    stage, path = STAGES[name], RUNS / f"{name}.pt"
    model = Demo(seed)
    step, seconds = 0, 0.0
    opts = optimizers(model, stage)
    tops = [[group["lr"] for group in optimizer.param_groups] for optimizer in opts]
    average = {key: p.detach().clone() for key, p in model.named_parameters()}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        step, seconds = saved["step"], saved["seconds"]
        for optimizer, state in zip(opts, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    else:
        for earlier in stage.after:
            take(model, earlier)
        average = {key: p.detach().clone() for key, p in model.named_parameters()}
    if step >= stage.steps:
        return
    if rank == 0:
        log(name, f"from step {step}, seed {seed}, {workers} processes, {stage}")
    began, last_saved, figures = time.monotonic() - seconds, time.monotonic(), {}
    loader = DataLoader(
        Steps(name, seed, step, rank, workers),
        batch_size=None,
        num_workers=1,
        prefetch_factor=6,
        multiprocessing_context="spawn",
    )
    for batch in loader:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step * workers + rank)
        for optimizer, top in zip(opts, tops, strict=True):
            for group, lr in zip(optimizer.param_groups, top, strict=True):
                group["lr"] = lr * rate(stage, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss, found = stage_loss(name, model, batch, generator)
        loss.backward()
        if workers > 1:
            share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if rank:
            continue
        keep = min(0.998, step / (step + 50))
        with torch.no_grad():
            for key, p in model.named_parameters():
                average[key].lerp_(p, 1 - keep)
        for key, value in found.items():
            figures[key] = 0.95 * figures.get(key, value) + 0.05 * value
        if step % 50 == 0:
            told = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
            log(name, f"step {step} {time.monotonic() - began:.0f} s {told}")
        if time.monotonic() - last_saved > save_every or step == stage.steps:
            save(path, model, average, opts, step, time.monotonic() - began)
            last_saved = time.monotonic()
            check(name, model, average, step)


def share_gradients(model: Demo) -> None:
    """Every process gets the mean of all gradients."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def stage_loss(
    name: str, model: Demo, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    if name == "reader":
        answers, missed = answer_loss(model, symbols(model, batch.codes, generator), batch)
        figures = {"loss": float(answers.detach()), "missed": float(missed.detach())}
        return answers + 0.2 * missed, figures
    assert batch.pixels is not None
    state = model.see(batch.pixels)
    loss, figures = patch_loss(model, state, batch.codes)
    if name == "tower":
        return loss, {"loss": float(loss.detach()), **figures}
    answers, missed = answer_loss(model, model.projector(state[:, 1:]), batch)
    figures = {
        "loss": float(answers.detach()),
        "missed": float(missed.detach()),
        "digit": figures.get("digit", 0.0),
    }
    return answers + 0.1 * loss + 0.05 * missed, figures


def take(model: Demo, earlier: str) -> None:
    """Start from an earlier stage's averaged weights: only those that it trained."""
    saved = torch.load(RUNS / f"{earlier}.pt", weights_only=True)["average"]
    parts = {"tower": ("vision", "projector", "heads"), "reader": ("llama",)}
    wanted = parts.get(earlier, ("vision", "projector", "heads", "llama"))
    state = {key: value for key, value in saved.items() if key.startswith(wanted)}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra, extra
    assert all(key == "codes" or not key.startswith(wanted) for key in missing), missing


def save(
    path: Path,
    model: Demo,
    average: dict[str, Tensor],
    opts: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer in opts],
        "step": step,
        "seconds": seconds,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _write(path, buffer.getvalue())


def _write(path: Path, data: bytes) -> None:
    """All or nothing, so that a kill leaves the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)


def log(name: str, text: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {name}: {text}"
    print(line, flush=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{name}.log").open("a") as file:
        file.write(line + "\n")


# Accuracy.


@torch.no_grad()
def check(name: str, model: Demo, average: dict[str, Tensor], step: int) -> None:
    """Log the averaged weights' accuracy per kind on a small held-out set."""
    current = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.load_state_dict({**average, "codes": model.codes})
    if name == "tower":
        batch = make_batch(np.random.default_rng(99), 200, True, "held-out")
        assert batch.pixels is not None
        _, figures = patch_loss(model, model.see(batch.pixels), batch.codes)
    else:
        figures = accuracy(
            model, make_batch(np.random.default_rng(99), 60, name != "reader", "held-out")
        )
    log(name, f"held out at {step}: " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    model.load_state_dict({**current, "codes": model.codes})


@torch.no_grad()
def accuracy(model: Demo, batch: Batch) -> dict[str, float]:
    """Share of answers whose every token is the most likely one, which is what greedy decoding
    gives."""
    if batch.pixels is None:
        image = batch.codes @ model.codes
    else:
        image = model.projector(model.see(batch.pixels)[:, 1:])
    best = model.llama.logits(model.read(image, batch)[0]).argmax(-1)  # (P, T)
    wrong = (best != batch.targets) & (batch.targets >= 0)
    right: dict[str, list[bool]] = defaultdict(list)
    for p, kinds in enumerate(batch.kinds):
        for i, kind in enumerate(kinds, start=1):
            right[kind].append(not bool(wrong[p, batch.segments[p] == i].any()))
    return summary(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--export", choices=STAGES, help="write weights/demo from this stage")
    parser.add_argument("--evaluate", type=int, metavar="SEED", help="measure weights/demo")
    parser.add_argument("--n", type=int, default=1800, help="questions of --evaluate")
    args = parser.parse_args()
    if args.evaluate is not None:
        report(args.evaluate, args.n)
        return
    if not args.export:
        for name in [args.stage] if args.stage else STAGES:
            start(name, args.seed, args.workers, args.save_every)
    if not args.stage:
        write_demo(args.export or "finish", args.seed)


def write_demo(stage: str, seed: int) -> None:
    model = Demo(seed)
    take(model, stage)
    parts = ("vision.", "projector.", "llama.")
    weights = {k: p.detach() for k, p in model.named_parameters() if k.startswith(parts)}
    export(HERE / "demo", CONFIG, weights, tokenizer().serialized_model_proto())
    write_example(HERE / "demo")


def report(seed: int, n: int) -> None:
    """Accuracy of weights/demo in per cent, per kind, with the picture and without."""
    columns = {shown: measure(HERE / "demo", seed, n, shown) for shown in get_args(Shown)}
    print(f"seed {seed}, {n} questions, every kind equally often; captions are not part of all")
    print("".join(f"{title:>12}" for title in ("kind", *columns)))
    for kind in columns["picture"]:
        print(f"{kind:>12}" + "".join(f"{100 * f[kind]:12.1f}" for f in columns.values()))


if __name__ == "__main__":
    main()
