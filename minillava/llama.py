"""The Llama decoder: its weights, and what one block computes on packed rows.

The rows of all samples stand one after another in one (R, D) tensor, without padding: RMSNorm,
projections and MLP work on single rows and need no more. Attention is the exception, so a block is
handed an `attend` function that knows which rows belong together (LayerAttention in sample.py).
A row's position is data beside it, never its index.

Follows Hugging Face's LlamaForCausalLM; as there, RMSNorm and the rotary angles are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextConfig
from .rows import on_device

Rope = tuple[Tensor, Tensor]  # cosine and signed sine, each (R, 1, Dh)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (R, H, Dh), k, v (R, Hkv, Dh) -> as q


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn (R, H, Dh): the halves x, y of a head become x cos - y sin and y cos + x sin."""
    cos, sin = rope
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sin).add_(x * cos)


def share_input(x: Tensor, *layers: nn.Module) -> Tensor:
    """x for all these layers: integer layers round it once together, instead of once each."""
    prepare = getattr(layers[0], "prepare", None)
    return prepare(x) if prepare and len({*map(type, layers)}) == 1 else x


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        self.head_dim = Dh
        self.q_proj = nn.Linear(D, config.num_attention_heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * Dh, D, bias=False)

    def heads(self, proj: nn.Module, x: Tensor) -> Tensor:
        """Rows (R, D) through one of the projections: (R, H | Hkv, Dh), not yet rotated."""
        return proj(x).view(x.shape[0], -1, self.head_dim)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        x = share_input(x, self.q_proj, self.k_proj, self.v_proj)
        q, k = (rotate(self.heads(proj, x), rope) for proj in (self.q_proj, self.k_proj))
        v = self.heads(self.v_proj, x)  # (R, Hkv, Dh)
        return self.o_proj(attend(q, k, v).flatten(1))  # (R, D)


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = share_input(x, self.gate_proj, self.up_proj)
        # multiplied in place: for a long prompt each of these is tens of megabytes
        return self.down_proj(F.silu(self.gate_proj(x)).mul_(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, attend)  # (R, D)
        return x + self.mlp(self.norm2(x))  # (R, D)


class Llama(nn.Module):
    """The decoder's weights. The loop over its blocks is in engine.py: pruning is part of it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config  # of this process: parallel.py lowers the numbers of heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # parallel.py replaces both: the heads of all processes, and the first process's choice
        self.whole_heads, self.agree = nn.Identity(), nn.Identity()

    def rope(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rope:
        """Rotation of each row by its position (R,): cosine and signed sine, each (R, 1, Dh).

        Numbers i and i + Dh / 2 of a head are a point, turned by position * theta^(-2i / Dh). The
        product of a rotated query and a rotated key then depends on the difference of their
        positions alone: gaps that pruning leaves change nothing between the rows that stay.
        """
        Dh, positions = self.config.head_dim, on_device(positions, self.norm.weight)
        exponent = torch.arange(0, Dh, 2, device=positions.device).float() / Dh
        frequency = 1.0 / (self.config.rope_theta**exponent) / self.config.rope_factor  # (Dh / 2,)
        angle = (positions.float()[:, None] * frequency)[:, None]  # (R, 1, Dh / 2), in float32
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def logits(self, x: Tensor) -> Tensor:
        """Rows after the last block (R, D) -> float32 logits (R, V)."""
        return self.lm_head(self.norm(x)).float()
