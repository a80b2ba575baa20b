"""Every number of a LLaVA-1.5 checkpoint; the defaults spell out LLaVA-1.5-7B.

Fields have the names of config.json, which config_file.py reads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer. Field names are those of config.json's vision_config."""

    hidden_size: int = 1024  # C
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16  # H
    image_size: int = 336  # S, pixels
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, image tokens per picture."""
        return self.grid**2


@dataclass(frozen=True)
class TextConfig:
    """Llama decoder. Field names are those of config.json's text_config."""

    hidden_size: int = 4096  # D
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 32  # Hkv
    head_dim: int = 128  # Dh
    vocab_size: int = 32064  # V
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # linear scaling: positions are divided by it
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Config:
    """The whole model."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 32000
    vision_feature_layer: int = -2  # index into CLIP's hidden states, as Hugging Face counts them
    eos_token_ids: tuple[int, ...] = (2,)
    image_aspect: str = "crop"  # what the checkpoint was made for: crop or pad
