"""Large inputs: ten images in a prompt, images of 100 megapixels, frames of a video."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from minillava import Batch, load, parse_plan
from minillava.app.cli import main
from minillava.generate import generate

SIDE, N = 336, 576
MANY = "t" * 5 + "It" * 10 + "t" * 220  # about 6,000 tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Narrow models with LLaVA-1.5's 576 tokens per image, keyed by max_position_embeddings."""
    found = {}
    for positions in (4096, 8192):
        found[positions] = tmp_path_factory.mktemp(f"wide{positions}")
        shape: dict[str, Any] = {"image_size": SIDE, "vision_layers": 3, "layers": 3}
        tiny.write_hf(found[positions], **shape, positions=positions)
    return found


def test_ten_pictures_give_what_they_give_one_after_the_other(folders: dict[int, Path]) -> None:
    model, _ = load(folders[8192])
    batch = tiny.make_batch(model, MANY)
    assert batch.ids.shape[1] == 10 * N + MANY.count("t") > 5900
    result = generate(model, batch, max_new_tokens=3, output_logits=True)
    assert result.report.cache_lengths == [[batch.ids.shape[1]]] * 3
    # the same token from a forward over the whole sequence, without a cache
    longer = torch.cat((batch.ids, torch.tensor([result.tokens[0][:2]])), 1)
    whole = Batch(longer, torch.ones_like(longer, dtype=torch.bool), batch.pixels)
    again = generate(model, whole, max_new_tokens=1, output_logits=True, use_cache=False)
    tiny.assert_close(result.logits[0, 2], again.logits[0, 0])


@pytest.mark.parametrize(
    "plan", ["fastv:layer=1,keep=64", "divprune:keep=32", "pyramiddrop:layers=1/2,ratios=0.5/0.1"]
)
def test_each_of_ten_pictures_is_pruned(folders: dict[int, Path], plan: str) -> None:
    model, _ = load(folders[8192])
    batch = tiny.make_batch(model, MANY)
    report = generate(model, batch, parse_plan(plan), max_new_tokens=2).report
    ids = batch.ids[0].tolist()
    starts = [i for i, x in enumerate(ids) if x == tiny.IMAGE and ids[i - 1] != tiny.IMAGE]
    (kept,) = report.kept[-1].positions
    each = [sum(start <= p < start + N for p in kept) for start in starts]
    assert len(starts) == 10
    assert len(set(each)) == 1
    assert sum(each) == len(kept) < 1000
    assert report.tokens_entering[-1] == [len(ids) - 10 * N + len(kept)]


def test_ten_frames_fit_when_they_are_pruned_before_the_decoder(
    folders: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = []
    for i in range(10):
        frames.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (64, 48), (25 * i, 128, 255 - 25 * i)).save(frames[-1])
    argv = ["--model", str(folders[4096]), "--image", *frames, "--prompt", "What happens?"]
    argv += ["--max-new-tokens", "2", "--image-aspect", "pad"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "4096 positions" in error
    named = error.split("for example ")[1].strip()
    assert main([*argv, "--prune", named]) == 0
    assert main([*argv, "--prune", "divprune:keep=64"]) == 0


# ---------------------------------------------------------------- 100 megapixels

MEASURE = """
import sys
from pathlib import Path
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
from minillava.processing.image import ImageConfig, preprocess
from minillava.app.open_image import open_image
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) // 1024
preprocess(Image.new("RGB", (400, 300)), ImageConfig(336), "crop")
before = peak()
image = open_image(sys.argv[1])
opened = peak()
for aspect in ("crop", "pad"):
    assert preprocess(image, ImageConfig(336), aspect).shape == (3, 336, 336)
print(before, opened, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(("mode", "kind"), [("RGB", "jpg"), ("RGBA", "png"), ("L", "png")])
def test_100_megapixels_in_bounded_memory(mode: str, kind: str, tmp_path: Path) -> None:
    """Peak memory is at most three decoded images: the image, its copy while it is rotated, and
    its copy without alpha. Resizing works in strips and adds little. Of a grey image, 100 MB, the
    copy in RGB has 400 MB, which is within the bound."""
    path = tmp_path / f"large.{kind}"
    options = {"compress_level": 1} if kind == "png" else {}
    Image.new(mode, (10_000, 10_000)).save(path, **options)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, opened, after = map(int, done.stdout.split())
    decoded = 100 * {"RGB": 4, "RGBA": 4, "L": 1}[mode]  # Pillow stores RGB in four bytes per pixel
    assert opened - before < 2 * decoded + 100
    assert after - before < 3 * decoded + 300


def test_100_megapixels_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (10_000, 10_000), "red").save(path)
    assert main(["--image", str(path), "--prompt", "What is it?", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.strip()
