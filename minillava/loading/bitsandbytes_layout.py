"""Weights of bitsandbytes in files: several tensors that are one weight.

transformers stores the weight of a linear layer X that bitsandbytes quantised as

    4 bits   X.weight                                two codes per byte, (bytes, 1)
             X.weight.absmax                         (blocks,) float32; if nested uint8 codes
             X.weight.quant_map                      (16,) float32: the levels of nf4 or fp4
             X.weight.nested_absmax                  (ceil(blocks / 256),) float32, if nested
             X.weight.nested_quant_map               (256,) float32, if nested
             X.weight.quant_state.bitsandbytes__nf4  a JSON object as bytes; or ...__fp4
    8 bits   X.weight (N, K) int8, X.SCB (N,) float32 and X.weight_format () uint8, which is 0

X.weight may have another dtype (bnb_4bit_quant_storage); its bytes are the same. Everything that
does not fit is refused with the name of a tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.nf4 import BLOCK, LEVELS, NESTED_BLOCK, Nested, Nf4, dynamic_levels, levels_of
from ..quant.stored import RowInt8
from .error_text import cut, cut_path, shorten
from .json_entries import MAX_INTEGER
from .quantization_entries import COMPUTE, Layout, read_layout
from .tensor_files import FLOATS, StoredTensor, read_headers

FOUR_BITS = {name: name.upper() for name in LEVELS}  # type -> kind of the joined tensor
LLM_INT8 = "LLM.int8"  # kind of the joined tensor
BLOCKS = tuple(2**i for i in range(5, 13))  # sizes that bitsandbytes has
STORAGE = {"U8": torch.uint8, "I8": torch.int8, "F64": torch.float64, **FLOATS}

_STATE = "quant_state.bitsandbytes__"
_STATE_BYTES = 256  # what we write; more than any state needs
_MOST_STATE_BYTES = 2**12  # what we read
_COMPANIONS = {
    4: re.compile(
        r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)"
    ),
    8: re.compile(r"(.+\.)(SCB|weight_format)"),
}
_CPU = torch.device("cpu")

Parts = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class State:
    """What quant_state says of a 4-bit weight."""

    kind: str  # nf4 or fp4
    block: int
    shape: tuple[int, int]
    offset: float | None  # None: absmax is not nested


@dataclass(frozen=True)
class JoinedWeight(StoredTensor):
    """A weight that several tensors of the files describe; `shape` is (N, K)."""

    parts: Parts  # by the ends of their names; "" is the weight itself

    def read_weight(self, device: torch.device) -> Nf4 | RowInt8:
        """Raises ValueError for scales that are not numbers."""
        raise NotImplementedError


@dataclass(frozen=True)
class FourBitWeight(JoinedWeight):
    state: State
    compute: torch.dtype

    def read_weight(self, device: torch.device) -> Nf4:
        codes = self.parts[""].read(device, STORAGE[self.parts[""].kind]).view(torch.uint8)
        levels = _read_finite(self.parts["quant_map"], device)
        if not torch.allclose(levels.cpu(), levels_of(self.state.kind), rtol=0, atol=1e-6):
            raise damaged(self.parts["quant_map"], f"does not have the levels of {self.state.kind}")
        if self.state.offset is None:
            absmax: Tensor | Nested = _read_finite(self.parts["absmax"], device)
        else:
            levels, usual = (
                _read_finite(self.parts["nested_quant_map"], device),
                dynamic_levels(device),
            )
            absmax = Nested(
                self.parts["absmax"].read(device, torch.uint8),
                _read_finite(self.parts["nested_absmax"], device),
                usual if torch.equal(levels, usual) else levels,  # weights share the usual ones
                torch.tensor(self.state.offset, device=device),
            )
        N, K = self.state.shape
        return Nf4(codes.flatten(), absmax, (N, K), self.state.kind, self.state.block, self.compute)


@dataclass(frozen=True)
class EightBitWeight(JoinedWeight):
    def read_weight(self, device: torch.device) -> RowInt8:
        layout = self.parts.get("weight_format")
        if layout is not None and layout.read(_CPU, torch.uint8).any():
            raise damaged(layout, "is not 0 (the order of rows), and no other order is read")
        scale = _read_finite(self.parts["SCB"], device)
        return RowInt8(self.parts[""].read(device, torch.int8), scale)


def read_tensors(folder: Path) -> list[StoredTensor]:
    """List the tensors of a checkpoint as read_headers does, those of bitsandbytes joined.

    Raises ValueError, naming a tensor, if its weights are not in the layout of its config.json.
    """
    stored, layout = read_headers(folder), read_layout(folder / "config.json")
    if layout is None:
        return stored
    joined = join_weights(stored, layout)
    if not any(isinstance(tensor, JoinedWeight) for tensor in joined):
        raise ValueError(
            f"{cut_path(folder / 'config.json')}: quantization_config says that weights are in "
            f"{layout.bits} bits, but no tensor beside it is; remove the entry"
        )
    return joined


def join_weights(stored: Iterable[StoredTensor], layout: Layout) -> list[StoredTensor]:
    """Replace each weight of bitsandbytes and its companions by a JoinedWeight."""
    companions: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    others: list[StoredTensor] = []
    for tensor in stored:
        found = _COMPANIONS[layout.bits].fullmatch(tensor.name)
        if found is None:
            others.append(tensor)
            continue
        name = found[1] if layout.bits == 4 else f"{found[1]}weight"
        if found[2] in companions[name]:
            raise damaged(tensor, "is there twice")
        companions[name][found[2]] = tensor
    names = {tensor.name for tensor in others}
    for name in companions.keys() - names:
        other = min(companions[name].values(), key=lambda tensor: tensor.name)
        raise damaged(other, f"is there, but {cut(name)} is missing")
    join = _join_four_bits if layout.bits == 4 else _join_eight_bits
    return [
        join(tensor, companions[tensor.name], layout)
        if tensor.name in companions or _is_packed(tensor)
        else tensor
        for tensor in others
    ]


def _is_packed(tensor: StoredTensor) -> bool:
    return tensor.name.endswith(".weight") and tensor.kind in ("U8", "I8")


def _join_four_bits(weight: StoredTensor, companions: Parts, layout: Layout) -> FourBitWeight:
    states = [end for end in companions if end.startswith("quant_state.")]
    if len(states) != 1 or states[0].removeprefix(_STATE) not in LEVELS:
        known = " or ".join(f"{cut(weight.name)}.{_STATE}{kind}" for kind in LEVELS)
        raise damaged(weight, f"has {_listed(states)} beside it, but must have one {known}")
    state = _read_state(companions[states[0]], states[0].removeprefix(_STATE))
    values = math.prod(state.shape)
    blocks = -(-values // state.block)
    expected: dict[str, tuple[tuple[int, ...], str]] = {"quant_map": ((16,), "F32")}
    expected["absmax"] = (blocks,), "F32" if state.offset is None else "U8"
    if state.offset is not None:
        expected["nested_absmax"] = (-(-blocks // NESTED_BLOCK),), "F32"
        expected["nested_quant_map"] = (256,), "F32"
    for end in companions.keys() - expected.keys() - {states[0]}:
        raise damaged(companions[end], f"is there, but {states[0]} says that absmax is not nested")
    _check_parts(weight, companions, expected)
    dtype = STORAGE.get(weight.kind)
    held = None if dtype is None else math.prod(weight.shape) * dtype.itemsize
    if held != (values + 1) // 2:
        raise damaged(
            weight,
            f"is {weight.kind} {weight.shape}, but must have {(values + 1) // 2} bytes "
            f"for a weight {state.shape} in 4 bits",
        )
    parts = {"": weight, **companions}
    kind = FOUR_BITS[state.kind]
    return FourBitWeight(weight.file, weight.name, state.shape, kind, parts, state, layout.compute)


def _join_eight_bits(weight: StoredTensor, companions: Parts, layout: Layout) -> EightBitWeight:
    if weight.kind != "I8" or len(weight.shape) != 2:
        raise damaged(weight, f"is {weight.kind} {weight.shape}, but must be I8 (N, K) beside SCB")
    layout_shape = (1,) if companions.get("weight_format", weight).shape == (1,) else ()
    optional = {"weight_format": (layout_shape, "U8")} if "weight_format" in companions else {}
    _check_parts(weight, companions, {"SCB": (weight.shape[:1], "F32"), **optional}, ".")
    parts = {"": weight, **companions}
    return EightBitWeight(weight.file, weight.name, weight.shape, LLM_INT8, parts)


def _check_parts(
    weight: StoredTensor,
    companions: Parts,
    expected: Mapping[str, tuple[tuple[int, ...], str]],
    joint: str = ".weight.",
) -> None:
    layer = weight.name.removesuffix(".weight")
    for end, (shape, kind) in expected.items():
        tensor = companions.get(end)
        if tensor is None:
            raise damaged(weight, f"is there, but {cut(layer + joint + end)} is missing")
        if (tensor.shape, tensor.kind) != (shape, kind):
            raise damaged(tensor, f"is {tensor.kind} {tensor.shape}, but must be {kind} {shape}")


def _read_state(tensor: StoredTensor, kind: str) -> State:
    """The contents of a quant_state whose name ends in `kind`."""
    values = _read_object(tensor)
    _require(tensor, values, "quant_type", (kind,))
    _require(tensor, values, "blocksize", BLOCKS)
    _require(tensor, values, "dtype", tuple(COMPUTE))  # of the weight before it was quantised
    shape = values.get("shape")
    if not isinstance(shape, list) or [type(n) for n in shape] != [int, int]:
        raise damaged(tensor, f"has shape {shorten(shape)}, but must have two whole numbers")
    if not all(0 < n <= MAX_INTEGER for n in shape):
        raise damaged(tensor, f"has shape {shorten(shape)}, but must have 1 to {MAX_INTEGER}")
    offset = None
    if any(key.startswith("nested_") for key in values):
        _require(tensor, values, "nested_blocksize", (NESTED_BLOCK,))
        _require(tensor, values, "nested_dtype", ("float32",))
        offset = values.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise damaged(tensor, f"has nested_offset {shorten(offset)}, but must have a number")
    return State(kind, values["blocksize"], (shape[0], shape[1]), offset)


def _read_object(tensor: StoredTensor) -> dict[str, Any]:
    """A JSON object that a tensor has as bytes."""
    if tensor.kind != "U8" or len(tensor.shape) != 1 or tensor.shape[0] > _MOST_STATE_BYTES:
        allowed = f"U8 with one axis, of at most {_MOST_STATE_BYTES}"
        raise damaged(tensor, f"is {tensor.kind} {tensor.shape}, but must be {allowed}")
    try:
        values = json.loads(bytes(tensor.read(_CPU, torch.uint8).tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(tensor, f"is not valid JSON ({cut(str(error))})") from error
    if not isinstance(values, dict):
        raise damaged(tensor, f"is {shorten(values)}, but must be an object")
    return values


def _require(
    tensor: StoredTensor, values: Mapping[str, Any], key: str, known: tuple[str | int, ...]
) -> None:
    """Raises ValueError if an entry has none of the known values."""
    value = values.get(key)
    if type(value) not in (str, int) or value not in known:
        allowed = " or ".join(map(str, known))
        raise damaged(tensor, f"has {key} {shorten(value)}, but must have {allowed}")


def _read_finite(tensor: StoredTensor, device: torch.device) -> Tensor:
    values = tensor.read(device, torch.float32)
    if not values.isfinite().all():
        raise damaged(tensor, "has values that are not finite")
    return values


def damaged(tensor: StoredTensor, what: str) -> ValueError:
    where = f"{cut_path(tensor.file)}: {cut(tensor.name)}"
    return ValueError(f"{where} {what}; download the checkpoint again")


def _listed(names: list[str]) -> str:
    return ", ".join(map(cut, names[:3])) or "no quant_state"


def planned_parts(shape: tuple[int, int]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """The tensors that store_parts gives for a weight (N, K) in nf4: name's end, shape, dtype."""
    values = math.prod(shape)
    blocks = -(-values // BLOCK)
    return [
        ("", ((values + 1) // 2, 1), torch.uint8),
        (".absmax", (blocks,), torch.uint8),
        (".quant_map", (16,), torch.float32),
        (".nested_absmax", (-(-blocks // NESTED_BLOCK),), torch.float32),
        (".nested_quant_map", (256,), torch.float32),
        (f".{_STATE}nf4", (_STATE_BYTES,), torch.uint8),
    ]


def store_parts(weight: Nf4, source: torch.dtype) -> list[Tensor]:
    """The tensors of a weight in nf4 with nested absmax, made from a weight in dtype `source`."""
    assert isinstance(weight.absmax, Nested)
    state = {
        "quant_type": weight.kind,
        "blocksize": weight.block,
        "dtype": str(source).removeprefix("torch."),
        "shape": weight.shape,
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": weight.absmax.offset.item(),
    }
    # The length is known before the offset is: JSON may end in spaces.
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    nested = weight.absmax
    return [
        *(weight.codes[:, None], nested.codes, levels_of(weight.kind), nested.scale, nested.levels),
        torch.tensor(list(text), dtype=torch.uint8),
    ]
