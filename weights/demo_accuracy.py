"""A quick look at a model in training: teacher-forced accuracy under a few plans.

The plans are imitated by hiding columns, which is what dropping rows amounts to. An answer is right
if each of its tokens is the most likely one. The real measurement is eval.conditions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.pruning.divprune import choose_farthest

from .demo_data import LANE, Batch, Mix, make_batch, single_questions
from .demo_model import DEPTH, A, Demo, Drop, N, noisy_features, patch_loss, salience_loss


@lru_cache
def held_out(n: int, draw: bool, follow: bool) -> Batch:
    """n single questions, cut to one lane."""
    batch = single_questions(np.random.default_rng(99), n, draw, follow)
    names = ("ids", "segments", "positions", "targets", "weights", "things", "options")
    return replace(batch, **{name: getattr(batch, name)[:, : A + LANE] for name in names})


@torch.no_grad()
def quick_accuracy(model: Demo, n: int, draw: bool) -> list[str]:
    """Lines for the log: accuracy by kind, then without captions under each plan."""
    batch = held_out(n, draw, False)
    image, seen = features(model, batch, draw)
    hidden, attention, _ = model.decode(image, batch)
    right = correct(model, hidden, batch)
    kinds = [asked[-1][1] for asked in batch.asked]
    lines = [by_kind(right, kinds)]
    newest = torch.tensor([asked[-1][0] for asked in batch.asked]) - A  # row of the last question
    fastv = attention[1][torch.arange(n), :, newest].float().mean(1)  # (n, N)
    plain = torch.tensor([kind != "caption" for kind in kinds])
    small = torch.tensor([asked[-1][3] for asked in batch.asked]) & plain
    thing = batch.owners >= 0
    found = (fastv * thing).sum(1) / fastv.sum(1)
    about = 1 << batch.owners.clamp(min=0)
    meant = (batch.things[torch.arange(n), newest + A][:, None] & about) * thing > 0
    hit = (fastv * meant).sum(1) / fastv.sum(1)
    lines.append(
        f"attention in block 1: {float(found[plain].mean()):.3f} on things, "
        f"{float(hit[meant.any(1)].mean()):.3f} on what is asked"
    )
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(n, N, generator=generator)
    words = model.llama.embed_tokens(batch.ids[:, A:])
    alike = F.normalize(image.float(), dim=-1) @ F.normalize(words.float(), dim=-1).mT
    alike = alike.masked_fill(batch.segments[:, None, A:] < 1, -2).amax(-1)
    plans = {
        "fastv r=.5": (fastv, 72, 2),
        "random 84": (noise, 84, 0),
        "fastv r=.75": (fastv, 36, 2),
        "random 54": (noise, 54, 0),
        "fastv r=.89": (fastv, 16, 2),
        "simignore 36": (alike, 36, 0),
        "random 36": (noise, 36, 0),
        "random 16": (noise, 16, 0),
    }
    if seen is not None:
        plans["class 36"] = (seen, 36, 0)
        plans["class 16"] = (seen, 16, 0)
        plans["divprune 16"] = (farthest(image, 16), 16, 0)
    parts = []
    for name, (score, keep, layer) in plans.items():
        drop = hide(score, keep, layer)
        ok = correct(model, model.decode(image, batch, drop)[0], batch)
        every, detail, long = (float(ok[part].float().mean()) for part in (plain, small, ~plain))
        parts.append(f"{name} {every:.3f} ({detail:.2f} small, {long:.2f} captions)")
    lines.append(f"none {float(right[plain].float().mean()):.3f}; " + "; ".join(parts))
    later = held_out(n, draw, True)
    image, _ = features(model, later, draw)
    follow = correct(model, model.decode(image, later)[0], later)
    lines.append("follow-up: " + by_kind(follow, [asked[-1][1] for asked in later.asked]))
    return lines


def features(model: Demo, batch: Batch, draw: bool) -> tuple[Tensor, Tensor | None]:
    """Image features (P, N, D), and the class token's attention (P, N) if images are drawn."""
    if not draw:
        return noisy_features(model, batch.codes, torch.Generator().manual_seed(1)), None
    assert batch.pixels is not None
    state, seen = model.encode_images(batch.pixels)
    return model.projector(state[:, 1:]), seen


def hide(score: Tensor, keep: int, layer: int) -> Drop:
    """Keep the image tokens with the highest scores (P, N) from a layer on."""
    until = torch.full(score.shape, layer)
    until.scatter_(1, score.topk(keep, dim=1).indices, DEPTH)
    return Drop(until, torch.full((len(score),), layer == 0))


def farthest(image: Tensor, keep: int) -> Tensor:
    """DivPrune's choice as scores (P, N)."""
    x = F.normalize(image.float(), dim=-1)
    scores = torch.zeros(image.shape[:2])
    for p, distance in enumerate(1 - x @ x.mT):
        scores[p, choose_farthest(distance, keep).order] = 1
    return scores


def correct(model: Demo, hidden: Tensor, batch: Batch) -> Tensor:
    """Which of the last answers are right: (P,) bool."""
    last = torch.tensor([asked[-1][0] for asked in batch.asked])
    rows = (batch.targets >= 0) & (torch.arange(batch.ids.shape[1]) >= last[:, None])
    best = torch.full_like(batch.targets, -1)
    best[rows] = model.llama.logits(hidden[rows]).argmax(-1)
    return ~((best != batch.targets) & rows).any(1)


def by_kind(right: Tensor, kinds: list[str]) -> str:
    """Accuracy of each kind, and of all but captions."""
    found: dict[str, list[float]] = defaultdict(list)
    for ok, kind in zip(right.tolist(), kinds, strict=True):
        found[kind].append(float(ok))
        if kind != "caption":
            found["all"].append(float(ok))
    return " ".join(f"{kind} {np.mean(values):.3f}" for kind, values in found.items())


@torch.no_grad()
def tower_figures(model: Demo) -> str:
    """Accuracy of the tower's patches on held-out images."""
    batch = make_batch(np.random.default_rng(99), 150, True, "held-out", Mix())
    assert batch.pixels is not None
    state, seen = model.encode_images(batch.pixels)
    _, figures = patch_loss(model, state, batch)
    figures["class"] = float(salience_loss(seen, batch.salience))
    thing = batch.owners >= 0
    figures["class on things"] = float(((seen * thing).sum(1) / seen.sum(1)).mean())
    return " ".join(f"{key} {value:.3f}" for key, value in figures.items())
