"""Images become the same pixels as in transformers' PIL processor and in the original code."""

from __future__ import annotations

import io
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from minillava.loading.image_config import read_image_config
from minillava.processing import resize as strips
from minillava.processing.image import ImageConfig, preprocess

TINY_A = Path(__file__).parents[1] / "goldens" / "checkpoints" / "tiny-a"
S = 28
SMALL = ImageConfig(S, S)
MODES = """
    1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa I;16 I;16B I;16L I;16N
    P+transparency P+alphas RGB+transparency L+transparency 1+transparency I;16+transparency
""".split()  # noqa: SIM905


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of random bytes; "+transparency" puts a transparent colour into its info."""
    rng = random.Random(f"{mode} {width} {height} {seed}")
    mode, _, transparency = mode.partition("+")
    if mode in ("I", "F"):
        levels = Image.frombytes("L", (width, height), rng.randbytes(width * height))
        return levels.convert(mode).point(lambda v: v * 3 - 200)  # some outside 0..255
    image = Image.new("RGB" if mode == "LAB" else mode, (width, height))
    image.frombytes(rng.randbytes(len(image.tobytes())))
    if mode == "LAB":
        return image.convert("LAB")
    if mode in ("P", "PA"):
        image.putpalette(rng.randbytes(768))
    if transparency == "alphas":
        image.info["transparency"] = rng.randbytes(200)
    elif transparency:
        image.info["transparency"] = image.getpixel((width // 2, height // 2))
    return image


def reference(image: Image.Image, config: ImageConfig = SMALL, aspect: str = "crop") -> Any:
    """transformers' PIL processor; for "pad" it gets the square that the original code makes."""
    from transformers import CLIPImageProcessorPil

    size, crop = {"shortest_edge": config.size}, {"height": config.crop, "width": config.crop}
    processor = CLIPImageProcessorPil(size=size, crop_size=crop, resample=config.resample)
    if aspect == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in config.mean))
        at = ((side - image.width) // 2, (side - image.height) // 2)
        square.paste(image.convert("RGB"), at)
        image = square
    return processor(image, return_tensors="pt")["pixel_values"][0]


# ------------------------------------------------------------ goldens


def golden_image(goldens: Path, stem: str) -> Image.Image:
    if stem.startswith("sklearn_"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{stem.removeprefix('sklearn_')}.jpg"))
    return Image.open(next((goldens / "images").glob(f"{stem}.*")))


@pytest.mark.parametrize("size", [56, 336])
@pytest.mark.parametrize(
    ("file", "aspect", "column"), [("clip_center_crop", "crop", "pil"), ("llava_pad", "pad", "pad")]
)
def test_pixels_equal_the_goldens(
    goldens: Path, file: str, aspect: str, column: str, size: int
) -> None:
    rows = load_file(goldens / "preprocess" / f"{file}_{size}.safetensors")
    compared = 0
    for key, expected in rows.items():
        stem, _, kind = key.partition(".")
        if kind not in (column, f"{column}_sub"):
            continue
        pixels = preprocess(golden_image(goldens, stem), ImageConfig(size, size), aspect)
        if kind.endswith("_sub"):
            pixels = pixels[:, 4::12, 4::12]
        assert torch.equal(pixels, expected), key
        compared += 1
    assert compared >= 2


def test_pixels_do_not_depend_on_torchs_default_dtype() -> None:
    image = Image.new("RGB", (80, 60), (200, 100, 50))
    expected = preprocess(image, ImageConfig(56, 56), "pad")
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = preprocess(image, ImageConfig(56, 56), "pad")
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


# ------------------------------------------------------------ against transformers, live


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_transformers(mode: str, aspect: str) -> None:
    for width, height in ((40, 31), (19, 60)):
        image = noise(mode, width, height)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, in the reference
            expected = reference(image.copy(), aspect=aspect)
        assert torch.equal(preprocess(image, SMALL, aspect), expected), (width, height)


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    strip=st.sampled_from([1, 300, 5000, 1 << 24]),
    resample=st.sampled_from([1, 2, 3, 3, 4, 5]),
    size=st.sampled_from([S, 37]),
)
def test_every_size_equals_transformers_in_strips_of_any_height(
    aspect: str, width: int, height: int, strip: int, resample: int, size: int
) -> None:
    config = ImageConfig(size, S, resample)
    image = noise("RGB", width, height)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "STRIP", strip)
        assert torch.equal(preprocess(image, config, aspect), reference(image, config, aspect))


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 700), (700, 1), (2, 999), (999, 3), (S, S), (27, 900)]
)
def test_extreme_shapes_equal_transformers(size: tuple[int, int], aspect: str) -> None:
    image = noise("RGBA", *size)
    assert torch.equal(preprocess(image, SMALL, aspect), reference(image, aspect=aspect))


