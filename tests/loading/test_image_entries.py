"""Every entry of preprocessor_config.json and processor_config.json: the pixels of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from minillava.loading.checkpoint import load
from minillava.loading.image_config import IMAGES, PROCESSOR, pads_images, read_image_config
from minillava.loading.json_entries import Only, Unused
from minillava.processing.image import preprocess

TINY_A = Path(__file__).parents[1] / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
OWN = json.loads((TINY_A / "preprocessor_config.json").read_text())
LLAVA = {"image_processor_type": "LlavaImageProcessor"}
PADDED = {**LLAVA, "do_pad": True}

RANDOM = np.random.default_rng(0)
SHAPES = ((90, 150), (151, 90), (34, 33))
PICTURES = [Image.fromarray(RANDOM.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in SHAPES]


def folder_with(to: Path, entries: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    shutil.copy(TINY_A / "config.json", to)
    values = {k: v for k, v in OWN.items() if k not in without} | entries
    (to / "preprocessor_config.json").write_text(json.dumps(values))
    return to


def check_pixels(folder: Path) -> None:
    """Equal to transformers bit for bit."""
    theirs = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    config, aspect = read_image_config(folder, 56), "pad" if pads_images(folder) else "crop"
    for picture in PICTURES:
        expected = theirs(picture, return_tensors="pt").pixel_values[0]
        assert torch.equal(preprocess(picture, config, aspect), expected)


def test_the_table_has_all_that_transformers_reads() -> None:
    for processor in (CLIPImageProcessorPil, LlavaImageProcessorPil):
        asked = get_type_hints(processor.valid_kwargs).keys()
        assert asked - IMAGES.keys() == set()


FOLLOWED: list[dict[str, Any]] = [
    {},
    LLAVA,
    PADDED,
    {**LLAVA, "do_pad": False},
    {"do_pad": True},  # of CLIP's: the finished squares are padded to the size they have
    {"do_pad": None},
    {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True},
    {"image_processor_type": "LlavaImageProcessorPil", "do_pad": True},
    {"image_processor_type": "CLIPImageProcessorFast", "do_pad": True},
    {"image_processor_type": "CLIPImageProcessorPil"},
    {"image_processor_type": None, "do_pad": True},
    {
        "image_processor_type": None,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_pad": True,
    },
    {
        "image_processor_type": None,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "auto_map": {"AutoImageProcessor": "code.Class"},
        "do_pad": True,
    },
    {"feature_extractor_type": "CLIPFeatureExtractor"},
    {**PADDED, "pad_size": {"height": 60, "width": 60}},
    {"pad_size": {"height": 60, "width": 60}},
    {"size": 56},
    {"size": 70, "default_to_square": False},
    {"size": {"shortest_edge": 70}, "default_to_square": True},
    {**PADDED, "size": 70},
    {**PADDED, "size": 70, "default_to_square": True},
    {**PADDED, "size": {"height": 60, "width": 60}},
    {"crop_size": 56},
    {"resample": 1},
    {"resample": 2},
    {"resample": 4},
    {"rescale_factor": 1 / 127.5},
    {"rescale_factor": 1},
    {"image_mean": [0.1, 0.9, 0.0], "image_std": [1, 2, 0.5]},
    {**PADDED, "image_mean": [0.9, 0.1, 0.2]},
]


@pytest.mark.parametrize("entries", FOLLOWED, ids=str)
def test_followed_entries_give_the_pixels_of_transformers(
    tmp_path: Path, entries: dict[str, Any]
) -> None:
    check_pixels(folder_with(tmp_path, entries))


@pytest.mark.parametrize(
    "key", [*("size", "resample", "rescale_factor", "image_mean", "image_std"), *sorted(OWN)]
)
def test_missing_entries_get_the_defaults_of_transformers(tmp_path: Path, key: str) -> None:
    folder = folder_with(tmp_path, {}, without=(key,))
    if key == "crop_size":
        with pytest.raises(ValueError, match="crop_size is 224, but must be 56"):
            read_image_config(folder, 56)
    else:
        check_pixels(folder)


VALUES: dict[str, Any] = {
    "data_format": "channels_last",
    "input_data_format": "channels_first",
    "return_tensors": "np",
    "device": "cpu",
    "disable_grouping": True,
    "image_seq_length": 3,
    "processor_class": "X",
    "do_flip_channel_order": True,  # the last three are in no table
    "do_reduce_labels": True,
    "antialias": False,
}


@pytest.mark.parametrize("key", VALUES)
def test_an_entry_without_influence_is_let_pass(tmp_path: Path, key: str) -> None:
    unused = {k for k, rule in IMAGES.items() if isinstance(rule, Unused)}
    assert unused <= VALUES.keys()
    check_pixels(folder_with(tmp_path, {key: VALUES[key]}))


@pytest.mark.parametrize("key", [k for k, rule in IMAGES.items() if isinstance(rule, Only)])
def test_another_value_is_refused_by_name(tmp_path: Path, key: str) -> None:
    value = key not in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    value = False if key == "do_convert_rgb" else value
    folder = folder_with(tmp_path, {key: value})
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {key} is {value}, but must"):
        read_image_config(folder, 56)


@pytest.mark.parametrize("key", [k for k in OWN if k.startswith("do_")] + ["size", "resample"])
def test_null_is_no_default(tmp_path: Path, key: str) -> None:
    folder = folder_with(tmp_path, {key: None})
    with pytest.raises(ValueError, match=f"{key} is None, but must be absent or a value"):
        read_image_config(folder, 56)


def test_a_pad_size_of_clip_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"do_pad": True, "pad_size": {"height": 60, "width": 60}})
    with pytest.raises(ValueError, match=r"pad_size is .* but must be absent; remove it"):
        pads_images(folder)


@pytest.mark.parametrize("outer", [{}, {"image_token": "<image>", "patch_size": 3}])
@pytest.mark.parametrize("nested", [None, {"image_mean": [0.1, 0.2, 0.3]}])
def test_processor_config_comes_first(
    tmp_path: Path, outer: dict[str, Any], nested: dict[str, Any] | None
) -> None:
    folder = folder_with(tmp_path, {"image_mean": [0.4, 0.5, 0.6]})
    values = {**outer, "image_processor": nested and {**OWN, **nested}}
    (folder / "processor_config.json").write_text(json.dumps(values))
    check_pixels(folder)
    assert read_image_config(folder, 56).mean[0] == (0.1 if nested else 0.4)


def test_another_text_for_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"image_token": "<img>"}')
    with pytest.raises(ValueError, match=r"processor_config\.json: image_token is '<img>'"):
        read_image_config(tmp_path, 56)
    assert isinstance(PROCESSOR["patch_size"], Unused)


@pytest.mark.parametrize(("pads", "aspect"), [(True, "pad"), (False, "crop"), (None, "crop")])
def test_the_processor_pads_as_its_files_say(
    tmp_path: Path, pads: bool | None, aspect: str
) -> None:
    for path in TINY_A.iterdir():
        if path.name != "preprocessor_config.json":
            (tmp_path / path.name).symlink_to(path)
    values = OWN | LLAVA | ({} if pads is None else {"do_pad": pads})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    _, processor = load(tmp_path)
    assert processor.aspect == aspect
    assert processor.template == "llava-hf"
