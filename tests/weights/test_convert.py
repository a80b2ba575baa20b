"""Conversion to the llava-hf layout: equal bits, no partial files, one-line errors.

The source layouts are made from the reference checkpoint tiny-a by renaming its tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import refusal
from torch import Tensor

from minillava import load
from minillava.generate import generate
from weights import convert as converter
from weights import download, quantise
from weights import files as writer
from weights.convert import convert, main
from weights.files import LOCK, PART, PROGRESS

ROOT = Path(__file__).parents[2]
HUB = ROOT / "tests" / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
State = dict[str, Tensor]
INNER = "model.vision_tower.vision_tower."
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "intermediate_size": 172,
    "max_length": 4096,
    "max_position_embeddings": 2048,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "clip",
    "model_type": "llava_llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float32",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
    "vocab_size": 320,
}
CLIP_CONFIG = json.loads((HUB / "config.json").read_text())["vision_config"]


def state_of(folder: Path) -> State:
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


# ---------------------------------------------------------------- layouts


def original_names(hub: State) -> State:
    """Decoder and projector with the original code's names, and a buffer that old files have."""
    state = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    for name, tensor in hub.items():
        if name.startswith("language_model."):
            state[name.removeprefix("language_model.")] = tensor
        elif name.startswith("multi_modal_projector."):
            for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
                name = name.replace(f"multi_modal_projector.{ours}", f"model.mm_projector.{theirs}")
            state[name] = tensor
    return state


def clip_names(hub: State) -> State:
    """The vision tower with the names of Hugging Face's CLIPVisionModel."""
    tower = {n.removeprefix("vision_tower."): t for n, t in hub.items() if "vision_tower" in n}
    return tower | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}


def clip_model_names(hub: State) -> State:
    """The vision tower in a CLIPModel, which has a text tower too."""
    return clip_names(hub) | {
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2),
        "text_model.embeddings.position_ids": torch.arange(4)[None],
        "visual_projection.weight": torch.zeros(2, 32),
        "text_projection.weight": torch.zeros(2, 2),
        "logit_scale": torch.tensor(1.0),
    }


