"""config.json's quantization_config: which entries matter, and what becomes of each.

Ours (weights.quantise) is recognised from the tensors and needs nothing from here. bitsandbytes'
is read as transformers' BitsAndBytesConfig reads it. All others are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .json_entries import Entries, Followed, Only, Table, Unused, read_json
from .tensor_files import FLOATS

OURS = "minillava"
METHOD = "bitsandbytes"
COMPUTE = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}

_UNQUANTISED = "load the checkpoint's unquantised weights"
_TENSORS = Unused("the tensors say it themselves, and transformers follows them too")

BITSANDBYTES: Table = {
    "quant_method": Followed(),
    "load_in_4bit": Followed(),
    "load_in_8bit": Followed(),
    "bnb_4bit_compute_dtype": Only((None, *COMPUTE), "correct the file"),
    "bnb_4bit_quant_type": _TENSORS,
    "bnb_4bit_use_double_quant": _TENSORS,
    "bnb_4bit_quant_storage": _TENSORS,
    "llm_int8_skip_modules": _TENSORS,  # the weights of these layers are floating-point numbers
    "llm_int8_threshold": Unused("says which activations are not rounded to 8 bits; here none is"),
    "llm_int8_has_fp16_weight": Only((None, False), _UNQUANTISED),
    "llm_int8_enable_fp32_cpu_offload": Unused("for models on several devices"),
}


@dataclass(frozen=True)
class Layout:
    """A layout of bitsandbytes."""

    bits: int  # 4 or 8
    compute: torch.dtype  # what 4-bit layers are multiplied in on a GPU


def read_layout(path: str | Path) -> Layout | None:
    """The layout that a config.json names; None if it is not one of bitsandbytes."""
    return parse_layout(Entries(str(path), "", read_json(path)))


def parse_layout(top: Entries) -> Layout | None:
    """Raises ValueError for a quantization_config that is neither ours nor bitsandbytes'."""
    e = top.section("quantization_config", {})
    method, version, bits = (e.values.get(key) for key in ("quant_method", "version", "bits"))
    # in version 1, 4 bits meant something else
    if not e.values or (method, version, bits) in {(OURS, 2, 4), (OURS, 2, 8), (OURS, 1, 8)}:
        return None
    if method not in (None, METHOD, OURS):
        raise e.error("quant_method", method, f"'{OURS}' or '{METHOD}'", _UNQUANTISED)
    loads = any(e.values.get(f"load_in_{bits}bit") not in (None, False) for bits in (4, 8))
    if not loads or method == OURS:
        allowed = (
            "absent, or as weights.quantise writes it (quant_method 'minillava', version 2), or "
            "of bitsandbytes with load_in_4bit or load_in_8bit"
        )
        raise top.error("quantization_config", dict(e.values), allowed, _UNQUANTISED)
    e.check(BITSANDBYTES)
    four, eight = (e.flag(f"load_in_{bits}bit", False) for bits in (4, 8))
    if four and eight:
        raise e.error("load_in_8bit", True, "False beside load_in_4bit", "correct the file")
    compute = e.values.get("bnb_4bit_compute_dtype")
    return Layout(4 if four else 8, torch.float32 if compute is None else COMPUTE[compute])
