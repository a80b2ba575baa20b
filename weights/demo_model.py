"""The model in training: minillava's modules with auxiliary heads, its losses, and dropped tokens.

The losses, each of which can be switched off by its name (`Losses`):

answers    cross-entropy of the answers' tokens
patches    name and colour of each patch, and its features after the projector against a fixed code,
           the sum of the embeddings of the words that describe it
picture    from the class token: which names and colours the image contains
class_attention   the class token's attention in the second-last block, mean over heads, against the
           salience of the patches: equal for all things, half of it in a thing's middle
asked      the first head of blocks 1 to 9, from an answer's rows: to the things it is about
options    of multiple choice: the third head of blocks 1 to 3, from the text of an option to its
           letter, and of blocks 5 to 9, from the answer's row to the text of the right option
salience   the second head of blocks 0 to 9, from all text rows: against the same salience
drop       no loss: from a random layer on, image tokens are hidden; one of each thing stays
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillava.clip import Block as VisionBlock
from minillava.clip import CLIPVision
from minillava.llama import Block, Llama
from minillava.llava import Projector

from . import scenes
from .demo_data import (
    CENTRE,
    CONFIG,
    EMPTY,
    GROUND,
    LANE,
    N_CODES,
    N_LABELS,
    NAMES,
    TEXT,
    VISION,
    WORDS,
    Batch,
    prefix_ids,
    tokenizer,
)
from .export_demo import MEAN, STD

FEATURE = VISION.num_hidden_layers - 1  # hidden state -2 of the tower
EMBEDDING_STD = 0.25
N = VISION.num_patches
A = len(prefix_ids())  # rows of the prefix
FIRST = A - N  # row of the first image token
DEPTH = TEXT.num_hidden_layers
ASKED = range(1, 10)
SALIENCE = range(10)
LETTERS, CHOSEN = range(1, 4), range(5, 10)


@dataclass(frozen=True)
class Losses:
    """Weight of each loss; 0 leaves it out. drop: share of the images that lose tokens."""

    answers: float = 1.0
    patches: float = 0.1
    picture: float = 0.3
    class_attention: float = 0.1
    asked: float = 0.1
    salience: float = 0.1
    options: float = 0.3
    drop: float = 0.5

    def without(self, names: list[str]) -> Losses:
        """These losses without some. Raises ValueError for an unknown name."""
        known = [f.name for f in fields(self)]
        for name in names:
            if name not in known:
                raise ValueError(f"--without {name}: the losses are {', '.join(known)}")
        return Losses(**{f: 0.0 if f in names else getattr(self, f) for f in known})


@dataclass(frozen=True)
class Drop:
    """From which layer on image tokens are hidden."""

    until: Tensor  # (P, N) the first layer that does not see the token; DEPTH: all see it
    compact: Tensor  # (P,) bool: the rows that are left are renumbered


class Heads(nn.Module):
    """Classifiers on the vision tower's output that exist only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.name = nn.Linear(VISION.hidden_size, len(NAMES) + 1)
        self.colour = nn.Linear(VISION.hidden_size, len(scenes.COLOURS) + 1)
        self.picture = nn.Linear(VISION.hidden_size, N_LABELS)  # of the class token


