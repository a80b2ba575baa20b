"""The numbers that define a LLaVA-1.5 model. The defaults are those of LLaVA-1.5-7B.

Fields have the names they have in config.json, which loading/config_file.py reads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """CLIP ViT-L/14 at 336 pixels, the vision tower: `vision_config` in config.json."""

    hidden_size: int = 1024  # C, width of a patch vector
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16  # H
    image_size: int = 336  # S, pixels along one side of the square image
    patch_size: int = 14  # pixels along one side of a patch
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches along one side of the image: 336 / 14 = 24."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches and therefore image tokens per image: 24^2 = 576."""
        return self.grid**2


@dataclass(frozen=True)
class TextConfig:
    """Vicuna-7B, a Llama decoder: `text_config` in config.json."""

    hidden_size: int = 4096  # D, width of a token vector
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 32  # Hkv; fewer than H means grouped-query attention
    head_dim: int = 128  # Dh
    vocab_size: int = 32064  # V
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # linear RoPE scaling divides positions by this
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False  # True: the output head shares the embedding's weight


@dataclass(frozen=True)
class Config:
    """The whole model."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 32000  # the id of <image>, a placeholder for one image token
    vision_feature_layer: int = -2  # which hidden state of the tower is read, see llava.py
    eos_token_ids: tuple[int, ...] = (2,)
    image_aspect: str = "crop"  # how the checkpoint expects images to be made square: crop or pad
