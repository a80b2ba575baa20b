"""Checkpoints that transformers quantised with bitsandbytes and saved: they answer here as there,
and a damaged one is refused with the name of a tensor."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from minillava import load
from minillava.generate import generate
from minillava.loading.tensor_files import SINGLE
from minillava.quant.stored import Nf4Linear, RowInt8
from weights.quantise import quantise

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from bitsandbytes.nn import Linear4bit  # noqa: E402

NESTED = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
AS_LLAVA = NESTED | {"llm_int8_skip_modules": ["model.vision_tower", "lm_head"]}
FORMS: dict[str, dict[str, Any]] = {
    "nf4, nested": NESTED,
    "nf4 in bfloat16": NESTED
    | {"bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "bfloat16"},
    "nf4, nested, in float32": NESTED | {"bnb_4bit_quant_storage": "float32"},
    "fp4": {"load_in_4bit": True},
    "fp4, nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "with the head": NESTED | {"llm_int8_skip_modules": []},
    "as LLaVA": AS_LLAVA,
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    wide = tiny.write_folder(tmp_path_factory, width=64, layers=2, vision_layers=3)
    model = LlavaForConditionalGeneration.from_pretrained(wide, dtype=torch.bfloat16)
    return save(model, wide, wide.with_name("bfloat16"))


@pytest.fixture(scope="module")
def folders(src: Path) -> dict[str, Path]:
    """The checkpoint as transformers quantises and saves it, by form."""
    return {
        form: save(quantise_there(src, options), src, src.with_name(form))
        for form, options in FORMS.items()
    }


def quantise_there(src: Path, options: dict[str, Any]) -> Any:
    config = BitsAndBytesConfig(**options)
    return LlavaForConditionalGeneration.from_pretrained(src, quantization_config=config)


def save(model: Any, src: Path, to: Path) -> Path:
    """Save transformers' model with the small files of the folder that it is from."""
    model.save_pretrained(to)
    for path in src.iterdir():
        if not (to / path.name).exists():
            shutil.copy(path, to)
    return to


