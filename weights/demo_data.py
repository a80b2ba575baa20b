"""The config, the tokenizer, and training batches made from scenes.

A batch has P images. All conversations about an image follow one shared prefix (`USER: <image>`).
They stand in `LANES` lanes of `LANE` rows: a row attends to the prefix and to the earlier rows of
its own conversation, which never crosses a lane. Positions of each conversation continue from the
prefix, so hidden states and gradients are those of separate prompts, at a fraction of the cost.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray
from torch import Tensor

from minillava.config import Config, TextConfig, VisionConfig

from . import scenes
from .files import explain_os_errors

VOCAB = 640  # PIECES, <image> and <pad>, rounded up to a multiple of 64
PIECES = 600
IMAGE_ID, PAD_ID, BOS, EOS = PIECES, PIECES + 1, 1, 2
VISION = VisionConfig(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=4,
    image_size=scenes.SIZE,
    patch_size=14,
)
TEXT = TextConfig(
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=12,
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
    for _ in range(600):
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


TOKENIZER = Path(__file__).parent / "demo" / "tokenizer.model"  # of train_tokenizer()


@lru_cache
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    """The tokenizer, trained where its file is missing."""
    if not TOKENIZER.exists():
        write_atomically(TOKENIZER, train_tokenizer())
    return sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER.read_bytes())


@lru_cache
def prefix_ids() -> tuple[int, ...]:
    """Ids of `USER: <image>`, with the image token repeated for each of the N patches."""
    return (BOS, *tokenizer().encode("USER: "), *[IMAGE_ID] * VISION.num_patches)


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: a killed process leaves the previous file. Raises ValueError if it
    cannot be written."""
    with explain_os_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)


# Batches: pure functions of the random generator.

LANES, LANE = 4, 64  # a multiple-choice question with its answer has up to 50 rows


@dataclass(frozen=True)
class Batch:
    """P images with T = A + LANES * LANE rows each: the prefix, then conversations."""

    codes: Tensor  # (P, N, N_CODES) 0 or 1: which words describe which patch
    pixels: Tensor | None  # (P, 3, S, S) uint8; None if no images are drawn
    ids: Tensor  # (P, T)
    segments: Tensor  # (P, T) 0: prefix, 1, 2, ...: conversations, -1: padding
    positions: Tensor  # (P, T)
    targets: Tensor  # (P, T) the next id if it belongs to an answer, else -100
    weights: Tensor  # (P, T) weight of each target in the loss
    things: Tensor  # (P, T) bits: bit i is set if the target is about thing i of the image
    options: Tensor  # (P, T) of multiple choice, see `number_options`
    owners: Tensor  # (P, N) index of the thing on each patch, or -1
    salience: Tensor  # (P, N) where attention should be: sums to 1
    asked: list[list[tuple[int, str, bool, bool]]]  # of each image and answer: row of its first
    # target, kind of question, whether it follows another in its conversation, needs detail


# (7, T): ids, segments, positions, targets, weights, things and options, as in Batch; `asked`
Packed = tuple[NDArray[np.int64], list[tuple[int, str, bool, bool]]]


@dataclass(frozen=True)
class Patches:
    """What is known of the patches of each image of a batch."""

    codes: list[NDArray[np.float32]] = field(
        default_factory=list
    )  # (N, N_CODES): its words, 0 or 1
    owners: list[NDArray[np.int64]] = field(default_factory=list)  # (N,): the thing on it, or -1
    # (N,): where attention should be, equal for all things, half of it on the patch in the middle
    salience: list[NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True)
class Mix:
    """Which questions an image gets. Short questions then fill the remaining rows."""

    choices: int = 2  # number of multiple-choice questions
    captions: float = 1.0  # probability of a caption
    follow: float = 0.35  # probability that a question follows the one before in a conversation


# Relative frequencies of the short questions; difficult kinds are more frequent.
_SHARES = {
    "digit": 1,
    "shape": 1,
    "colour": 1,
    "what": 1.5,
    "where": 1.5,
    "count": 4,
    "yes-no": 1.5,
    "ground": 0.5,
}
_CHANCES = np.array([*_SHARES.values()]) / sum(_SHARES.values())


