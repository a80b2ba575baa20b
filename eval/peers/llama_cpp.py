"""The decoder at the shape of LLaVA-1.5-7B in llama.cpp, with random weights.

A GGUF file with random blocks of the format is written to a temporary folder and opened by
llama-cpp-python's binding of libllama. All matrices have the one format, the embedding and the
output head too. Batches of keys, threads and attention are as in llama-bench.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from minillava.config import Config, TextConfig

from ..latency import with_layers
from .base import ALL_LAYERS, TOKENS, Times

POOL = 4099  # random rows that a matrix repeats


class LlamaCpp:
    """Two decoders in contexts of libllama: of one layer, and of one more than are to be measured.

    In its last layer llama.cpp computes the MLP only for rows whose logits are asked for: a few
    layers, multiplied up, would seem too fast. The two decoders differ by whole layers. There is no
    vision tower.
    """

    packages: ClassVar[tuple[str, ...]] = ("llama_cpp", "gguf")
    forms: ClassVar[Mapping[str, float]] = {"bf16": 2.0, "f16": 2.0, "q8_0": 1.1, "q4_0": 0.6}

    def __init__(self, form: str, config: Config, tokens: int) -> None:
        self.name, self.layers = f"llama.cpp {form}", config.text.num_hidden_layers
        self.small, self.large = (_Decoder(form, c.text, tokens) for c in self.shapes(config))

    @staticmethod
    def shapes(config: Config) -> list[Config]:
        return [with_layers(config, n) for n in (1, 1 + config.text.num_hidden_layers)]

    def measure(self) -> Times:
        prefill, per_token = (
            small + (ALL_LAYERS - 1) * (large - small) / self.layers
            for small, large in zip(self.small.measure(), self.large.measure(), strict=True)
        )
        return Times(None, prefill, per_token)


class _Decoder:
    def __init__(self, form: str, config: TextConfig, tokens: int) -> None:
        import llama_cpp

        self.cpp, threads = llama_cpp, torch.get_num_threads()
        llama_cpp.llama_log_set(_LOG, ctypes.c_void_p())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            write_gguf(path, form, config)
            settings = llama_cpp.llama_model_default_params()
            settings.use_mmap = False  # the file may go
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise ValueError(f"llama.cpp cannot open the {form} file that was written for it")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = tokens + 64, tokens, tokens
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.batch = llama_cpp.llama_batch_init(tokens, 0, 1)
        rng = np.random.default_rng(0)
        self.ids = [int(i) for i in rng.integers(3, config.vocab_size, tokens)]

    def measure(self) -> tuple[float, float]:
        """Seconds of the prompt, and of a token after it."""
        self.cpp.llama_memory_clear(self.cpp.llama_get_memory(self.context), True)
        T = len(self.ids)
        prefill = self._seconds(self.ids, 0)
        return prefill, sum(self._seconds([5], T + i) for i in range(TOKENS)) / TOKENS

    def _seconds(self, ids: list[int], past: int) -> float:
        """Seconds until the logits of the last of the ids, which follow `past` earlier ones."""
        for i, token in enumerate(ids):
            self.batch.token[i], self.batch.pos[i] = token, past + i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = i == len(ids) - 1
        self.batch.n_tokens = len(ids)
        start = time.perf_counter()
        if failed := self.cpp.llama_decode(self.context, self.batch):
            raise ValueError(f"llama.cpp's llama_decode failed with code {failed}")
        self.cpp.llama_synchronize(self.context)
        return time.perf_counter() - start


def _take_log(level: int, text: bytes, data: Any) -> None:
    """llama.cpp writes pages to stderr by itself."""


# a C function pointer, which has to live as long as llama.cpp may call it
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_take_log)


def write_gguf(path: Path, form: str, config: TextConfig) -> None:
    """Write a Llama of this shape with random weights, without a tokenizer."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer, D, M = GGUFWriter(path, "llama"), config.hidden_size, config.intermediate_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(D)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(M)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind = GGMLQuantizationType[form.upper()]
    matrices = {"token_embd": (config.vocab_size, D), "output": (config.vocab_size, D)}
    norms = ["output_norm"]
    for i in range(config.num_hidden_layers):
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrices[f"blk.{i}.{name}"] = (D, D)
        matrices |= {f"blk.{i}.ffn_gate": (M, D), f"blk.{i}.ffn_up": (M, D)}
        matrices[f"blk.{i}.ffn_down"] = (D, M)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    for name, (N, K) in matrices.items():
        writer.add_tensor(f"{name}.weight", random_matrix(form, N, K), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_matrix(form: str, N: int, K: int) -> Any:
    """A matrix (N, K) in the bytes of the format: blocks of 32 values with a float16 scale."""
    rng, std = np.random.default_rng(N), np.float32(K**-0.5)
    rows = min(N, POOL)
    if form in ("bf16", "f16"):
        values = np.resize(rng.standard_normal(2**20 + 7, np.float32) * std, (rows, K))
        if form == "bf16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            values = values.astype(np.float16)
    else:
        size, largest = {"q8_0": (34, 127), "q4_0": (18, 8)}[form]  # bytes of a block
        blocks = rng.integers(0, 256, (rows, K // 32, size), np.uint8)
        blocks[..., :2] = np.array([2 * std / largest], np.float16).view(np.uint8)
        values = blocks.reshape(rows, -1)
    return np.resize(values, (N, values.shape[1]))