def test_full_size_equals_transformers() -> None:
    config = ImageConfig()
    for width, height in ((640, 480), (300, 900), (336, 336)):
        for aspect in ("crop", "pad"):
            image = noise("RGB", width, height)
            assert torch.equal(preprocess(image, config, aspect), reference(image, config, aspect))


@pytest.mark.parametrize("frame", [0, 1, 2])
def test_the_current_frame_of_an_animation_is_used(frame: int) -> None:
    file = io.BytesIO()
    frames = [noise("P", 40, 50, seed) for seed in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], transparency=3, disposal=2)
    image = Image.open(file)
    image.seek(frame)
    pixels = preprocess(image, SMALL)
    image.seek(frame)
    assert torch.equal(pixels, reference(image))


def test_transparency_is_white_when_cropped_and_dropped_when_padded() -> None:
    image = Image.new("RGBA", (40, 40), (10, 20, 30, 0))
    white, dark = Image.new("RGB", (40, 40), "white"), Image.new("RGB", (40, 40), (10, 20, 30))
    assert torch.equal(preprocess(image, SMALL, "crop"), preprocess(white, SMALL, "crop"))
    assert torch.equal(preprocess(image, SMALL, "pad"), preprocess(dark, SMALL, "pad"))


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_image_is_unchanged_and_nothing_warns(mode: str) -> None:
    image = noise(mode, 30, 40)

    def content() -> tuple[Any, ...]:
        palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
        return image.mode, image.tobytes(), dict(image.info), palette

    before = content()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for aspect in ("crop", "pad"):
            preprocess(image, SMALL, aspect)
    assert content() == before


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@settings(max_examples=25, deadline=None)
@given(
    short=st.integers(1, 9),
    long=st.integers(300, 2500),
    upright=st.booleans(),
    resample=st.sampled_from([1, 2, 3, 4, 5]),
    extremes=st.booleans(),
    size=st.sampled_from([S, 37]),
)
def test_long_images_equal_transformers_where_only_what_is_wanted_is_computed(
    aspect: str, short: int, long: int, upright: bool, resample: int, extremes: bool, size: int
) -> None:
    image = noise("RGB", *((short, long) if upright else (long, short)))
    if extremes:
        image = image.point(lambda v: 255 * (v > 127))
    config = ImageConfig(size, S, resample)
    calls: list[Any] = []
    wanted = strips._resize_wanted

    def spy(*args: Any) -> Image.Image:
        calls.append(args)
        return wanted(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "STRIP", 1)
        patch.setattr(strips, "_resize_wanted", spy)
        assert torch.equal(preprocess(image, config, aspect), reference(image, config, aspect))
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (3, 9000), (9000, 40), (200, 9000)])
def test_large_long_images_equal_transformers(size: tuple[int, int], aspect: str) -> None:
    config, image = ImageConfig(112, 112), noise("RGB", *size)
    assert torch.equal(preprocess(image, config, aspect), reference(image, config, aspect))


