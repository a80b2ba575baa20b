"""What the engine hands to a method, for hidden states and features that a test makes itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from minillava.config import Config, TextConfig, VisionConfig
from minillava.engine import begin_sample
from minillava.llava import LLaVA
from minillava.pruning.base import Context, Method, Plan
from minillava.sample import Prompt

BOS, IMAGE, VOCABULARY = 1, 6, 8
TEXT = TextConfig(
    hidden_size=40,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=VOCABULARY,
)


def make_model(grid: int, depth: int = 2) -> LLaVA:
    """A small LLaVA with grid * grid patches of an image and `depth` blocks in its tower."""
    vision = VisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=depth,
        num_attention_heads=3,
        image_size=2 * grid,
        patch_size=2,
    )
    return LLaVA(Config(vision, TEXT, IMAGE)).requires_grad_(False)


def make_context(
    model: LLaVA,
    method: Method,
    hidden: Mapping[int, Tensor],
    *,
    features: Tensor | None = None,
    patches: Tensor | None = None,
    n: int | None = None,
) -> Context:
    """The context of the first act of a method on a prompt with text around its only image.

    hidden: states of the vision tower, (1, 1 + N, C) by number. features (N, D): the image's rows;
    None: those that LLaVA reads from `hidden`. patches (N,): their numbers of patches, if they are
    not 0..N-1. n: only the first n rows are candidates.
    """
    N = model.config.vision.num_patches
    ids = torch.tensor([BOS, 3, *[model.config.image_token_id] * N, 4, 5])
    prompt = Prompt(ids, images=(0,), starts=(2,), focus=None, length=len(ids))
    sample = begin_sample(model, prompt, dict(hidden), seed=0, memory={})
    candidates = sample.rows.of_image(0)
    if features is not None:
        sample.x = features.new_zeros(len(ids), features.shape[1])
        sample.x[candidates[: len(features)]] = features
    if patches is not None:
        patch = sample.rows.patch.index_copy(0, candidates, patches)
        sample.rows = replace(sample.rows, patch=patch)
    return Context(model, sample, Plan((method,)).steps[0], [0], candidates[:n])
