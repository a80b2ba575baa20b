"""LLaVA-1.5 of transformers with random weights and SDPA attention."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from minillava.config import Config

from .base import TOKENS, Times, scale


class Transformers:
    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    forms: ClassVar[Mapping[str, float]] = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}

    def __init__(self, form: str, config: Config, tokens: int) -> None:
        self.name, self.layers = f"transformers {form}", config.text.num_hidden_layers
        self.model = _random_model(config, getattr(torch, form))
        size = config.vision.image_size
        self.pixels = torch.randn(1, 3, size, size, dtype=self.model.dtype)
        self.ids = torch.randint(3, config.text.vocab_size, (1, tokens))

    @staticmethod
    def shapes(config: Config) -> list[Config]:
        return [config]

    @torch.inference_mode()
    def measure(self) -> Times:
        model, language, head = self.model, self.model.model.language_model, self.model.lm_head
        start = time.perf_counter()
        model.get_image_features(pixel_values=self.pixels)
        vision = time.perf_counter()
        out = language(input_ids=self.ids, use_cache=True)
        head(out.last_hidden_state[:, -1:])
        prefill = time.perf_counter()
        one = {"input_ids": self.ids[:, :1], "past_key_values": out.past_key_values}
        for _ in range(TOKENS):
            row = language(**one, use_cache=True).last_hidden_state
            head(row)
        token = time.perf_counter()
        for _ in range(TOKENS):
            head(row)
        of_head = (time.perf_counter() - token) / TOKENS
        return Times(
            vision=vision - start,
            prefill=scale(prefill - vision, of_head, self.layers),
            per_token=scale((token - prefill) / TOKENS, of_head, self.layers),
        )


def _random_model(config: Config, dtype: torch.dtype) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision, text = config.vision, config.text
    values: Any = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        ),
        text_config=LlamaConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_position_embeddings,
        ),
        image_token_index=config.image_token_id,
    )
    values._attn_implementation = "sdpa"
    make: Any = Llava._from_config
    return make(values, dtype=dtype).eval()
