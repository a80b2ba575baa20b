"""The demo's config, its tokenizer, and training batches made from scenes.

A batch has P images. All questions about an image follow one shared prefix (`USER: <image>`). Each
question attends to the prefix and to itself, and its positions continue from the prefix. Hidden
states and gradients are therefore those of separate prompts, at a fraction of the cost.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray
from torch import Tensor

from minillava.config import Config, TextConfig, VisionConfig

from . import scenes

RUNS = Path(__file__).parent / "runs"

VOCAB = 640  # PIECES, <image> and <pad>, rounded up to a multiple of 64
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


# Text: a SentencePiece model, and prompts encoded exactly as by Hugging Face's processor.


def train_tokenizer() -> bytes:
    """Train a Llama-style BPE with byte fallback on the words of the questions and answers."""
    words: dict[str, int] = defaultdict(int)
    rng = np.random.default_rng(0)
    for _ in range(400):
        things = scenes.make_things(rng, "train")
        for example in scenes.questions(things, rng, list(scenes.KINDS)):
            for word in f"USER {example.question} ASSISTANT {example.answer}".split():
                words[word.strip("?.,:()")] += 1
    lines = []
    for word, count in sorted(words.items()):
        # "(Which" adds the piece without a leading space, as at the start of a question
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
    """The trained tokenizer, which is stored in runs/."""
    path = RUNS / "tokenizer.model"
    if not path.exists():
        write_atomically(path, train_tokenizer())
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


@lru_cache
def prefix_ids() -> tuple[int, ...]:
    """Ids of `USER: <image>`, with the image token repeated for each of the N patches."""
    return (BOS, *tokenizer().encode("USER: "), *[IMAGE_ID] * VISION.num_patches)


def segment_ids(example: scenes.Example) -> tuple[list[int], list[int]]:
    """Ids of the prompt after the image, and ids of the answer with EOS."""
    question = tokenizer().encode(f"\n{example.question} ASSISTANT:")
    return question, [*tokenizer().encode(example.answer), EOS]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: a killed process leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)


# Batches: pure functions of the random generator.


@dataclass(frozen=True)
class Batch:
    """P images with T tokens each: the prefix, then questions with answers, then padding."""

    codes: Tensor  # (P, N, N_CODES) 0 or 1: which words describe which patch
    pixels: Tensor | None  # (P, 3, S, S) uint8; None if no images are drawn
    ids: Tensor  # (P, T)
    segments: Tensor  # (P, T) 0: prefix, 1, 2, ...: questions, -1: padding
    positions: Tensor  # (P, T)
    targets: Tensor  # (P, T) the next id if it belongs to an answer, else -100
    weights: Tensor  # (P, T) weight of each target in the loss
    things: Tensor  # (P, T) bits: bit i is set if the target is about thing i of the image
    owners: Tensor  # (P, N) index of the thing on each patch, or -1
    kinds: list[list[str]]  # of each image: the kinds of question in segments 1, 2, ...


ROWS = 192  # tokens of questions and answers after each prefix


@dataclass(frozen=True)
class Mix:
    """Which questions an image gets. Short questions then fill the remaining tokens."""

    choices: int = 2  # number of multiple-choice questions
    captions: float = 1.0  # probability of a caption


def make_batch(
    rng: np.random.Generator, images: int, draw: bool, split: scenes.Split, mix: Mix
) -> Batch:
    """A random batch of scenes. draw=False leaves out the pixels."""
    drawn, packed, codes, owners = [], [], [], []
    for _ in range(images):
        things = scenes.make_things(rng, split)
        kinds = ["choice"] * mix.choices + [*rng.choice([*_SHARES], 10, p=_CHANCES)]
        if rng.random() < mix.captions:
            kinds.insert(0, "caption")
        packed.append(pack(scenes.questions(things, rng, kinds), things))
        codes.append(patch_codes(things))
        owners.append(patch_owners(things))
        if draw:
            drawn.append(np.asarray(scenes.draw(things, rng)))
    return collate(packed, codes, owners, drawn)


# Relative frequencies of the short questions; difficult kinds are more frequent.
_SHARES = {
    "digit": 1,
    "shape": 1,
    "colour": 1,
    "what": 1.5,
    "where": 1.5,
    "count": 4,
    "yes-no": 1.5,
}
_CHANCES = np.array([*_SHARES.values()]) / sum(_SHARES.values())


def pack(
    examples: Sequence[scenes.Example], things: Sequence[scenes.Thing]
) -> tuple[NDArray[np.int64], list[str]]:
    """Pack as many examples as fit after one prefix.

    Returns (6, T): ids, segments, positions, targets, weights and things, as in Batch; and the
    kinds of the packed examples.
    """
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
        rows[5, end - len(answer) : end - 1] = things_of_answer(example, things, answer[:-1])
        at = end
    return rows, kinds


def things_of_answer(
    example: scenes.Example, things: Sequence[scenes.Thing], answer: Sequence[int]
) -> list[int]:
    """For each token of the answer, the things that it is about, as bits."""
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
    """Stack the rows of `pack`, codes and owners of each image, and the images if drawn."""
    rows = torch.from_numpy(np.stack([rows for rows, _ in packed], axis=1))  # (6, P, T)
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) if drawn else None
    ids, segments, positions, targets, weights, about = rows
    names = [kinds for _, kinds in packed]
    coded, owned = torch.from_numpy(np.stack(codes)), torch.from_numpy(np.stack(owners))
    return Batch(
        coded, pixels, ids, segments, positions, targets, weights.float(), about, owned, names
    )


# Patch codes: which words describe a patch.

NAMES = (*scenes.DIGITS, *scenes.SHAPES)
WORDS = (*NAMES, *scenes.COLOURS, "top", "bottom", "left", "right", "center", "digit", "shape")
CENTRE, EMPTY, ROW = len(WORDS), len(WORDS) + 1, len(WORDS) + 2
N_CODES = ROW + 2 * VISION.grid
N_LABELS = len(NAMES) + len(scenes.COLOURS)


def patch_codes(things: Sequence[scenes.Thing]) -> NDArray[np.float32]:
    """(N, N_CODES) of 0 and 1: words of the thing on each patch, and the patch's row and column."""
    grid, size = VISION.grid, VISION.patch_size
    codes = np.zeros((grid, grid, N_CODES), np.float32)
    codes[..., EMPTY] = 1
    for i in range(grid):
        codes[i, :, ROW + i] = 1
        codes[:, i, ROW + grid + i] = 1
    middle = (np.arange(grid) + 0.5) * size
    for thing in things:
        left, top, right, bottom = thing.box
        columns = np.flatnonzero((middle > left) & (middle < right))
        rows = np.flatnonzero((middle > top) & (middle < bottom))
        words = [thing.name, thing.colour, *thing.place.split()]
        words.append("digit" if thing.is_digit else "shape")
        area = codes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        area[..., EMPTY] = 0
        area[..., [WORDS.index(word) for word in words]] = 1
        codes[int((top + bottom) / 2 / size), int((left + right) / 2 / size), CENTRE] = 1
    return codes.reshape(-1, N_CODES)


def patch_owners(things: Sequence[scenes.Thing]) -> NDArray[np.int64]:
    """(N,) index of the thing that covers each patch, or -1."""
    grid, size = VISION.grid, VISION.patch_size
    middle = (np.arange(grid) + 0.5) * size
    owners = np.full((grid, grid), -1)
    for i, thing in enumerate(things):
        left, top, right, bottom = thing.box
        inside = (middle > top) & (middle < bottom), (middle > left) & (middle < right)
        owners[np.ix_(*inside)] = i
    return owners.reshape(-1)
