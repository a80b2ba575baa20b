"""load(): every layout, every tensor where it belongs, and one-line errors."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import rewrite_config
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from minillava.config import Config, TextConfig, VisionConfig
from minillava.llava import LLaVA
from minillava.loading import assemble, tensor_files
from minillava.loading.assemble import choose_forms, quantised_layers
from minillava.loading.checkpoint import empty_model, load, match_tensors, widest_dtype
from minillava.loading.config_file import parse_config, read_config
from minillava.loading.json_entries import read_json
from minillava.loading.keys import published_name
from minillava.loading.regular_files import is_present, read_bytes
from minillava.loading.tensor_files import StoredTensor, read_headers

torch.set_num_threads(1)

TINY_A = Path(__file__).parents[1] / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
PICTURES = "preprocessor_config.json"
SMALL_FILES = ("tokenizer.model", "preprocessor_config.json", "generation_config.json")

# Our names -> those of transformers' modules, independent of the table under test.
THEIRS = {
    r"^vision\.class": "model.vision_tower.embeddings.class",
    r"^vision\.(patch|position)_emb": r"model.vision_tower.embeddings.\1_emb",
    r"^vision\.norm_pre": "model.vision_tower.pre_layrnorm",
    r"^vision\.norm_post": "model.vision_tower.post_layernorm",
    r"^vision\.blocks\.(\d+)\.norm": r"model.vision_tower.encoder.layers.\1.layer_norm",
    r"^vision\.blocks\.(\d+)\.attn": r"model.vision_tower.encoder.layers.\1.self_attn",
    r"^vision\.blocks": "model.vision_tower.encoder.layers",
    r"^projector": "model.multi_modal_projector",
    r"^llama\.lm_head": "lm_head",
    r"^llama\.blocks\.(\d+)\.norm1": r"model.language_model.layers.\1.input_layernorm",
    r"^llama\.blocks\.(\d+)\.norm2": r"model.language_model.layers.\1.post_attention_layernorm",
    r"^llama\.blocks\.(\d+)\.attn": r"model.language_model.layers.\1.self_attn",
    r"^llama\.blocks": "model.language_model.layers",
    r"^llama\.": "model.language_model.",
}


def their_name(ours: str) -> str:
    return next(
        re.sub(pattern, to, ours) for pattern, to in THEIRS.items() if re.search(pattern, ours)
    )


def hub_spelling(name: str) -> str:
    """A name in a file that transformers 5 writes -> its name on the hub."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def module_spelling(name: str) -> str:
    """A name in a file that transformers 5 writes -> its name in the modules."""
    name = name.replace("language_model.model.", "language_model.")
    return "lm_head.weight" if name.endswith("lm_head.weight") else f"model.{name}"