def make_batch(
    rng: np.random.Generator, images: int, draw: bool, split: scenes.Split, mix: Mix
) -> Batch:
    """A random batch of scenes. draw=False leaves out the pixels."""
    packed, patches, drawn = [], Patches(), []
    for _ in range(images):
        things = scenes.make_things(rng, split)
        kinds = ["choice"] * mix.choices + [*rng.choice([*_SHARES], 28, p=_CHANCES)]
        if rng.random() < mix.captions:
            kinds.insert(int(rng.integers(4)), "caption")  # later ones may follow a question
        packed.append(pack(scenes.questions(things, rng, kinds), things, rng, mix.follow))
        add_patches(things, patches)
        if draw:
            drawn.append(np.asarray(scenes.draw(things, rng)))
    return collate(packed, patches, drawn)


def single_questions(rng: np.random.Generator, n: int, draw: bool, follow: bool = False) -> Batch:
    """n held-out images with one question each, the kinds in turn; follow: after another one."""
    packed: list[Packed] = []
    patches, drawn = Patches(), []
    kinds = [*scenes.KINDS]
    while len(packed) < n:
        things = scenes.make_things(rng, "held-out")
        wanted = [kinds[len(packed) % len(kinds)]]
        if follow:
            wanted.insert(0, str(rng.choice(["digit", "shape", "colour", "what", "where"])))
        examples = scenes.questions(things, rng, wanted)
        if len(examples) < len(wanted):
            continue
        rows = pack(examples, things, rng, float(follow))
        if len(rows[1]) < len(wanted):
            continue
        packed.append(rows)
        add_patches(things, patches)
        if draw:
            drawn.append(np.asarray(scenes.draw(things, rng)))
    return collate(packed, patches, drawn)


def pack(
    examples: Sequence[scenes.Example],
    things: Sequence[scenes.Thing],
    rng: np.random.Generator,
    follow: float,
) -> Packed:
    """Pack as many examples as fit into the lanes after one prefix."""
    prefix = prefix_ids()
    A = len(prefix)
    rows = np.full((7, A + LANES * LANE), -1, dtype=np.int64)
    rows[0], rows[2], rows[3], rows[4:] = PAD_ID, 0, -100, 0
    rows[0, :A], rows[1, :A], rows[2, :A] = prefix, 0, range(A)
    used, spoken = [0] * LANES, [0] * LANES  # rows of each lane, and of its last conversation
    asked: list[tuple[int, str, bool, bool]] = []
    segment = 0
    for example in examples:
        answer = [*encode(example.answer), EOS]
        follows = [lane for lane in range(LANES) if spoken[lane]] if rng.random() < follow else []
        opening = "USER: " if follows else "\n"
        ids = [*encode(f"{opening}{example.question} ASSISTANT:"), *answer[:-1]]
        fits = [lane for lane in follows or range(LANES) if used[lane] + len(ids) <= LANE]
        if not fits and follows:
            follows, ids = [], [*encode(f"\n{example.question} ASSISTANT:"), *answer[:-1]]
            fits = [lane for lane in range(LANES) if used[lane] + len(ids) <= LANE]
        if not fits:
            continue
        lane = fits[0]
        if not follows:
            segment += 1
            spoken[lane] = 0
        at = A + lane * LANE + used[lane]
        end = at + len(ids)
        rows[0, at:end] = ids
        rows[1, at:end] = rows[1, at - 1] if follows else segment
        rows[2, at:end] = np.arange(len(ids)) + A + spoken[lane]
        rows[3, end - len(answer) : end] = answer
        rows[4, end - len(answer) : end] = 1 if example.kind == "caption" else 4
        rows[5, end - len(answer) : end - 1] = things_of_answer(example, things, answer[:-1])
        if example.kind == "choice":
            rows[6, at:end] = number_options(ids, len(answer), 16 * len(asked), example.answer)
        small = any(t.is_small and t.name in example.about for t in things)
        asked.append((end - len(answer), example.kind, bool(follows), small))
        used[lane] += len(ids)
        spoken[lane] += len(ids)
    return rows, asked