def open_clip_names(hub: State) -> State:
    """The vision tower as in open_clip and OpenAI's CLIP: q, k and v are one matrix."""
    tower, state = clip_names(hub), {}
    for name in tower:
        new = re.sub(r"vision_model\.encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1.", name)
        for ours, theirs in {
            "vision_model.embeddings.class_embedding": "class_embedding",
            "vision_model.embeddings.position_embedding.weight": "positional_embedding",
            "vision_model.embeddings.patch_embedding.": "conv1.",
            "vision_model.pre_layrnorm.": "ln_pre.",
            "vision_model.post_layernorm.": "ln_post.",
            "layer_norm": "ln_",
            "self_attn.out_proj": "attn.out_proj",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items():
            new = new.replace(ours, theirs)
        if "q_proj" in name:
            three = [tower[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            new = new.replace("self_attn.q_proj.", "attn.in_proj_")
            state[f"visual.{new}"] = torch.cat(three)
        elif not re.search(r"[kv]_proj|position_ids", name):
            state[f"visual.{new}"] = tower[name]
    return state | {
        "visual.proj": torch.zeros(32, 8),
        "positional_embedding": torch.zeros(7, 8),
        "text_projection": torch.zeros(8, 8),
        "token_embedding.weight": torch.zeros(3, 8),
        "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8),
        "ln_final.weight": torch.zeros(8),
        "logit_scale": torch.tensor(1.0),
        "input_resolution": torch.tensor(56),
    }


def write_shards(folder: Path, state: State, pickled: bool = True, n: int = 2) -> None:
    names = list(state)
    size = -(-len(names) // n)
    where = {}
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    for i in range(n):
        file = f"{stem}-{i + 1:05d}-of-{n:05d}.{ending}"
        shard = {name: state[name].clone() for name in names[i * size : (i + 1) * size]}
        (torch.save if pickled else save_file)(shard, folder / file)
        where |= dict.fromkeys(shard, file)
    index = f"{stem}.{ending}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_small(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HUB / "tokenizer.model", folder)
    values = {"legacy": False, "pad_token": "<unk>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps(config))


def write_original(
    folder: Path, state: State, *, inside: bool = False, pickled: bool = True, **config: Any
) -> Path:
    """An original checkpoint with its vision tower inside, or in clip/, which its config names."""
    write_small(folder, CONFIG | config)
    tensors = original_names(state)
    if inside:
        tensors |= {INNER + name: t for name, t in clip_names(state).items()}
    else:
        write_clip(folder / "clip", clip_names(state))
    write_shards(folder, tensors, pickled)
    return folder


def write_clip(folder: Path, state: State, file: str = "model.safetensors") -> Path:
    folder.mkdir()
    (torch.save if file.endswith(".bin") else save_file)(state, folder / file)
    if file.startswith("open_clip"):
        vision = {"width": 32, "layers": 3, "head_width": 8, "patch_size": 14, "image_size": 56}
        config = {"model_cfg": {"vision_cfg": vision, "quick_gelu": True}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    else:
        (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
        old = {"size": 56, "crop_size": 56, "resample": 3, "do_resize": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(old))
    return folder


@pytest.fixture(scope="module")
def hub() -> State:
    return state_of(HUB)


@pytest.fixture
def src(tmp_path: Path, hub: State) -> Path:
    return write_original(tmp_path / "src", hub)


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "dst"


def assert_same(dst: Path, expected: State) -> None:
    state = state_of(dst)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_an_original_checkpoint_keeps_every_bit(
    tmp_path: Path, dst: Path, hub: State, pickled: bool, inside: bool
) -> None:
    src = write_original(tmp_path / "src", hub, inside=inside, pickled=pickled)
    if inside:  # the weights do not say how many heads there are: that is read from the CLIP
        write_clip(src / "clip", {"x": torch.zeros(1)})
    convert(src, dst)
    assert_same(dst, hub)


def test_answers_equal_the_hub_layouts(src: Path, dst: Path) -> None:
    convert(src, dst)
    (model, processor), (expected, theirs) = load(dst), load(HUB)
    assert (processor.template, processor.aspect) == ("vicuna_v1", "pad")
    assert processor.tokenizer.special_tokens == theirs.tokenizer.special_tokens
    assert processor.image == theirs.image
    images = [[Image.new("RGB", (70, 40), (10, 200, 90))]]
    prompt = ["USER: <image>\nWhat is it? ASSISTANT:"]
    batches = [p(prompt, images, image_aspect="pad") for p in (processor, theirs)]
    assert torch.equal(batches[0].ids, batches[1].ids)
    results = [
        generate(m, b, max_new_tokens=6, output_logits=True)
        for m, b in zip((model, expected), batches, strict=True)
    ]
    assert results[0].tokens == results[1].tokens
    assert torch.equal(results[0].logits, results[1].logits)


def test_transformers_opens_it_and_its_logits_agree(src: Path, dst: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    convert(src, dst)
    theirs = LlavaForConditionalGeneration.from_pretrained(dst).eval()
    model, processor = load(dst)
    batch = processor(["<image>\nHi"], [[Image.new("RGB", (56, 56), (9, 99, 200))]])
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, pixel_values=batch.pixels).logits[:, -1]
    ours = generate(model, batch, max_new_tokens=1, output_logits=True).logits[:, 0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (clip_names, "pytorch_model.bin"),
        (clip_model_names, "model.safetensors"),
        (open_clip_names, "open_clip_model.safetensors"),
        (open_clip_names, "open_clip_pytorch_model.bin"),
    ],
)
def test_the_tower_comes_from_any_clip(
    tmp_path: Path, dst: Path, hub: State, names: Callable[[State], State], file: str
) -> None:
    src = write_original(tmp_path / "src", hub, mm_vision_tower="not/there")
    clip = write_clip(tmp_path / "clip", names(hub), file)
    assert main([str(src), str(dst), "--vision-tower", str(clip)]) == 0
    assert_same(dst, hub)
    assert load(dst)[1].image == load(HUB)[1].image


def test_the_next_command_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: State
) -> None:
    src = write_original(tmp_path / "src", hub, mm_vision_tower="not/there")
    clip = write_clip(tmp_path / "clip", clip_model_names(hub), "model.safetensors")
    for act, words in (
        (main, [str(src), "--vision-tower", str(clip)]),
        (quantise.main, [str(HUB), "--bits", "8"]),
    ):
        dst = tmp_path / act.__module__ / "it's ü"
        assert act([*words, str(dst)]) == 0
        told, _, command = capsys.readouterr().out.partition(" is complete: ")
        assert told == str(dst)
        assert shlex.split(command) == ["python", "-m", "minillava.generate", "--model", str(dst)]


def test_one_file_of_weights_is_enough_if_heads_are_64_wide(
    tmp_path: Path, dst: Path, hub: State
) -> None:
    wide = {"class_embedding": (64,), "positional_embedding": (17, 64)}
    wide |= {"conv1.weight": (64, 3, 14, 14)}
    for name in ("ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{j}" for i, j in PAIRS)):
        wide |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    for i in range(2):
        block = f"transformer.resblocks.{i}"
        for name, (n, m) in {"attn.out_proj": (64, 64), "mlp.c_fc": (96, 64)}.items():
            wide |= {f"{block}.{name}.weight": (n, m), f"{block}.{name}.bias": (n,)}
        wide |= {f"{block}.mlp.c_proj.weight": (64, 96), f"{block}.mlp.c_proj.bias": (64,)}
        wide |= {f"{block}.attn.in_proj_weight": (192, 64), f"{block}.attn.in_proj_bias": (192,)}
    clip = {f"visual.{name}": torch.randn(shape) for name, shape in wide.items()}
    torch.save({"state_dict": {f"module.{n}": t for n, t in clip.items()}}, tmp_path / "clip.pt")
    state = hub | {"multi_modal_projector.linear_1.weight": torch.randn(64, 64)}
    src = write_original(tmp_path / "src", state, mm_hidden_size=64)
    convert(src, dst, vision_tower=str(tmp_path / "clip.pt"))
    tower = load(dst)[0].vision
    assert (tower.config.num_attention_heads, tower.config.num_hidden_layers) == (1, 2)
    assert torch.equal(
        tower.blocks[1].attn.k_proj.weight,
        clip["visual.transformer.resblocks.1.attn.in_proj_weight"][64:128],
    )


PAIRS = [(i, j) for i in range(2) for j in (1, 2)]


def test_a_tower_on_the_hub_is_fetched(
    tmp_path: Path, dst: Path, hub: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_clip(tmp_path / "clip", clip_names(hub))
    asked = []

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        asked.append(repo_id)
        return str(clip)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    name = "openai/clip-vit-large-patch14-336"
    convert(write_original(tmp_path / "src", hub, mm_vision_tower=name), dst)
    assert set(asked) == {name}
    assert_same(dst, hub)


def test_pickles_of_old_torch_versions_are_read(src: Path, dst: Path, hub: State) -> None:
    for path in src.glob("*.bin"):
        state = torch.load(path, weights_only=True)
        torch.save(state, path, _use_new_zipfile_serialization=False)
    convert(src, dst)
    assert_same(dst, hub)


def test_a_projector_on_its_base(tmp_path: Path, dst: Path, hub: State) -> None:
    mm = {k: v for k, v in CONFIG.items() if k.startswith("mm_")}
    src, base = tmp_path / "src", tmp_path / "base"
    write_small(src, mm | {"model_type": "llava", "image_aspect_ratio": "square"})
    write_clip(src / "clip", clip_names(hub))
    tensors = original_names(hub)
    torch.save(
        {name: t.half() for name, t in tensors.items() if "mm_projector" in name},
        src / "mm_projector.bin",
    )
    others = {k: v for k, v in CONFIG.items() if "mm_" not in k}
    write_small(base, others | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    write_shards(base, {name: t for name, t in tensors.items() if "mm_projector" not in name})
    convert(src, dst, base=base)
    rounded = {n: t.half().float() if "multi_modal" in n else t for n, t in hub.items()}
    assert_same(dst, rounded)  # converted to the decoder's float32
    assert load(dst)[1].template == "llava-hf"


def test_pickles_in_the_hub_layout(tmp_path: Path, dst: Path, hub: State) -> None:
    src = tmp_path / "src"
    shutil.copytree(HUB, src, ignore=shutil.ignore_patterns("*.safetensors*"))
    write_shards(src, hub)
    with pytest.raises(ValueError, match=r"`python -m weights.convert .*src DST`"):
        load(src)
    convert(src, dst)
    assert_same(dst, hub)
    for name in ("config.json", "added_tokens.json", "tokenizer.model"):
        assert (dst / name).read_bytes() == (HUB / name).read_bytes()


def test_layouts_of_the_whole_reference_set(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root = request.config.getoption("--goldens").resolve() / "checkpoints"
    for folder in (p for p in sorted(root.glob("*/orig*")) if p.is_dir()):
        to = tmp_path / folder.parent.name / folder.name
        convert(folder, to)
        assert_same(to, state_of(next(folder.parent.glob("hub*"))))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_download_fetches_the_original_with_its_tower_and_names_the_next_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hub: State,
    kind: str,
) -> None:
    tower = "openai/clip-vit-large-patch14-336"
    remote = {"liuhaotian/llava": tmp_path / "remote", tower: tmp_path / "clip"}
    state = {"mm_vision_tower": tower, "pickled": kind == "bin"}
    write_original(remote["liuhaotian/llava"], hub, **state)
    write_clip(remote[tower], clip_names(hub), "pytorch_model.bin")
    (remote[tower] / "tf_model.h5").touch()

    def snapshot_download(repo_id: str, allow_patterns: list[str], **kwargs: Any) -> str:
        to = tmp_path / "the cache" / repo_id.replace("/", "--")
        to.mkdir(parents=True, exist_ok=True)
        for path in remote[repo_id].iterdir():
            if path.is_file() and any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, to)
        return str(to)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert download.main(["liuhaotian/llava"]) == 0
    out, err = capsys.readouterr()
    src = Path(out.strip())
    assert shlex.split(err) == ["next:", "python", "-m", "weights.convert", str(src), "DST"]
    assert len(list(src.glob(f"*.{kind}"))) == 2
    fetched = {path.name for path in (tmp_path / "the cache" / tower.replace("/", "--")).iterdir()}
    assert fetched == {"config.json", "preprocessor_config.json", "pytorch_model.bin"}
    convert(src, tmp_path / "dst")
    assert_same(tmp_path / "dst", hub)


# ---------------------------------------------------------------- vocabulary and dtype


def test_new_tokens_get_rows_that_are_never_chosen(tmp_path: Path, dst: Path, hub: State) -> None:
    short = hub | {name: hub[name][:318] for name in (EMBEDDING, HEAD)}
    src = write_original(tmp_path / "src", short, vocab_size=318)
    convert(src, dst)
    state = state_of(dst)
    for name in (EMBEDDING, HEAD):
        assert state[name].shape == (320, 64)  # the next multiple of 64
        assert torch.equal(state[name][:318], hub[name][:318])
        mean = hub[name][:318].double().mean(0).float()
        torch.testing.assert_close(state[name][318:], mean.expand(2, -1))
    hidden = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    assert (hidden @ state[HEAD].T).argmax(1).max() < 318

    assert json.loads((dst / "added_tokens.json").read_text()) == {"<image>": 318, "<pad>": 319}
    (model, processor), (expected, _) = load(dst), load(HUB)
    batch = processor(["<image>\nHi", "Hello <image>"], [[Image.new("RGB", (60, 60))]] * 2)
    assert generate(model, batch, max_new_tokens=8).tokens == (
        generate(expected, batch, max_new_tokens=8).tokens
    )
    with torch.no_grad():  # the added rows are never read
        model.llama.embed_tokens.weight[318:] = float("nan")
    assert generate(model, batch, max_new_tokens=1).tokens == (
        generate(expected, batch, max_new_tokens=1).tokens
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_separate_tower_is_stored_in_the_decoders_dtype(
    tmp_path: Path, dst: Path, hub: State, dtype: torch.dtype
) -> None:
    src = write_original(tmp_path / "src", {n: t.to(dtype) for n, t in hub.items()})
    write_clip(tmp_path / "clip", clip_names(hub))  # float32
    convert(src, dst, vision_tower=str(tmp_path / "clip"))
    assert_same(dst, {n: t.to(dtype) for n, t in hub.items()})
    assert json.loads((dst / "config.json").read_text())["torch_dtype"] in str(dtype)


def test_values_that_the_dtype_cannot_hold_are_refused(
    tmp_path: Path, dst: Path, hub: State
) -> None:
    src = write_original(tmp_path / "src", {n: t.half() for n, t in hub.items()})
    tower = clip_names(hub)
    tower["vision_model.pre_layrnorm.bias"] = torch.full((32,), 1e6)
    write_clip(tmp_path / "clip", tower)
    with pytest.raises(ValueError, match=r"pre_layrnorm.bias has values too large for .*float16"):
        convert(src, dst, vision_tower=str(tmp_path / "clip"))
    assert not list(dst.glob("*.safetensors*"))


# ---------------------------------------------------------------- interruption


class Stop(Exception):
    """Stands for any event that ends a process."""


def stop_at(monkeypatch: pytest.MonkeyPatch, place: str, nth: int, error: BaseException) -> None:
    """Have call `nth` (from 0) at a place raise `error`."""
    module, name = {
        "read": (converter, "_convert_dtype"),
        "sync": (writer.os, "fsync"),
        "rename": (writer.os, "replace"),
    }[place]
    function, calls = getattr(module, name), iter(range(10**9))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


def complete_files(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.glob("*.safetensors")
    }


POINTS = [
    *(("read", n) for n in (0, 40, 115)),
    *(("sync", n) for n in (1, 13, 31)),
    *(("rename", n) for n in (0, 1, 2, 8, 16)),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, hub: State) -> Path:
    """A checkpoint that was converted without an interruption; its source is src/ beside it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    convert(write_original(folder / "src", hub), folder / "dst", shard_bytes=400_000)
    return folder / "dst"


@pytest.mark.parametrize(("place", "nth"), POINTS, ids=str)
def test_an_interruption_leaves_no_partial_file_and_a_second_run_resumes(
    uninterrupted: Path, dst: Path, hub: State, place: str, nth: int
) -> None:
    src, expected = uninterrupted.with_name("src"), complete_files(uninterrupted)
    assert len(expected) == 4
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, place, nth, Stop())
        with pytest.raises(Stop):
            convert(src, dst, shard_bytes=400_000)
    before = complete_files(dst)
    assert all(expected[name][1] == digest for name, (_, digest) in before.items())
    assert not list(dst.glob(f"*{PART}"))
    if (dst / "config.json").is_file():  # written last: everything else is there
        assert_same(dst, hub)
    else:
        with pytest.raises(ValueError, match=r"config.json"):
            load(dst)
    noted = json.loads((dst / PROGRESS).read_text())["sha256"] if before else {}
    convert(src, dst, shard_bytes=400_000)
    after = complete_files(dst)
    assert {name: after[name] for name in noted} == {name: before[name] for name in noted}
    assert_same(dst, hub)
    assert {p.name: p.read_bytes() for p in dst.iterdir()} == {
        p.name: p.read_bytes() for p in uninterrupted.iterdir()
    }


@pytest.mark.slow
def test_a_run_resumes_after_its_process_was_killed(src: Path, dst: Path, hub: State) -> None:
    code = """
import os, sys
from pathlib import Path
from weights import convert, files
convert_dtype, calls = convert._convert_dtype, iter(range(1000))
def kill_at_call_60(*args):
    if next(calls) == 60:
        os.kill(os.getpid(), 9)
    return convert_dtype(*args)
convert._convert_dtype = kill_at_call_60
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=400_000)
"""
    run = subprocess.run([sys.executable, "-c", code, src, dst], cwd=ROOT, check=False)
    assert run.returncode == -9
    assert list(dst.glob(f"model-*-of-00004.safetensors{PART}"))
    assert (dst / LOCK).exists()
    convert(src, dst, shard_bytes=400_000)
    assert_same(dst, hub)
    assert not {name for name in os.listdir(dst) if name.endswith(PART) or name == LOCK}


def test_a_complete_folder_is_verified_and_only_damaged_files_are_rewritten(
    src: Path, dst: Path, hub: State
) -> None:
    convert(src, dst, shard_bytes=400_000)
    before = complete_files(dst)
    convert(src, dst, shard_bytes=400_000)
    assert complete_files(dst) == before
    first, second, *_ = sorted(dst.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.unlink()
    convert(src, dst, shard_bytes=400_000)
    after = complete_files(dst)
    assert {name for name in after if after[name] != before[name]} == {first.name, second.name}
    assert all(after[name][1] == before[name][1] for name in after)


def test_a_full_disk_is_a_one_line_error_and_the_run_resumes_later(
    src: Path, dst: Path, hub: State, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "sync", 2, OSError(28, "No space left on device", str(dst / "model")))
        assert main([str(src), str(dst)]) == 2
    assert one_error(capsys, "No space left on device.*free some space.*run the command again")
    assert not list(dst.glob("*.safetensors*"))
    assert main([str(src), str(dst)]) == 0
    assert_same(dst, hub)


def test_disk_space_is_checked_before_anything_is_written(
    src: Path, dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage(0, 0, 10**6))
    with pytest.raises(ValueError, match=r"needs 0.05 GB on a disk with 0.00 GB free"):
        convert(src, dst)
    assert not dst.exists()


def test_ctrl_c_exits_130(src: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, "read", 3, KeyboardInterrupt())
    assert main([str(src), str(dst)]) == 130
    assert not list(dst.glob("*.safetensors*"))


def test_a_second_process_is_refused(src: Path, dst: Path) -> None:
    dst.mkdir()
    with (
        FileLock(dst / LOCK),
        pytest.raises(ValueError, match="being written by another process"),
    ):
        convert(src, dst)


# ---------------------------------------------------------------- bad input


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class Builtin(Evil):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.mark)!r})",)


def one_error(capsys: pytest.CaptureFixture[str], says: str) -> bool:
    err = refusal(capsys)
    assert re.search(says, err), err
    return True


def change(file: str, edit: Callable[[State], Any]) -> Callable[[Path], Any]:
    def break_source(src: Path) -> None:
        state = torch.load(src / file, weights_only=True)
        torch.save(edit(state) or state, src / file)

    return break_source


def entry(**values: Any) -> Callable[[Path], Any]:
    def break_source(src: Path) -> None:
        config = json.loads((src / "config.json").read_text()) | values
        (src / "config.json").write_text(json.dumps(config))

    return break_source


def index(**renamed: str) -> Callable[[Path], Any]:
    def break_source(src: Path) -> None:
        path = src / "pytorch_model.bin.index.json"
        content = json.loads(path.read_text())
        content["weight_map"]["lm_head.weight"] = renamed["to"]
        path.write_text(json.dumps(content))

    return break_source


def truncate(file: str) -> Callable[[Path], Any]:
    return lambda src: os.truncate(src / file, (src / file).stat().st_size * 2 // 3)


def flip_bit(src: Path) -> None:
    with (src / FIRST).open("r+b") as file:
        data = bytearray(file.read())
        data[len(data) // 2] ^= 1
        file.seek(0)
        file.write(data)


def write_torchscript_clip(src: Path) -> None:
    (src / "clip" / "model.safetensors").unlink()
    with zipfile.ZipFile(src / "clip" / "ViT.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/x.py"):
            archive.writestr(f"ViT/{name}", b"\x80\x02}.")
        archive.writestr("ViT/version", b"3\n")


def write_wrong_sum(src: Path) -> None:
    (src / "SHA256SUMS").write_text(f"{'0' * 64}  {FIRST}\n")


def clip_entry(**values: Any) -> Callable[[Path], Any]:
    def break_source(src: Path) -> None:
        path = src / "clip" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return break_source


def open_clip(**values: Any) -> Callable[[Path], Any]:
    """Store the vision tower in open_clip's form, with these values in its config."""

    def break_source(src: Path) -> None:
        tower = open_clip_names(state_of(HUB))
        shutil.rmtree(src / "clip")
        path = write_clip(src / "clip", tower, "open_clip_model.safetensors")
        path = path / "open_clip_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return break_source


def twice(name: str) -> Callable[[Path], Any]:
    """Store the tensor also in the second shard, under this name and with other values."""

    def break_source(src: Path) -> None:
        first = torch.load(src / FIRST, weights_only=True)
        change(SECOND, lambda s: s.update({name: first[NORM] + 1}))(src)

    return break_source


def wrong_sum(file: str) -> Callable[[Path], Any]:
    return lambda src: (src / "SHA256SUMS").write_text(f"{'0' * 64} *{file}\n")


FIRST, SECOND = (f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2))
NORM = "model.layers.0.input_layernorm.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated pickle": (truncate(SECOND), f"{SECOND} is truncated"),
    "empty pickle": (lambda src: (src / SECOND).write_bytes(b""), f"{SECOND} is truncated"),
    "pointer": (lambda src: (src / FIRST).write_text("version https://git"), "is truncated, dam"),
    "truncated tower": (truncate("clip/model.safetensors"), "model.safetensors is truncated"),
    "bit": (flip_bit, f"{FIRST} is damaged"),
    "sums": (write_wrong_sum, f"{FIRST} has SHA-256 .* but should have 0000"),
    "sum of a small file": (
        wrong_sum("tokenizer.model"),
        "tokenizer.model has SHA-256 .* but should have 0000",
    ),
    "twice": (twice(NORM), f"{SECOND}: {NORM} is there twice, also as {NORM} in {FIRST}"),
    "twice, under two names": (
        change(
            FIRST,
            lambda s: s.update(
                {
                    "mm_projector.0.bias": torch.zeros(64),
                    "model.mm_projector.0.bias": torch.ones(64),
                }
            ),
        ),
        "mm_projector.0.bias is there twice, also as ",
    ),
    "sparse": (
        change(FIRST, lambda s: s.update({NORM: s[NORM].to_sparse()})),
        "named, dense tensors with their values",
    ),
    "no values": (change(FIRST, lambda s: s.update({NORM: s[NORM].to("meta")})), "named, dense"),
    "numbered": (
        lambda src: torch.save({"state_dict": {1: torch.zeros(1)}}, src / FIRST),
        "missing: .*1 unknown: 1",
    ),
    "missing shard": (lambda src: (src / FIRST).unlink(), f"names {FIRST}, which is not there"),
    "outside": (index(to="../evil.bin"), r"names '../evil.bin', but must name files in its own"),
    "absolute": (index(to="/etc/passwd"), r"names '/etc/passwd', but must name files in its own"),
    "code": (
        lambda src: torch.save({"x": Evil(src.parent / "mark")}, src / SECOND),
        r"asks for posix.mkdir when opened, which is code.*not run",
    ),
    "code that is built in": (
        lambda src: torch.save({"x": Builtin(src.parent / "mark")}, src / SECOND),
        r"asks for (builtins\.)?eval when opened, which is code.*not run",
    ),
    "a long header and no end": (
        lambda src: os.truncate(src / SECOND, 30_000),
        f"{SECOND} is truncated",
    ),
    "old code": (
        lambda src: torch.save(
            {"x": Evil(src.parent / "mark")}, src / SECOND, _use_new_zipfile_serialization=False
        ),
        r"asks for posix.mkdir when opened",
    ),
    "no tensors": (
        lambda src: torch.save([1, 2], src / FIRST),
        "other things than named, dense tensors",
    ),
    "shape": (change(FIRST, lambda s: s.update({NORM: torch.zeros(63)})), r"1 of another shape"),
    "missing": (change(FIRST, lambda s: s.pop(NORM) is None), r"1 missing: .*layers.0.input_layer"),
    "unknown": (change(FIRST, lambda s: s.update({"model.new": torch.zeros(1)})), "model.new"),
    "quantised": (
        change(FIRST, lambda s: s.update({NORM: torch.zeros(64, dtype=torch.int8)})),
        "of another shape or type: .*int8",
    ),
    "next": (
        change(FIRST, lambda s: s.update({"model.image_newline": torch.zeros(64)})),
        "image_newline, so they are a LLaVA-NeXT",
    ),
    "no embedding": (
        change(FIRST, lambda s: s.pop("model.embed_tokens.weight") is None),
        "1 missing: language_model.model.embed_tokens.weight",
    ),
    "lora": (lambda src: (src / "adapter_model.bin").touch(), "LoRA adapters .* merge them"),
    "linear": (entry(mm_projector_type="linear"), "mm_projector_type is 'linear', but must be"),
    "no projector": (entry(mm_projector_type=None), "mm_projector_type is None, but must be"),
    "markers": (entry(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
    "class": (entry(mm_vision_select_feature="cls_patch"), "'cls_patch', but must be 'patch'"),
    "layer": (entry(mm_vision_select_layer=-9), "vision_feature_layer is -9, but must be"),
    "anyres": (entry(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
    "mistral": (entry(model_type="llava_mistral"), "model_type is 'llava_mistral'"),
    "stranger": (entry(sliding_windows=7), "sliding_windows is 7, an entry that minillava does"),
    "no tower": (entry(mm_vision_tower=None), "mm_vision_tower is None, .*--vision-tower"),
    "lost tower": (entry(mm_vision_tower="../no where"), "'../no where' is neither a folder"),
    "tuned tower": (entry(unfreeze_mm_vision_tower=True), "tower was trained too"),
    "gelu": (clip_entry(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "patches": (
        clip_entry(patch_size=0),
        "clip/config.json: patch_size is 0, but must be one whole",
    ),
    "image size": (
        clip_entry(image_size="x"),
        "clip/config.json: image_size is 'x', but must be one",
    ),
    "open_clip's gelu": (
        open_clip(model_cfg={"vision_cfg": {"head_width": 8}}),
        "model_cfg.quick_gelu is None, but",
    ),
    "open_clip's heads": (
        open_clip(model_cfg={"quick_gelu": True, "vision_cfg": {"head_width": "x"}}),
        "vision_cfg.head_width is 'x', but must be",
    ),
    "open_clip's model_cfg": (open_clip(model_cfg=3), "model_cfg is 3, but must be an object"),
    "open_clip's colours": (
        open_clip(preprocess_cfg={"mean": [1, 2], "std": None}),
        r"preprocess_cfg.mean is \[1, 2\], but must be three numbers",
    ),
    "program": (
        write_torchscript_clip,
        "ViT.pt is a TorchScript archive, a program .* plain weights",
    ),
    "no clip": (
        lambda src: save_file({"x": torch.zeros(1)}, src / "clip" / "model.safetensors"),
        r"clip are not|unknown: vision_tower.vision_model.x",
    ),
    "rows": (entry(vocab_size=100), "ids go up to 317, but the weights have 100 rows"),
    "no tokenizer": (lambda src: (src / "tokenizer.model").unlink(), "no .*tokenizer.model"),
    "no config": (lambda src: (src / "config.json").unlink(), "there is no .*config.json"),
    "no weights": (
        lambda src: (src / "pytorch_model.bin.index.json").unlink(),
        "has no weights: neither pytorch_model.bin",
    ),
}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_one_line_error_before_anything_is_written(
    src: Path, dst: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_source, says = BAD[case]
    break_source(src)
    before = snapshot(src)
    assert main([str(src), str(dst)]) == 2
    assert one_error(capsys, says)
    assert not dst.exists()
    assert snapshot(src) == before
    assert not (src.parent / "mark").exists(), "code in a pickle was run"


def test_a_corrected_source_is_converted(src: Path, dst: Path, hub: State) -> None:
    write_wrong_sum(src)
    assert main([str(src), str(dst)]) == 2
    digest = hashlib.sha256((src / FIRST).read_bytes()).hexdigest()
    (src / "SHA256SUMS").write_text(f"{digest} *{FIRST}\n")
    convert(src, dst)
    assert_same(dst, hub)


def test_a_source_that_needs_no_conversion_is_refused(
    dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(HUB), str(dst)]) == 2
    assert one_error(capsys, "llava-hf layout already.*load it as it is: python -m minillava")


def test_folders_are_checked_first(
    src: Path, dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "photo.png").touch()
    file.touch()
    (loop := tmp_path / "loop").symlink_to(loop)
    for at, to, says in (
        (src, taken, r"contains other files \(photo.png\)"),
        (src, file, "file is a file"),
        (
            src,
            file / "new",
            r"file/new cannot be written \(Not a directory\); give a writable folder",
        ),
        (src, src, "is inside .*src, which is only read"),
        (src, src / "new", "is inside .*src, which is only read"),
        (src, src / "clip", "is inside .*src"),
        (src, loop, "loop is a file"),
        (tmp_path / "nowhere", dst, "there is no folder .*nowhere; download"),
    ):
        assert main([str(at), str(to)]) == 2
        assert one_error(capsys, says)
    convert(src, dst)
    config = json.loads((src / "config.json").read_text())
    write_original(tmp_path / "other", {n: t + 1 for n, t in state_of(HUB).items()}, **config)
    assert main([str(tmp_path / "other"), str(dst)]) == 2
    assert one_error(capsys, "was written from other files or with other options")


def test_a_projector_without_a_base_is_refused(
    src: Path, dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(src), str(dst), "--base", str(src)]) == 2
    assert one_error(capsys, "contains a language model .*leave out --base")
    (src / "pytorch_model.bin.index.json").unlink()
    torch.save({}, src / "mm_projector.bin")
    assert main([str(src), str(dst)]) == 2
    assert one_error(capsys, "only a projector .*with --base")
    base = tmp_path / "base"
    write_small(base, {"model_type": "mistral"})
    assert main([str(src), str(dst), "--base", str(base)]) == 2
    assert one_error(capsys, "has no weights of a language model")
    write_shards(base, {"x": torch.zeros(1)})
    assert main([str(src), str(dst), "--base", str(base)]) == 2
    assert one_error(capsys, "model_type is 'mistral', but --base must be a plain 'llama'")