@pytest.mark.parametrize("size", [(1, 37_000), (37_000, 1)])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_what_is_cut_away_is_not_computed(
    size: tuple[int, int], aspect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enlarged at once the image would have 28 x 1,036,000 pixels; padded, 37,000 x 37,000."""
    pixels: list[int] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        result = resize(self, *args, **kwargs)
        pixels.extend((self.width * self.height, result.width * result.height))
        return result

    monkeypatch.setattr(Image.Image, "resize", spy)
    preprocess(noise("L", *size), SMALL, aspect)
    assert sum(pixels) < 1 << 23


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_no_step_holds_more_than_a_strip(
    size: tuple[int, int], aspect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enlarged at once the image would have 28 x 112000 pixels, padded 4000 x 4000."""
    held: list[int] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        result = resize(self, *args, **kwargs)
        held.extend((self.width * self.height, result.width * result.height))
        return result

    monkeypatch.setattr(strips, "STRIP", 1 << 18)
    monkeypatch.setattr(Image.Image, "resize", spy)
    preprocess(noise("RGB", *size), SMALL, aspect)
    assert max(held) <= 1 << 18


# ------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("image", "aspect", "message"),
    [
        (Image.new("RGB", (9, 9)), "square", "image_aspect='square' must be crop or pad"),
        (Image.new("RGB", (0, 9)), "crop", "the image has 0 x 9 pixels; give one that is not"),
        (Image.new("La", (9, 9)), "crop", "an image of mode La cannot be converted to RGB"),
        (Image.new("L", (1, 10**7)), "crop", "would have 28 x 280000000 when enlarged, more than"),
        (Image.new("L", (70_000, 9)), "pad", "would have 70000 x 70000 when padded, more than"),
    ],
)
def test_unusable_images_are_refused(image: Image.Image, aspect: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        preprocess(image, SMALL, aspect)


def test_a_truncated_image_is_refused() -> None:
    file = io.BytesIO()
    noise("RGB", 60, 60).save(file, "PNG")
    image = Image.open(io.BytesIO(file.getvalue()[:5000]))
    with pytest.raises(ValueError, match=r"the image is broken .* give an undamaged"):
        preprocess(image, SMALL)


# ------------------------------------------------------------ settings


def test_settings_are_read_from_either_file(tmp_path: Path) -> None:
    published = read_image_config(TINY_A / "hub-sharded", 56)
    assert published == ImageConfig(56, 56)

    assert read_image_config(tmp_path, 56) == published  # no file at all

    content = json.loads((TINY_A / "hub-sharded" / "preprocessor_config.json").read_text())
    content["image_mean"] = [0.5, 0.25, 0.125]
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    nested = read_image_config(tmp_path, 56)  # as transformers 5 writes it
    assert nested.mean == (0.5, 0.25, 0.125)
    assert nested.fill == (127, 63, 31)

    old = {"crop_size": 56, "size": 64, "resample": 2, "feature_extractor_type": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert read_image_config(tmp_path, 56) == nested  # it has priority

    (tmp_path / "processor_config.json").write_text('{"patch_size": 14, "image_processor": null}')
    assert read_image_config(tmp_path, 56) == ImageConfig(64, 56, 2)

    (tmp_path / "preprocessor_config.json").unlink()
    assert read_image_config(tmp_path, 56) == published


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_every_name_of_transformers_class_is_accepted(tmp_path: Path, suffix: str) -> None:
    for key in ("image_processor_type", "feature_extractor_type"):
        content = {"crop_size": 56, "size": 56, key: f"CLIPImageProcessor{suffix}"}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        assert read_image_config(tmp_path, 56) == ImageConfig(56, 56)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"do_resize": False}, "do_resize is False, but must be True"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"do_resize": None}, "do_resize is None, but must be absent or a value"),
        ({"resample": None}, "resample is None, but must be absent or a value"),
        ({"use_square_size": True}, "use_square_size is True"),
        ({"default_to_square": True}, "size is {'height': 56, 'width': 56}"),
        ({"image_processor_type": "SiglipImageProcessor"}, "'CLIPImageProcessor' or"),
        ({"feature_extractor_type": "SiglipFeatureExtractor"}, "'CLIPFeatureExtractor' or"),
        ({"crop_size": 28}, "crop_size is 28, but must be 56 like vision_config.image_size"),
        ({"crop_size": {"height": 56, "width": 28}}, "under height and width"),
        ({"size": 28}, "size is 28, but must be at least 56"),
        ({"size": {"height": 56, "width": 56}}, "under shortest_edge"),
        ({"size": {"shortest_edge": 56, "longest_edge": 90}}, "under shortest_edge"),
        ({"size": 56.5}, "size is 56.5"),
        ({"size": 10**400}, "size is 1000000"),
        ({"size": 10**9}, "at most 100000"),
        ({"size": {}}, "size is {}"),
        ({"size": {"shortest_edge": [56]}}, "size is "),
        ({"crop_size": {"height": True, "width": True}}, "crop_size is "),
        ({"resample": 0}, "resample is 0"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"resample": 3.0}, "resample is 3.0"),
        ({"rescale_factor": -1}, "rescale_factor is -1"),
        ({"rescale_factor": 10**400}, "rescale_factor is 1000000"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"image_mean": [10**400, 0, 0]}, "image_mean is [1000000"),
        ({"image_mean": [float("nan"), 0, 0]}, "image_mean is [nan, 0, 0]"),
        ({"image_std": [1, -1, 1]}, "image_std is [1, -1, 1]"),
        ({"image_std": [float("inf"), 1, 1]}, "image_std is [inf, 1, 1]"),
        ({"auto_map": 3}, "auto_map is 3, but must be an object"),
        ({"image_mean": [0.5, "0.5", 0.5]}, "image_mean is [0.5, '0.5', 0.5], but must be three"),
        ({"image_mean": [0.5]}, "image_mean is [0.5], but must be three numbers"),
        ({"image_std": [1, 1, 0]}, "image_std is [1, 1, 0]"),
    ],
)
def test_unsupported_settings_are_refused(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    content = {"crop_size": 56, "size": 56} | entries
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{re.escape(message)}"):
        read_image_config(tmp_path, 56)