class Demo(nn.Module):
    """The demo model with its training heads; parameters are initialised from `seed`."""

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
        with torch.no_grad():  # equal embedding and output head make it easy to copy a word
            self.llama.lm_head.weight.copy_(self.llama.embed_tokens.weight)
            for block in self.llama.blocks:  # equal queries and keys make it easy to find one
                attn = cast(Block, block).attn
                attn.k_proj.weight.copy_(attn.q_proj.weight)
        codes = code_vectors(self.llama.embed_tokens.weight.detach(), generator)
        self.register_buffer("codes", codes)
        self.codes: Tensor

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 3, S, S) uint8 -> hidden state of the feature layer (P, 1 + N, C), and the class
        token's attention in the block before it, mean over heads (P, N)."""
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        x = (pixels.float() / 255 - mean) / std
        with sdpa_kernel(SDPBackend.MATH):  # the fastest backend for sequences this short
            x = self.vision(x, (FEATURE - 1,))[FEATURE - 1]
            block = cast(VisionBlock, self.vision.blocks[FEATURE - 1])
            q, k, _ = block.attn.heads(block.norm1(x))  # (P, H, T, Dh)
            scores = q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5  # (P, H, 1, T)
            return block(x), scores.float().softmax(-1).mean((1, 2))[:, 1:]

    def decode(
        self, image: Tensor, batch: Batch, drop: Drop | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run the decoder on image features (P, N, D) and the batch's tokens.

        Returns the last hidden states (P, T, D) and, for each block, the attention of the text
        rows to the patches (P, H, T - A, N) and to the rows of their lane (P, H, T - A, LANE).
        """
        P, T = batch.ids.shape
        x = self.llama.embed_tokens(batch.ids)  # (P, T, D)
        x = torch.cat((x[:, :FIRST], image.to(x.dtype), x[:, A:]), dim=1)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        masks = Masks(batch.segments, dtype)
        rope = self.llama.rope(batch.positions.flatten(), dtype)
        gone: Tensor | None = None
        attention: list[Tensor] = []
        near: list[Tensor] = []
        x = x.flatten(0, 1)
        for i, block in enumerate(self.llama.blocks):
            if drop is not None and bool((drop.until == i).any()):
                hidden = drop.until <= i  # (P, N)
                gone = torch.zeros(P, A, dtype=dtype)
                gone[:, FIRST:].masked_fill_(hidden, -1e9)
                lost = (hidden & drop.compact[:, None]).cumsum(1)  # (P, N) rows before each
                lost = F.pad(torch.cat((lost, lost[:, -1:].expand(P, T - A)), 1), (FIRST, 0))
                rope = self.llama.rope((batch.positions - lost).flatten(), dtype)

            def attend(q: Tensor, k: Tensor, v: Tensor, gone: Tensor | None = gone) -> Tensor:
                y, to_image, to_lane = masks.attend(q, k, v, gone)
                attention.append(to_image)
                near.append(to_lane)
                return y

            x = block(x, rope, attend)
        return x.view(P, T, -1), attention, near


class Masks:
    """Attention of the prefix to itself, and of each lane to the prefix and itself."""

    def __init__(self, segments: Tensor, dtype: torch.dtype) -> None:
        self.P, self.T = segments.shape
        before = torch.ones(A, A, dtype=torch.bool).tril()
        self.prefix = torch.zeros(A, A, dtype=dtype).masked_fill(~before, -1e9)
        self.lanes = (self.T - A) // LANE
        lanes = segments[:, A:].reshape(self.P, self.lanes, LANE)
        seen = lanes[..., :, None] == lanes[..., None, :]  # (P, lanes, L, L)
        seen &= torch.ones(LANE, LANE, dtype=torch.bool).tril()
        self.own = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e9)[:, None]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gone: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (P * T, H, Dh); gone (P, A) is added to the scores of the prefix's columns.

        Not SDPA: with a mask, on a CPU, training through it takes twice as long.
        """
        P, T, Dh = self.P, self.T, TEXT.head_dim
        q, k, v = (y.view(P, T, -1, Dh).transpose(1, 2) for y in (q * Dh**-0.5, k, v))
        H = q.shape[1]
        first = q[:, :, :A] @ k[:, :, :A].mT + self.prefix  # (P, H, A, A)
        far = q[:, :, A:] @ k[:, :, :A].mT  # (P, H, T - A, A)
        if gone is not None:
            first, far = first + gone[:, None, None], far + gone[:, None, None]
        lanes = [y[:, :, A:].reshape(P, H, self.lanes, LANE, Dh) for y in (q, k, v)]
        near = lanes[0] @ lanes[1].mT + self.own  # (P, H, lanes, L, L)
        both = torch.cat((far, near.flatten(2, 3)), dim=-1).softmax(-1)  # (P, H, T - A, A + L)
        far, near = both.split((A, LANE), dim=-1)
        y = far @ v[:, :, :A] + (near.unflatten(2, (self.lanes, LANE)) @ lanes[2]).flatten(2, 3)
        y = torch.cat((first.softmax(-1) @ v[:, :, :A], y), dim=2)  # (P, H, T, Dh)
        return y.transpose(1, 2).reshape(P * T, H, Dh), far[..., FIRST:], near


def code_vectors(embedding: Tensor, generator: torch.Generator) -> Tensor:
    """(N_CODES, D): the embeddings of the words, and random vectors for the other codes."""
    ids = [tokenizer().encode(word) for word in WORDS]
    assert all(len(i) == 1 for i in ids), "every word in WORDS must be one piece"
    rest = torch.randn(N_CODES - len(WORDS), embedding.shape[1], generator=generator)
    return torch.cat((embedding[[i[0] for i in ids]], EMBEDDING_STD * rest))


def random_drop(batch: Batch, share: float, generator: torch.Generator) -> Drop:
    """Hide tokens of a share of the images from a random layer on, and of half of these more
    tokens from a second layer on. At least one patch of each thing stays (see `thin`)."""
    P = len(batch.ids)
    layer = torch.randint(0, DEPTH, (P, 2), generator=generator).sort(1).values
    layer[:, 0] *= torch.rand(P, generator=generator) >= 0.3
    left = torch.ones(P, N, dtype=torch.bool)
    until = torch.full((P, N), DEPTH)
    for stage, chance in enumerate((share, 0.5)):
        left, before = thin(batch, left, generator), left
        layer[torch.rand(P, generator=generator) >= chance, stage:] = DEPTH
        until = until.where(left | ~before, layer[:, stage : stage + 1])
    return Drop(until, torch.rand(P, generator=generator) < 0.5)


def thin(batch: Batch, left: Tensor, generator: torch.Generator) -> Tensor:
    """Some of the image tokens that are left (P, N): of each thing at least one, mostly the patch
    in its middle; in one of four images no background."""
    P = len(left)
    chance = torch.rand(P, 2, generator=generator)  # to stay: of background and of things
    chance[:, 0] = (chance[:, 0] - 0.25).clamp(min=0) / 0.75
    owned = batch.owners >= 0
    draw = torch.rand(P, N, generator=generator)
    stay = left & (draw < torch.where(owned, 0.15 + 0.85 * chance[:, 1:], chance[:, :1]))
    middle = (torch.rand(P, 1, generator=generator) < 0.6) * batch.codes[..., CENTRE]
    rank = draw - 2 * middle  # of a thing's patches the lowest stays
    for thing in range(int(batch.owners.max()) + 1):
        mine = (batch.owners == thing) & left
        first = rank.masked_fill(~mine, 9).argmin(1)  # (P,)
        stay[torch.arange(P), first] |= mine.any(1)
    return stay


def patch_loss(model: Demo, state: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Loss of the patches' features, and figures for the log. state: (P, 1 + N, C).

    Patches of things weigh as much as those of the background together, and the middle ones most.
    """
    codes, patches = batch.codes, state[:, 1:]
    centre, empty = codes[..., CENTRE] > 0, codes[..., EMPTY]
    covered = empty == 0
    weight = covered / covered.sum() + centre / centre.sum() + 0.5 * empty / empty.sum()
    loss = state.new_zeros((), dtype=torch.float32)
    figures = {}
    split = (len(NAMES), N_LABELS)
    for what, part in (
        ("name", codes[..., : split[0]]),
        ("colour", codes[..., split[0] : split[1]]),
    ):
        label = torch.cat((part, empty[..., None]), dim=-1).argmax(-1)  # (P, N)
        logits = getattr(model.heads, what)(patches).float()
        each = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        loss = loss + (each.view_as(weight) * weight).sum()
        right = logits.argmax(-1) == label
        figures[what] = float(right[centre].float().mean())
        digits = centre & (label < len(scenes.DIGITS))
        if what == "name" and digits.any():
            figures["digit"] = float(right[digits].float().mean())
            figures["shape"] = float(right[centre & ~digits].float().mean())
    target = codes @ model.codes
    apart = (model.projector(patches).float() - target).square().mean(-1) / target.square().mean()
    loss = loss + 2 * (apart * weight).sum()
    # the class token, which some methods give to the decoder, reads as background
    plain = torch.zeros(len(codes), N_CODES)
    plain[:, EMPTY] = 1
    plain[:, GROUND : GROUND + len(scenes.GROUNDS)] = codes[
        :, 0, GROUND : GROUND + len(scenes.GROUNDS)
    ]
    plain = plain @ model.codes
    loss = (
        loss
        + (model.projector(state[:, 0]).float() - plain).square().mean() / target.square().mean()
    )
    figures["apart"] = float(apart[covered].mean().detach())
    return loss, figures


def picture_loss(model: Demo, state: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy of the names and colours in the image, from the class token."""
    present = batch.codes[..., :N_LABELS].amax(1)  # (P, labels)
    logits = model.heads.picture(state[:, 0]).float()
    return F.binary_cross_entropy_with_logits(logits, present)


def salience_loss(attention: Tensor, salience: Tensor) -> Tensor:
    """Cross-entropy of attention (..., N) against the salience of the patches (P, N)."""
    return -(salience * (attention.float() + 1e-4).log()).sum(-1).mean()


def answer_loss(
    model: Demo, image: Tensor, batch: Batch, drop: Drop | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of the answers, of the attention to what is asked, of the salience of attention, and of
    the attention to options.

    image: (P, N, D). The second is -log of the attention that a first head pays to the patches that
    the answer's token is about, averaged over blocks and tokens.
    """
    hidden, attention, near = model.decode(image, batch, drop)
    asked = batch.targets >= 0
    logits = model.llama.logits(hidden[asked])
    each = F.cross_entropy(logits, batch.targets[asked], reduction="none")
    weight = batch.weights[asked]
    bits = 1 << batch.owners.clamp(min=0)
    things = batch.things[:, A:]
    meant = ((things[:, :, None] & bits[:, None]) > 0) & (batch.owners >= 0)[:, None]
    rows = things > 0
    meant = meant[rows]
    missed = [-(attention[i][:, 0][rows].float() * meant).sum(-1).add(1e-4).log() for i in ASKED]
    share = batch.weights[:, A:][rows]
    looked = (torch.stack(missed).mean(0) * share).sum() / share.sum()
    # salience: rows of text, and images that still show everything (other columns are hidden)
    text = batch.segments[:, A:] > 0  # (P, T - A)
    salience = batch.salience[:, None].expand(-1, text.shape[1], -1)
    found = []
    for i in SALIENCE:
        seen = text if drop is None else text & (drop.until > i).all(1)[:, None]
        if seen.any():
            found.append(salience_loss(attention[i][:, 1][seen], salience[seen]))
    salient = torch.stack(found).mean() if found else looked.new_zeros(())
    return (each * weight).sum() / weight.sum(), looked, salient, option_loss(near, batch)


def option_loss(near: list[Tensor], batch: Batch) -> Tensor:
    """-log of the attention that a third head pays from options to their letters in early blocks,
    and from the answer's row to the right option in later ones. near: (P, H, T - A, LANE) each."""
    rows = batch.options[:, A:]  # (P, T - A)
    columns = rows.unflatten(1, (-1, LANE)).repeat_interleave(LANE, dim=1)  # (P, T - A, LANE)
    total = near[0].new_zeros((), dtype=torch.float32)
    for blocks, wanted, number in (
        (LETTERS, (rows > 0) & (rows % 2 == 0), rows - 1),
        (CHOSEN, rows < 0, -rows),
    ):
        if wanted.any():
            meant = columns[wanted] == number[wanted][:, None]
            seen = torch.stack([near[i][:, 2][wanted] for i in blocks]).float()
            total = total - ((seen * meant).sum(-1) + 1e-4).log().mean()
    return total


def noisy_features(model: Demo, codes: Tensor, generator: torch.Generator) -> Tensor:
    """Image features (P, N, D) from codes (P, N, N_CODES), as a good vision tower would give them.

    Noise is added, and 10 % of the patches lose their words, never the one in a thing's middle.
    """
    P, n, _ = codes.shape
    blurred = codes.clone()
    lost = (torch.rand(P, n, generator=generator) < 0.10) & (codes[..., CENTRE] == 0)
    blurred[..., :GROUND] *= ~lost[..., None]
    clean = blurred @ model.codes
    return clean + 0.3 * EMBEDDING_STD * torch.randn(clean.shape, generator=generator)
