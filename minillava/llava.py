"""LLaVA-1.5: CLIP's vision tower, a projector and a Llama decoder, as one module.

    image (3, 336, 336) -> vision tower -> (577, 1024), hidden state -2
                        -> without the class token (576, 1024) -> projector -> (576, 4096)
    prompt ids (T,)     -> embeddings (T, 4096), the image tokens in place of the 576 placeholders
                        -> 32 decoder layers -> logits (V,) of the next token

This file holds the weights and the parts that work alone; engine.py runs and prunes a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CLIPVision
from .config import Config
from .llama import Block, Llama
from .rows import on_device

if TYPE_CHECKING:
    from .processing.generation_rules import GenerationRules
    from .processing.tokenizer import Tokenizer

IMAGES_AT_ONCE = 8  # images in the vision tower at one time
Encoded = dict[int, Tensor]  # the tower's hidden states by number, (images, 1 + N, C) each


class Projector(nn.Module):
    """Two linear layers with GELU between them: the tower's width C -> the decoder's width D."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, D)."""
        return self.linear_2(F.gelu(self.linear_1(x)))


class LLaVA(nn.Module):
    """The whole model.

    dtype is that of its arithmetic; weights may be stored in a smaller one. tokenizer turns ids
    into text for stop strings and for pruning methods that read the question as text; without one
    these two are refused. rules: what the checkpoint says about choosing tokens, if anything.
    compiled: a faster engine.decode that load() sets, if there is one.
    """

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype = torch.float32,
        tokenizer: Tokenizer | None = None,
        rules: GenerationRules | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.tokenizer, self.rules = tokenizer, rules
        self.compiled: Callable[[LLaVA, Tensor, Any], Tensor] | None = None
        self.vision = CLIPVision(config.vision)
        self.projector = Projector(config)
        self.llama = Llama(config.text)

    @property
    def device(self) -> torch.device:
        return self.llama.embed_tokens.weight.device

    @property
    def feature_layer(self) -> int:
        """Number of the vision tower's hidden state that LLaVA reads, counted from 0.

        LLaVA-1.5 reads hidden state -2: of the 25 states 0..24 of 24 blocks that is state 23, the
        output of the second-last block. The last block was trained to sum the image up in the class
        token; its patches say less about their own place.
        """
        layer = self.config.vision_feature_layer
        return layer if layer >= 0 else layer + self.config.vision.num_hidden_layers + 1

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (T, D) of ids (T,)."""
        table = self.llama.embed_tokens
        return table(on_device(ids, table.weight)).to(self.dtype)

    def encode(self, pixels: Tensor, layers: Collection[int]) -> Encoded:
        """Run the vision tower on pixels (images, 3, S, S) and keep these hidden states."""
        pixels = pixels.to(self.device, self.dtype)
        parts = [self.vision(part, layers) for part in pixels.split(IMAGES_AT_ONCE)]
        return {i: torch.cat([part[i] for part in parts]) for i in sorted(layers)}

    def block(self, layer: int) -> Block:
        """Decoder layer `layer`, counted from 0."""
        return cast(Block, self.llama.blocks[layer])