def write_hf(folder: Path, kv_heads: int = 4, tied: bool = False, shard: str = "1GB") -> Any:
    """A random LLaVA saved by transformers, with the small files of tiny-a; returns its module."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            vocab_size=320,
            tie_word_embeddings=tied,
        ),
        image_token_index=318,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide a mix-up
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    for name in SMALL_FILES:
        shutil.copy(TINY_A / name, folder)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def rename_tensors(folder: Path, spelling: Callable[[str], str]) -> None:
    rewrite(folder, lambda state: {spelling(name): tensor for name, tensor in state.items()})


def assert_same_weights(model: LLaVA, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert {their_name(name) for name in state} == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[their_name(name)]), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spelling", [None, hub_spelling, module_spelling])
def test_every_tensor_finds_its_place_in_every_spelling(
    tmp_path: Path, kv_heads: int, tied: bool, spelling: Callable[[str], str] | None
) -> None:
    saved = write_hf(tmp_path, kv_heads, tied)
    if spelling:
        rename_tensors(tmp_path, spelling)
    assert ("lm_head.weight" in str(list(load_file(tmp_path / "model.safetensors")))) != tied
    model, _ = load(tmp_path)
    assert_same_weights(model, saved.state_dict())
    assert (model.llama.lm_head.weight is model.llama.embed_tokens.weight) == tied


def test_shards_of_transformers_load_like_one_file(tmp_path: Path) -> None:
    saved = write_hf(tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_weights(load(tmp_path)[0], saved.state_dict())


def test_the_published_layout_loads() -> None:
    model, _ = load(TINY_A)
    files: dict[str, Tensor] = {}
    for path in TINY_A.glob("*.safetensors"):
        files |= load_file(path)
    short = {n.replace("vision_tower.vision_model.", "vision_tower."): t for n, t in files.items()}
    assert_same_weights(model, {module_spelling(name): t for name, t in short.items()})


def test_a_loaded_model_is_ready_to_run(folder: Path) -> None:
    model, processor = load(folder)
    assert not model.training
    assert all(p.device.type == "cpu" and not p.requires_grad for p in model.parameters())
    assert model.tokenizer is not None
    assert model.tokenizer.decode([3, 4]) == processor.decode([3, 4])


# ------------------------------------------------------------ tied heads


def set_head(folder: Path, head: Callable[[Tensor], Tensor], keep_embedding: bool = True) -> None:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = state["language_model.model.embed_tokens.weight"]
        if not keep_embedding:
            del state["language_model.model.embed_tokens.weight"]
        return {**state, "language_model.lm_head.weight": head(embedding.clone())}

    rewrite(folder, change)


@pytest.mark.parametrize("keep_embedding", [True, False])
def test_a_tied_head_may_also_be_in_the_file(tmp_path: Path, keep_embedding: bool) -> None:
    saved = write_hf(tmp_path, tied=True)
    set_head(tmp_path, lambda embedding: embedding, keep_embedding)
    model, _ = load(tmp_path)
    assert_same_weights(model, saved.state_dict())
    assert model.llama.lm_head.weight is model.llama.embed_tokens.weight


def test_a_tied_head_that_differs_is_used_as_it_is(tmp_path: Path) -> None:
    """As in transformers, see test_config_entries.py."""
    write_hf(tmp_path, tied=True)
    set_head(tmp_path, lambda embedding: embedding + 1)
    model, _ = load(tmp_path)
    assert not model.config.text.tie_word_embeddings
    assert torch.equal(model.llama.lm_head.weight, model.llama.embed_tokens.weight + 1)


# ------------------------------------------------------------ dtype, device, quantize


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        (None, torch.float32),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("float16", torch.float16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_is_that_of_storage_on_a_cpu(
    folder: Path,
    asked: str | torch.dtype | None,
    stored: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assemble, "multiplies_bfloat16", lambda: False)  # see test_bfloat16.py
    rewrite(folder, lambda state: {name: tensor.half() for name, tensor in state.items()})
    files = load_file(folder / "model.safetensors")
    model, _ = load(folder, dtype=asked)
    assert model.dtype == torch.float32  # dtype of the arithmetic
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(model.projector.linear_1.weight, files[name].to(stored))
    for name in LLaVA(model.config).state_dict():
        large = re.search(r"(proj|fc\d|linear_\d|lm_head|embed_tokens)\.weight$", name)
        module, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(module), leaf)
        assert tensor.dtype == (stored if large else torch.float32), name


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (["F16", "F16"], torch.float16),
        (["BF16"], torch.bfloat16),
        (["F16", "F32"], torch.float32),
        (["BF16", "F16"], torch.float32),
    ],
)
def test_a_checkpoints_own_dtype_holds_all_its_tensors(
    kinds: list[str], dtype: torch.dtype
) -> None:
    assert widest_dtype([StoredTensor(Path(), "", (), kind) for kind in kinds]) == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8', but must be float32, .*bfloat16"),
        ({"dtype": torch.float64}, "dtype='torch.float64', but must be float32"),
        ({"device": "cpux"}, "device='cpux', but must be cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, "device='cuda:', but must be cpu, cuda or cuda:N"),
        ({"device": "gpu"}, "device='gpu', but must be cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device='cuda:99', but .* use device='cpu'"),
        ({"device": "cuda:" + "9" * 20}, "device='cuda:9{20}', but must be cpu, cuda or cuda:N"),
        ({"device": "cuda:01"}, "device='cuda:01', but must be cpu, cuda or cuda:N"),
        ({"device": "x" * 5000}, "device='x{50,200}.*, but must be cpu, cuda or cuda:N"),
        ({"quantize": "int3"}, "quantize='int3', but must be int8, int8-dynamic, int4, nf4"),
        ({"revision": "main"}, "revision='main', but .* is a local folder.*leave it out"),
    ],
)
def test_unknown_arguments_are_refused(
    folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_values_that_float16_cannot_represent_are_refused(folder: Path, name: str) -> None:
    name = f"language_model.{name}"

    def large(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state[name][7, 3] = 70000.0
        return state

    rewrite(folder, large)
    load(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match=f"{name} has values that float16 cannot .* use dtype bf"):
        load(folder, dtype="float16")


# ------------------------------------------------------------ tensors that do not fit


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The error of a load that must not read any tensor's data."""

    def read(*_: object) -> Tensor:
        raise AssertionError("data was read before the headers were compared")

    monkeypatch.setattr(StoredTensor, "read", read)
    with pytest.raises(ValueError, match=r"the tensors in .* are not those") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_that_does_not_fit_is_listed_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        del state["language_model.model.layers.1.mlp.up_proj.weight"]
        del state["vision_tower.embeddings.class_embedding"]
        state["language_model.model.norm.weight"] = torch.zeros(31)
        state["vision_tower.pre_layrnorm.bias"] = torch.zeros(16, dtype=torch.int8)
        state["image_newline"] = torch.zeros(32)
        state["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
        state["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        return state

    rewrite(folder, change)
    message = refused(folder, monkeypatch)
    assert (
        "2 missing: vision_tower.vision_model.embeddings.class_embedding, "
        "language_model.model.layers.1.mlp.up_proj.weight;" in message
    )
    assert "3 unknown: " in message
    for name in ("image_newline", "layers.2.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias"):
        assert name in message
    assert "2 of another shape or type: " in message
    assert "language_model.model.norm.weight (31,) for (32,)" in message
    assert "vision_tower.pre_layrnorm.bias I8 for F32 or F16 or BF16" in message


def test_a_long_list_is_cut_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, lambda s: {n: t for n, t in s.items() if "vision_tower" not in n})
    message = refused(folder, monkeypatch)
    missing = 5 + 2 * 16 + 2  # embeddings, pre-norm, two blocks, post-norm
    assert f"{missing} missing: " in message
    assert f", and {missing - 10} more" in message
    assert message.count("vision_tower.vision_model.") == 10


def test_one_tensor_under_two_names_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "multi_modal_projector.linear_1.bias"
    rewrite(folder, lambda state: {**state, f"model.{name}": torch.zeros(32)})
    message = refused(folder, monkeypatch)
    assert f"1 unknown: {name} (beside model.{name})" in message


def test_tensors_that_are_computed_may_be_in_the_file(folder: Path) -> None:
    computed = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.rotary_emb.inv_freq": torch.ones(4),
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    expected = load(folder)[0].state_dict()
    rewrite(folder, lambda state: {**state, **computed})
    state = load(folder)[0].state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("section", "sizes"),
    [
        ("text_config", {"num_hidden_layers": 10**6}),
        ("vision_config", {"num_hidden_layers": 10**6}),
        ("text_config", {"vocab_size": 10**7}),
        ("text_config", {"hidden_size": 10**7, "num_attention_heads": 10}),
        ("text_config", {"intermediate_size": 10**7}),
        ("text_config", {"head_dim": 10**7}),
        ("vision_config", {"hidden_size": 10**7, "num_attention_heads": 1}),
        ("vision_config", {"intermediate_size": 10**7}),
        ("vision_config", {"image_size": 10**7, "patch_size": 1}),
        ("vision_config", {"image_size": 10**6, "patch_size": 10**6}),
    ],
    ids=str,
)
def test_a_model_beyond_the_files_is_refused_before_it_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, section: str, sizes: dict[str, int]
) -> None:
    def build(*_: object) -> LLaVA:
        raise AssertionError("the model was built before the headers were compared")

    monkeypatch.setattr("minillava.loading.checkpoint.empty_model", build)
    rewrite_config(folder, lambda values: values[section].update(sizes))
    side = sizes.get("image_size")
    if side:
        rewrite_config(folder, lambda v: v.update(size=side, crop_size=side), PICTURES)
    with pytest.raises(ValueError, match=r"config\.json: |crop_size|size is ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_long_names_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"{i}{'x' * 5000}\n": torch.zeros(1) for i in range(30)}
    rewrite(folder, lambda state: {**state, **names, "0\n0": torch.zeros(1)})
    message = refused(folder, monkeypatch)
    assert len(message) < 1500
    assert r"0\n0" in message


# ------------------------------------------------------------ files


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
    ],
)
@pytest.mark.parametrize("kind", ["dangling", "pipe", "folder", "device", "loop"])
def test_only_regular_files_are_opened(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    if kind == "dangling":
        path.symlink_to(folder / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*must be a regular file"):
        load(folder)


def test_links_to_files_are_followed(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file()]
    snapshot = folder / "snapshots" / "main"  # as in the hub's cache
    snapshot.mkdir(parents=True)
    for path in files:
        (snapshot / path.name).symlink_to(path)
    assert load(snapshot)[0].config == load(folder)[0].config


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b" " * 3_000_000)
    with pytest.raises(ValueError, match=r"a\.json has more than 2 MB"):
        read_json(path, 2 * 2**20)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    assert not is_present(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no"):
        read_bytes(tmp_path / "nothing", 1)
    with pytest.raises(ValueError, match="cannot be read"):
        is_present(tmp_path / ("x" * 5000))
    with pytest.raises(ValueError, match="must be a regular file"):
        is_present(tmp_path / "a\0b")
    long = tmp_path / "/".join(["y" * 200] * 10)
    long.mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a regular file") as caught:
        is_present(long)
    assert len(str(caught.value)) < 700


def test_weights_do_not_change_with_their_file(folder: Path) -> None:
    model, _ = load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = folder / "model.safetensors"
    with path.open("r+b") as file:  # in place: the weights would change if they were mapped
        file.seek(path.stat().st_size // 2)
        file.write(b"\0" * (path.stat().st_size // 2))
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: data[: len(data) // 2],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        lambda data: b"\xff" * 64,
    ],
)
def test_a_damaged_file_is_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"truncated, damaged or not a safetensors.*download it"
    ) as caught:
        load(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-00002-of-00002.safetensors"}, "model-00002-of-00002.safetensors.*not there"),
        ({"a": "../model.safetensors"}, "'../model.safetensors'.*in its own folder"),
        ({"a": "/etc/passwd"}, "'/etc/passwd'.*in its own folder"),
        ({"a": ".."}, "in its own folder"),
        ({"a": 3}, "not there"),
        ({"a": ["b"]}, "not there"),
        ({}, "weight_map"),
        (["a"], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: object, message: str) -> None:
    folder = tmp_path / "checkpoint"
    write_hf(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")  # ../ does exist
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(index) in str(caught.value)
    assert "; " in str(caught.value)


def remove_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def use_original_layout(folder: Path) -> None:
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "openai/clip"}))
    replace_by_pickle(folder)


def replace_tokenizer_model(folder: Path) -> None:
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_file("model.safetensors"), "neither model.safetensors nor .*; give the folder"),
        (replace_by_pickle, r"pickles \(pytorch_model.bin\).*`python -m weights.convert .* DST`"),
        (use_original_layout, "original LLaVA layout.*`python -m weights.convert SRC DST`"),
        (remove_file("config.json"), "there is no .*config.json"),
        (replace_tokenizer_model, "tokenizer.json is not valid json"),
        (remove_file("tokenizer.model"), "neither tokenizer.json nor tokenizer.model; copy one"),
    ],
)
def test_an_incomplete_folder_is_refused_with_a_remedy(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ opened files


def test_a_file_is_opened_once_for_all_small_tensors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for each of the others alone."""
    expected, open_file = load(folder)[0].state_dict(), tensor_files._open_safetensors
    opened = []

    def noting(path: Path) -> Any:
        opened.append(path)
        return open_file(path)

    monkeypatch.setattr(tensor_files, "_open_safetensors", noting)
    found = load(folder)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(opened) == 2  # the headers, and the values
    opened.clear()
    monkeypatch.setattr(tensor_files, "SMALL", 4000)
    found = load(folder)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    large = sum(math.prod(tensor.shape) > 4000 for tensor in read_headers(folder))
    assert large > 1
    assert len(opened) == 2 + 1 + large  # listing the headers opened the file once more


def test_small_tensors_are_read_from_their_own_files(tmp_path: Path) -> None:
    """Also if another file has a tensor of the same name."""
    for i, name in enumerate(("a", "b")):
        save_file({"x": torch.full((2,), float(i))}, tmp_path / name)
    found = {name: tensor_files.read_header(tmp_path / name)[0] for name in ("a", "b")}
    read = tensor_files.read_small(found)
    values = [t.read(torch.device("cpu"), torch.float32)[0] for t in read.values()]
    assert values == [0.0, 1.0]
    changed = read["a"].read(torch.device("cpu"), torch.float32).fill_(5.0)
    assert changed[0] != read["a"].read(torch.device("cpu"), torch.float32)[0]


# ------------------------------------------------------------ memory


PEAK = """
import sys, torch
from pathlib import Path
from minillava.loading.checkpoint import load

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
held = [load(sys.argv[1])]  # the first load also allocates what all loads share
for folder in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    held.append(load(folder))  # kept, since the next load would reuse freed memory
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_memory_peaks_at_the_weights_plus_one_tensor(tmp_path: Path) -> None:
    config = json.loads((TINY_A / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 8}
    with torch.device("meta"):
        shapes = LLaVA(parse_config(config)).state_dict()
    sizes = [tensor.numel() * 4 for tensor in shapes.values()]
    assert sum(sizes) > 25 * max(sizes)
    folders = [tmp_path / "16-bit", tmp_path / "32-bit"]
    for folder, dtype in zip(folders, (torch.float16, torch.float32), strict=True):
        folder.mkdir()
        for name in SMALL_FILES:
            shutil.copy(TINY_A / name, folder)
        (folder / "config.json").write_text(json.dumps(config))
        state = {published_name(n): torch.ones(t.shape, dtype=dtype) for n, t in shapes.items()}
        save_file(state, folder / "model.safetensors")

    command = [sys.executable, "-c", PEAK, str(TINY_A), *map(str, folders)]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    for rise in map(int, out.split()):
        slack = 3 * 2**20  # headers and pages; a second copy of the 16-bit file would be 29 MB
        assert sum(sizes) <= rise + slack
        assert rise <= sum(sizes) + max(sizes) + slack


def test_match_tensors_needs_headers_only(folder: Path) -> None:
    tensors = read_headers(folder)
    with torch.device("meta"):
        model = LLaVA(read_config(folder / "config.json"))
    assert match_tensors(model, tensors, folder).keys() == model.state_dict().keys()


@pytest.mark.parametrize("tied", [False, True])
def test_which_layers_get_how_many_bits(tied: bool) -> None:
    """Decoder blocks as asked, but 8 bits where a row is odd: `down_proj` reads 41 numbers here."""
    vision = VisionConfig(num_hidden_layers=1)
    text = TextConfig(intermediate_size=41, num_hidden_layers=1, tie_word_embeddings=tied)
    model = empty_model(Config(vision, text))
    forms = quantised_layers(model, "int4")
    block = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"}
    block |= {"mlp.gate_proj", "mlp.up_proj"}
    four = {name for name, form in forms.items() if form == "int4"}
    assert four == {f"llama.blocks.0.{n}" for n in block}
    eight = {name for name, form in forms.items() if form == "int8"}
    assert {"llama.blocks.0.mlp.down_proj", "vision.blocks.0.mlp.fc1"} <= eight
    assert any(name.startswith("projector") for name in eight)
    assert ("llama.lm_head" in eight) != tied
    assert set(forms) <= {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(quantised_layers(model, "int8").values()) == {"int8"}


@pytest.mark.parametrize("exact", [True, False])
def test_which_layers_get_one_digit(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder as asked, tower and projector where a digit has 8 bits, never the head."""
    monkeypatch.setattr("minillava.loading.assemble.kernel_works", lambda kind: exact)
    model = empty_model(Config(VisionConfig(num_hidden_layers=1), TextConfig(num_hidden_layers=1)))
    for form in ("int8", "int8-dynamic", "int4"):
        forms = choose_forms(model, {}, form, Path())
        assert forms["llama.blocks.0.mlp.up_proj"] == form
        assert forms["llama.lm_head"] == "int8"
        tower = "int8-dynamic" if exact and form != "int8" else "int8"
        assert forms["vision.blocks.0.mlp.fc1"] == forms["projector.linear_1"] == tower