def number_options(ids: Sequence[int], n_answer: int, first: int, right: str) -> NDArray[np.int64]:
    """(rows,) of a multiple-choice question: numbers from `first` on, for what belongs together.

    The letter of an option has an odd number, and its text the next one. The row that predicts the
    answer has minus the number of the right option's text, and other rows have 0.
    """
    found = np.zeros(len(ids), dtype=np.int64)
    opening, closing, newline = (tokenizer().piece_to_id(p) for p in ("▁(", ")", "<0x0A>"))
    now, inside = first - 1, False
    for i, token in enumerate(ids[: len(ids) - n_answer]):
        if token == opening:
            now, inside = now + 2, False
            found[i + 1] = now
            if tokenizer().id_to_piece(ids[i + 1]) == right:
                found[len(ids) - n_answer] = -now - 1
        elif token == closing:
            inside = True
        elif token == newline:
            inside = False
        elif inside:
            found[i] = now + 1
    return found


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
    packed: Sequence[Packed],
    patches: Patches,
    drawn: Sequence[NDArray[np.uint8]],
) -> Batch:
    """Stack the rows of `pack`, and what is known of each image's patches."""
    rows = torch.from_numpy(np.stack([rows for rows, _ in packed], axis=1))  # (7, P, T)
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) if drawn else None
    ids, segments, positions, targets, weights, about, options = rows
    coded, owned, salient = (
        torch.from_numpy(np.stack(x)) for x in (patches.codes, patches.owners, patches.salience)
    )
    return Batch(
        coded,
        pixels,
        ids,
        segments,
        positions,
        targets,
        weights.float(),
        about,
        options,
        owned,
        salient,
        [asked for _, asked in packed],
    )


# Patch codes: which words describe a patch.

NAMES = (*scenes.DIGITS, *scenes.SHAPES)
SIDES = ("top", "bottom", "left", "right", "center")
WORDS = (*NAMES, *scenes.COLOURS, *SIDES, "digit", "shape", *scenes.GROUNDS)
GROUND = WORDS.index("grey")  # the first of the grounds
CENTRE, EMPTY, CELL = len(WORDS), len(WORDS) + 1, len(WORDS) + 2
N_CODES = CELL + len(scenes.PLACES)
N_LABELS = len(NAMES) + len(scenes.COLOURS)


def add_patches(things: Sequence[scenes.Thing], patches: Patches) -> None:
    """Append what is known of one image's patches."""
    grid, size = VISION.grid, VISION.patch_size
    code = np.zeros((grid, grid, N_CODES), np.float32)
    owner = np.full((grid, grid), -1)
    salient = np.zeros((grid, grid), np.float32)
    code[..., EMPTY] = 1
    code[..., GROUND + [*scenes.GROUNDS].index(things[0].ground)] = 1
    middle = (np.arange(grid) + 0.5) * size
    for i, thing in enumerate(things):
        left, top, right, bottom = thing.box
        centre = int((top + bottom) / 2 / size), int((left + right) / 2 / size)
        inside = np.ix_((middle > top) & (middle < bottom), (middle > left) & (middle < right))
        words = [thing.name, thing.colour, *thing.place.split()]
        words.append("digit" if thing.is_digit else "shape")
        numbers = [*map(WORDS.index, words), CELL + scenes.PLACES.index(thing.place)]
        for where in (inside, centre):
            part = code[where]
            part[..., EMPTY] = 0
            part[..., numbers] = 1
            code[where] = part
            owner[where] = i
        code[centre][CENTRE] = 1
        salient[owner == i] += 0.5 / (owner == i).sum() / len(things)
        salient[centre] += 0.5 / len(things)
    patches.codes.append(code.reshape(-1, N_CODES))
    patches.owners.append(owner.reshape(-1))
    patches.salience.append(salient.reshape(-1))
