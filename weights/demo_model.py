"""The demo model in training: minillava's modules with auxiliary heads, the losses, and Muon."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillava.clip import CLIPVision
from minillava.llama import Block, Llama
from minillava.llava import Projector

from . import scenes
from .demo_data import (
    CENTRE,
    CONFIG,
    EMPTY,
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
GUIDED = (2, 3, 4, 5)  # blocks whose first head is trained to attend to what an answer is about


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

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(P, 3, S, S) uint8 -> hidden state of the feature layer (P, 1 + N, C)."""
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        x = (pixels.float() / 255 - mean) / std
        with sdpa_kernel(SDPBackend.MATH):  # the fastest backend for sequences this short
            return self.vision(x, (FEATURE,))[FEATURE]

    def decode(self, image: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Run the decoder on image features (P, N, D) and the batch's tokens.

        Returns the last hidden states (P, T, D) and, for each of the GUIDED blocks, the attention
        (P, T, N) of its first head to the patches.
        """
        P, T = batch.ids.shape
        x = self.llama.embed_tokens(batch.ids)  # (P, T, D)
        a = len(prefix_ids()) - VISION.num_patches
        x = torch.cat((x[:, :a], image.to(x.dtype), x[:, a + VISION.num_patches :]), dim=1)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        mask = _attention_mask(batch.segments, dtype)  # (P, 1, T, T)
        attention: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # not SDPA: with a mask, on a CPU, training through it takes twice as long
            q, k, v = (y.view(P, T, -1, TEXT.head_dim).transpose(1, 2) for y in (q, k, v))
            scores = (q * TEXT.head_dim**-0.5) @ k.mT + mask  # (P, H, T, T)
            weights = scores.softmax(-1)
            attention.append(weights[:, 0, :, a : a + VISION.num_patches])
            y = weights @ v  # (P, H, T, Dh)
            return y.transpose(1, 2).reshape(P * T, -1, TEXT.head_dim)

        rope = self.llama.rope(batch.positions.flatten(), dtype)
        x = x.flatten(0, 1)
        for block in self.llama.blocks:
            x = block(x, rope, attend)
        return x.view(P, T, -1), [attention[i] for i in GUIDED]


def code_vectors(embedding: Tensor, generator: torch.Generator) -> Tensor:
    """(N_CODES, D): the embeddings of the words, and random vectors for the other codes."""
    ids = [tokenizer().encode(word) for word in WORDS]
    assert all(len(i) == 1 for i in ids), "every word in WORDS must be one piece"
    rest = torch.randn(N_CODES - len(WORDS), embedding.shape[1], generator=generator)
    return torch.cat((embedding[[i[0] for i in ids]], EMBEDDING_STD * rest))


def _attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention mask (P, 1, T, T) of segments (P, T): 0 if visible, else -1e9.

    A token sees the prefix and its own segment, up to itself.
    """
    row, column = segments[:, :, None], segments[:, None, :]
    before = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    seen = ((column == 0) | (row == column)) & before
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e9)[:, None]


def patch_loss(model: Demo, state: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss of the vision tower and the projector, and figures for the log.

    state (P, 1 + N, C) is the hidden state of the feature layer. The heads classify the name and
    the colour on each patch, the projector regresses the patch's code (P, N, N_CODES) as a sum of
    code vectors, and the class token tells which names and colours the image contains.
    """
    patches = state[:, 1:]
    split = len(NAMES), len(NAMES) + len(scenes.COLOURS)
    empty = codes[..., EMPTY]
    weight = 1 - 0.7 * empty
    weight = weight / weight.sum()
    loss = torch.zeros(())
    figures = {}
    covered = empty == 0
    centre = codes[..., CENTRE] == 1
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
    """Cross-entropy of the answers, and the loss of the guided heads' attention.

    image: (P, N, D). The second loss is -log of the attention that a guided head pays to the
    patches that the answer's token is about, averaged over heads and tokens.
    """
    hidden, attention = model.decode(image, batch)
    asked = batch.targets >= 0
    logits = model.llama.logits(hidden[asked])
    each = F.cross_entropy(logits, batch.targets[asked], reduction="none")
    weight = batch.weights[asked]
    bits = 1 << batch.owners.clamp(min=0)
    meant = ((batch.things[:, :, None] & bits[:, None]) > 0) & (batch.owners >= 0)[:, None]
    rows = batch.things > 0
    missed = [-(a[rows].float() * meant[rows]).sum(-1).add(1e-4).log() for a in attention]
    share = batch.weights[rows] / batch.weights[rows].sum()
    return (each * weight).sum() / weight.sum(), (torch.stack(missed).mean(0) * share).sum()


def noisy_features(model: Demo, codes: Tensor, generator: torch.Generator) -> Tensor:
    """Image features (P, N, D) from codes (P, N, N_CODES), as a good vision tower would give them.

    Noise is added, and 15 % of the patches lose their words.
    """
    P, N, _ = codes.shape
    blurred = codes.clone()
    lost = torch.rand(P, N, generator=generator) < 0.15
    blurred[..., :CENTRE] *= ~lost[..., None]
    clean = blurred @ model.codes
    return clean + 0.3 * EMBEDDING_STD * torch.randn(clean.shape, generator=generator)


# Optimisation.


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update (Muon, Jordan et al. 2024).

    Matrices of the same shape are orthogonalised in one batch.
    """

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
                    assert p.grad is not None
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-scale)


def orthogonal(x: Tensor) -> Tensor:
    """Bring the singular values of matrices (K, m, n) near one, by five Newton-Schulz steps."""
    wide = x.shape[1] <= x.shape[2]
    y = (x if wide else x.mT).bfloat16()
    y = y / (y.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y if wide else y.mT).to(x.dtype)
