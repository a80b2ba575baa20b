"""The vision tower equals open_clip's, a second reference, with the same random weights."""

from __future__ import annotations

import pytest
import torch

from minillava.clip import CLIPVision
from minillava.config import VisionConfig

CONFIG = VisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=56,
)


@pytest.fixture(scope="module")
def ours() -> CLIPVision:
    torch.manual_seed(0)
    tower = CLIPVision(CONFIG).eval().requires_grad_(False)
    for p in tower.parameters():
        p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    for name, p in tower.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.add_(1.0)
    return tower


@torch.no_grad()
def make_open_clip(ours: CLIPVision) -> torch.nn.Module:
    """open_clip's tower with the weights of ours; it keeps q, k and v in one matrix."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    tower = VisionTransformer(
        image_size=CONFIG.image_size,
        patch_size=CONFIG.patch_size,
        width=CONFIG.hidden_size,
        layers=CONFIG.num_hidden_layers,
        heads=CONFIG.num_attention_heads,
        mlp_ratio=CONFIG.intermediate_size / CONFIG.hidden_size,
        act_layer=QuickGELU,
        output_dim=8,
    ).eval()
    state = {
        "class_embedding": ours.class_embedding,
        "positional_embedding": ours.position_embedding.weight,
        "conv1.weight": ours.patch_embedding.weight,
        "proj": tower.proj,
    }
    for name, norm in (("ln_pre", ours.norm_pre), ("ln_post", ours.norm_post)):
        state |= {f"{name}.{k}": v for k, v in norm.state_dict().items()}
    for i, block in enumerate(ours.blocks):
        to = f"transformer.resblocks.{i}"
        parts = {
            "ln_1": block.norm1,
            "ln_2": block.norm2,
            "attn.out_proj": block.attn.out_proj,
            "mlp.c_fc": block.mlp.fc1,
            "mlp.c_proj": block.mlp.fc2,
        }
        for name, module in parts.items():
            state |= {f"{to}.{name}.{k}": v for k, v in module.state_dict().items()}
        for kind in ("weight", "bias"):
            three = [getattr(block.attn, f"{x}_proj").state_dict()[kind] for x in "qkv"]
            state[f"{to}.attn.in_proj_{kind}"] = torch.cat(three)
    tower.load_state_dict(state, strict=True)
    return tower


@torch.no_grad()
def test_every_hidden_state_equals_open_clips(ours: CLIPVision) -> None:
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    theirs = make_open_clip(ours)
    seen: list[torch.Tensor] = []
    for block in theirs.transformer.resblocks:
        block.register_forward_hook(lambda _, __, y: seen.append(y))
    theirs(pixels)

    found = ours(pixels, range(CONFIG.num_hidden_layers + 1))
    assert len(seen) == CONFIG.num_hidden_layers
    for i, expected in enumerate(seen, 1):
        assert found[i].shape == expected.shape == (3, 17, 32)
        error = (found[i] - expected).abs().max() / expected.square().mean().sqrt()
        assert error < 1e-4, f"hidden state {i}: {error:.1e}"


@torch.no_grad()
def test_blocks_after_the_last_state_asked_for_are_not_run(ours: CLIPVision) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(ours.blocks)
    ]
    states = ours(torch.zeros(1, 3, 56, 56), (3, 1))
    for hook in hooks:
        hook.remove()
    assert sorted(states) == [1, 3]
    assert ran == [0, 1, 2]