def open_there(folder: Path) -> Any:
    """transformers' model, computing in float32 as it does by default on other devices.

    On a CPU with bfloat16 instructions bitsandbytes would compute in bfloat16, with absmax rounded
    to bfloat16, and refuse layers whose number of outputs is no multiple of 32.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if model.config.quantization_config.load_in_8bit:
        # Its arithmetic for 8 bits rounds activations; only that of the weights is compared.
        return model.dequantize(dtype=torch.float32).float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        else:  # some of the tower's weights keep the dtype of the files
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return model


def all_tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_answers_as_in_transformers(folders: dict[str, Path], form: str) -> None:
    model, theirs = load(folders[form])[0], open_there(folders[form])
    batch = tiny.make_batch(model, "tttIttttt")
    result = generate(model, batch, max_new_tokens=3, output_logits=True)
    assert result.logits is not None
    ids = torch.cat((batch.ids, torch.tensor(result.tokens)[:, :-1]), 1)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=batch.pixels).logits[:, -3:]
    tiny.assert_close(result.logits, expected)
    assert result.tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_quantised_in_the_files_stays_so(folders: dict[str, Path], form: str) -> None:
    model, stored = load(folders[form])[0], load_file(folders[form] / SINGLE)
    layers = [m for m in model.modules() if isinstance(m, Nf4Linear)]
    if form == "int8":
        layers = [m for m in model.modules() if getattr(m, "form", None) is RowInt8]
    ends = (".SCB",) if form == "int8" else (".weight.absmax",)
    assert len(layers) == sum(name.endswith(ends) for name in stored) > 0
    held = sum(layer.out_features * layer.in_features for layer in layers)
    bits = 8 if form == "int8" else 4
    assert 0 < sum(layer.nbytes for layer in layers) - bits * held // 8 < 0.08 * held
    words = {"int8": "LLM.int8"}.get(form, "fp4" if "fp4" in form else "nf4")
    batch = tiny.make_batch(model, "tIt")
    assert generate(model, batch, max_new_tokens=1).report.arithmetic == (
        f"weights widened from {words}"
    )


def test_levels_of_absmax_are_those_of_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """Earlier versions of bitsandbytes may have made others."""
    other = shutil.copytree(folders["nf4, nested"], tmp_path / "other")
    state = load_file(other / SINGLE)
    name = "language_model.model.layers.1.mlp.up_proj.weight.nested_quant_map"
    state[name] = state[name] / 2
    save_file(state, other / SINGLE, {"format": "pt"})
    model, theirs = load(other)[0], open_there(other)
    expected = theirs.model.language_model.layers[1].mlp.up_proj(torch.eye(64)).T
    tiny.assert_close(model.llama.blocks[1].mlp.up_proj(torch.eye(64)).T, expected, 1e-6)


def test_nf4_at_load_is_what_transformers_makes(src: Path, folders: dict[str, Path]) -> None:
    """Of the layers that LLaVA's loader quantises, and of the values in the files' dtype."""
    ours, theirs = (all_tensors(m) for m in (
        load(src, quantize="nf4")[0], load(folders["as LLaVA"])[0]
    ))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_weights_quantise_writes_is_what_transformers_writes(
    src: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    quantise(src, tmp_path / "dst", "nf4")
    ours, theirs = (load_file(f / SINGLE) for f in (tmp_path / "dst", folders["as LLaVA"]))
    states = {name for name in ours if "quant_state" in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - states)
    for name in states:
        assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(theirs[name].tolist()))
    opened = LlavaForConditionalGeneration.from_pretrained(tmp_path / "dst").state_dict()
    saved = LlavaForConditionalGeneration.from_pretrained(folders["as LLaVA"]).state_dict()
    assert opened.keys() == saved.keys()
    assert all(torch.equal(opened[name], saved[name]) for name in saved)


# ---------------------------------------------------------------- damage

UP = "language_model.model.layers.1.mlp.up_proj"
W = f"{UP}.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"
State = dict[str, Tensor]


def without(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def change(name: str, new: Callable[[Tensor], Tensor]) -> Callable[[State], object]:
    return lambda state: state.update({name: new(state[name])})


def note(**entries: Any) -> Callable[[State], object]:
    """Change entries of quant_state; ... leaves one out."""

    def rewrite(state: State) -> None:
        values = json.loads(bytes(state[STATE].tolist())) | entries
        kept = {key: value for key, value in values.items() if value is not ...}
        state[STATE] = as_bytes(json.dumps(kept))

    return rewrite


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return put


def rename(old: str, new: str) -> Callable[[State], object]:
    return lambda state: state.update({new: state.pop(old)})


NAN, INF = math.nan, math.inf
ABSMAX, QUANT_MAP, SCALES, LEVELS = (
    f"{W}.{end}" for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
)
SCB, FORMAT, N4, FP4 = f"{UP}.SCB", f"{UP}.weight_format", "nf4, nested", "fp4"
NO_NESTED = {"nested_blocksize": ..., "nested_dtype": ..., "nested_offset": ...}
SOME_NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1].clone()


def longer(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor[:1]))


def put(name: str, text: str) -> Callable[[State], object]:
    return lambda state: state.update({name: as_bytes(text)})


def only_codes(state: State) -> None:
    for name in [name for name in state if f"{W}." in name]:
        del state[name]


# What is done to the tensors of a form; the tensor that the error must name; what else it says.
DAMAGE: dict[str, tuple[str, Callable[[State], object], str, str]] = {
    "no absmax": (N4, without(ABSMAX), ABSMAX, "is missing"),
    "no quant_map": (FP4, without(QUANT_MAP), QUANT_MAP, "is missing"),
    "no scales": (N4, without(SCALES), SCALES, "is missing"),
    "no levels": (N4, without(LEVELS), LEVELS, "is missing"),
    "no state": (N4, without(STATE), W, "no quant_state beside it, but must have one"),
    "only codes": (N4, only_codes, W, "no quant_state beside it, but must have one"),
    "no codes": (N4, without(W), W, "is missing"),
    "no SCB": ("int8", without(SCB), SCB, "is missing"),
    "no int8": ("int8", without(W), W, "is missing"),
    "short codes": (N4, change(W, shorter), W, "must have 4352 bytes"),
    "long codes": ("nf4 in bfloat16", change(W, longer), W, "4352 bytes"),
    "other codes": (N4, change(W, Tensor.long), W, "I64"),
    "short absmax": (N4, change(ABSMAX, shorter), ABSMAX, "(136,)"),
    "float absmax": (N4, change(ABSMAX, Tensor.float), ABSMAX, "must be U8"),
    "integer absmax": (FP4, change(ABSMAX, Tensor.byte), ABSMAX, "must be F32"),
    "two scales": (N4, change(SCALES, longer), SCALES, "(1,)"),
    "255 levels": (N4, change(LEVELS, shorter), LEVELS, "(256,)"),
    "17 levels": (FP4, change(QUANT_MAP, longer), QUANT_MAP, "(16,)"),
    "other levels": (FP4, change(QUANT_MAP, Tensor.exp), QUANT_MAP, "the levels of fp4"),
    "not said to be nested": (N4, note(**NO_NESTED), f"{W}.nested_", "absmax is not nested"),
    "said to be nested": ("nf4 in bfloat16", note(**SOME_NESTED), W, "must be U8"),
    "NaN in absmax": (FP4, change(ABSMAX, with_value(NAN)), ABSMAX, "not finite"),
    "NaN in scales": (N4, change(SCALES, with_value(NAN)), SCALES, "not finite"),
    "infinite level": (N4, change(LEVELS, with_value(INF)), LEVELS, "not finite"),
    "NaN in SCB": ("int8", change(SCB, with_value(NAN)), SCB, "not finite"),
    "short SCB": ("int8", change(SCB, shorter), SCB, "(136,)"),
    "integer SCB": ("int8", change(SCB, Tensor.int), SCB, "must be F32"),
    "other order": ("int8", change(FORMAT, lambda t: t + 2), FORMAT, "the order of rows"),
    "float int8": ("int8", change(W, Tensor.float), W, "must be I8"),
    "short int8": ("int8", change(W, lambda t: t[:, 1:].clone()), W, "(136, 63) for (136, 64)"),
    "not JSON": (N4, change(STATE, shorter), STATE, "is not valid JSON"),
    "not text": (N4, change(STATE, lambda t: t | 128), STATE, "is not valid JSON"),
    "deep JSON": (N4, put(STATE, "[" * 4000), STATE, "is not valid JSON"),
    "a list": (N4, put(STATE, "[1]"), STATE, "must be an object"),
    "long JSON": (N4, put(STATE, " " * 5000), STATE, "at most 4096"),
    "JSON in float": (N4, change(STATE, Tensor.float), STATE, "must be U8"),
    "unknown type": (N4, rename(STATE, f"{STATE[:-3]}nf5"), W, "bitsandbytes__nf5"),
    "two types": (N4, put(f"{STATE[:-3]}fp4", "{}"), W, "must have one"),
    "another type inside": (N4, note(quant_type="fp4"), STATE, "quant_type 'fp4'"),
    "no type inside": (N4, note(quant_type=...), STATE, "quant_type None"),
    "an odd block": (N4, note(blocksize=63), STATE, "blocksize 63"),
    "another block": (N4, note(blocksize=128), ABSMAX, "(68,)"),
    "no block": (N4, note(blocksize=...), STATE, "blocksize None"),
    "a true block": (N4, note(blocksize=True), STATE, "blocksize True"),
    "another nested block": (N4, note(nested_blocksize=128), STATE, "nested_blocksize 128"),
    "another dtype": (N4, note(dtype="int8"), STATE, "dtype 'int8'"),
    "another nested dtype": (N4, note(nested_dtype="int8"), STATE, "nested_dtype 'int8'"),
    "NaN offset": (N4, note(nested_offset=NAN), STATE, "nested_offset nan"),
    "no offset": (N4, note(nested_offset=...), STATE, "nested_offset None"),
    "text offset": (N4, note(nested_offset="0.5"), STATE, "nested_offset '0.5'"),
    "transposed": (N4, note(shape=[64, 136]), W, "(64, 136) for (136, 64)"),
    "negative shape": (N4, note(shape=[-136, -64]), STATE, "shape [-136, -64]"),
    "huge shape": (N4, note(shape=[10**9, 10**9]), STATE, "shape [1000000000"),
    "flat shape": (N4, note(shape=[136 * 64]), STATE, "two whole numbers"),
    "no shape": (N4, note(shape=None), STATE, "shape None"),
    "more rows": (N4, note(shape=[272, 64]), ABSMAX, "(272,)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_weight_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    form, damage, name, message = DAMAGE[case]
    for path in folders[form].iterdir():
        if path.name != SINGLE:
            shutil.copy(path, tmp_path)
    state = load_file(folders[form] / SINGLE)
    damage(state)
    save_file(state, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"download the checkpoint again") as caught:
        load(tmp_path)
    text = str(caught.value)
    assert name in text
    assert message in text
    assert "\n" not in text
    assert len(text) < 2000


# ---------------------------------------------------------------- quantization_config


def with_config(folder: Path, to: Path, **entries: Any) -> Path:
    """A copy whose quantization_config has other entries; ... leaves one out."""
    shutil.copytree(folder, to)

    def rewrite(values: dict[str, Any]) -> None:
        changed = values.get("quantization_config", {}) | entries
        kept = {key: value for key, value in changed.items() if value is not ...}
        values["quantization_config"] = kept

    tiny.rewrite_config(to, rewrite)
    return to


REFUSED_ENTRIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "neither": ("int8", {"load_in_8bit": False}, "load_in_4bit or load_in_8bit"),
    "both": ("int8", {"load_in_4bit": True}, "load_in_8bit is True, but must be False beside"),
    "another method": ("int8", {"quant_method": "gptq"}, "'gptq'"),
    "a word": ("fp4", {"load_in_4bit": "yes"}, "load_in_4bit is 'yes'"),
    "unknown dtype": ("fp4", {"bnb_4bit_compute_dtype": "int3"}, "compute_dtype is 'int3'"),
    "no dtype": ("fp4", {"bnb_4bit_compute_dtype": ["float16"]}, "bnb_4bit_compute_dtype"),
    "16-bit weights": ("int8", {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    "the other layout": ("fp4", {"load_in_4bit": False, "load_in_8bit": True}, "must be I8"),
    "the other layout, 8 bits": ("int8", {"load_in_4bit": True, "load_in_8bit": False}, ".weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_ENTRIES)
def test_entries_that_are_refused(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    form, entries, message = REFUSED_ENTRIES[case]
    with pytest.raises(ValueError, match=r"; (download|load|correct|use) ") as caught:
        load(with_config(folders[form], tmp_path / "c", **entries))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_config_json_does_not_announce_are_refused(
    src: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["fp4"], tmp_path / "unmarked")
    tiny.rewrite_config(tmp_path / "unmarked", lambda values: values.pop("quantization_config"))
    with pytest.raises(ValueError, match="unknown: language_model"):
        load(tmp_path / "unmarked")
    for bits in (4, 8):  # transformers fails when it answers
        marked = with_config(src, tmp_path / f"marked {bits}", **{f"load_in_{bits}bit": True})
        with pytest.raises(ValueError, match=f"in {bits} bits, but no tensor .* is; remove"):
            load(marked)


def test_old_files_have_fewer_entries(folders: dict[str, Path], tmp_path: Path) -> None:
    """No quant_method (before transformers 4.35), no weight_format, an 8-bit one with one axis."""
    old = with_config(folders["int8"], tmp_path / "old", quant_method=..., load_in_4bit=...)
    state = load_file(old / SINGLE)
    state[f"{UP}.weight_format"] = state[f"{UP}.weight_format"][None]
    state.pop(f"{UP.replace('up', 'gate')}.weight_format")
    save_file(state, old / SINGLE, {"format": "pt"})
    ours, new = all_tensors(load(old)[0]), all_tensors(load(folders["int8"])[0])
    assert all(torch.equal(ours[name], new[name]) for name in new)


def test_a_stored_form_is_not_quantised_again(folders: dict[str, Path], tmp_path: Path) -> None:
    for form, asked, has in (("fp4", "nf4", "fp4"), ("int8", "int8", "LLM.int8")):
        with pytest.raises(ValueError, match=f"quantize='{asked}', but .* stored in {has}"):
            load(folders[form], quantize=asked)
    assert load(folders["nf4, nested"], quantize="nf4")[0] is not None
    with pytest.raises(ValueError, match="is quantised already"):
        quantise(folders["int8"], tmp_path / "dst", "nf4")


def test_the_dtype_of_the_files_is_that_of_their_floats(folders: dict[str, Path]) -> None:
    """Not that of absmax, SCB, or bnb_4bit_quant_storage."""
    for form in ("nf4, nested, in float32", "fp4", "int8"):
        assert load(folders[form])[0].llama.embed_tokens.weight.dtype == torch.bfloat16


def test_a_quantised_head_that_is_tied_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["with the head"], tmp_path / "tied")

    def tie(values: dict[str, Any]) -> None:
        values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = True

    tiny.rewrite_config(tmp_path / "tied", tie)
    with pytest.raises(ValueError, match=r"lm_head.weight NF4 for F32 or F16 or BF16"):
        load(tmp_path / "tied")
