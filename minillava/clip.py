"""CLIP's vision transformer: pixels -> the hidden states of the layers that are asked for.

An image of 336 x 336 pixels is cut into 24 x 24 patches of 14 x 14 pixels. Each becomes a vector of
width C, and a class token is put before them: a sequence of 1 + 576 = 577 rows, which all attend
to each other. Hidden state 0 enters block 0, hidden state i leaves block i - 1.

LLaVA-1.5 reads the 576 patch rows of hidden state -2 (23 of 24), so the last block need not run.
Same as Hugging Face's CLIPVisionModel: patch convolution without bias, pre-LN blocks, quick-GELU.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VisionConfig


class Attention(nn.Module):
    """Self-attention without a mask: every patch sees the whole image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x))  # (B, H, T, Dh)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows (B, T, C): (B, H, T, Dh) each."""
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in (q, k, v))
        return q, k, v


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick-GELU, CLIP's approximation of GELU


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (B, T, C)
        return x + self.mlp(self.norm2(x))  # (B, T, C)


class CLIPVision(nn.Module):
    """The vision tower. Only pruning methods that ask for them use the last block and norm_post."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.config = config
        self.class_embedding = nn.Parameter(torch.zeros(C))
        self.patch_embedding = nn.Conv2d(3, C, P, stride=P, bias=False)
        # One learned vector per place: the class token, then the grid row by row. Unlike RoPE in
        # the decoder, it fixes the grid, so every image must have the size CLIP was trained on.
        self.position_embedding = nn.Embedding(1 + config.num_patches, C)
        self.norm_pre = nn.LayerNorm(C, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm_post = nn.LayerNorm(C, config.layer_norm_eps)

    def forward(self, pixels: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """Normalised pixels (B, 3, S, S) -> {i: hidden state i (B, 1 + N, C)} for i in `layers`.

        Row 0 is the class token. No block beyond the highest number asked for is run.
        """
        grid = self.patch_embedding(pixels)  # (B, C, 24, 24)
        patches = grid.flatten(2).transpose(1, 2)  # (B, N, C), row by row
        class_token = self.class_embedding.expand(len(pixels), 1, -1)  # (B, 1, C)
        x = torch.cat((class_token, patches), dim=1)  # (B, 1 + N, C)
        x = self.norm_pre(x + self.position_embedding.weight)

        states = {0: x} if 0 in layers else {}
        for i in range(max(layers, default=0)):
            x = self.blocks[i](x)
            if i + 1 in layers:
                states[i + 1] = x
        return states

    def heads(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, H, Dh) of one block, from the hidden state (B, T, C) that enters
        it. Pruning methods compute attention weights and similarities from them."""
        layer = cast(Block, self.blocks[block])
        x, shape = layer.norm1(hidden), (layer.attn.n_heads, -1)
        return layer.attn.q_proj(x).unflatten(-1, shape), layer.attn.k_proj(x).unflatten(-1, shape)
