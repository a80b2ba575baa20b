"""Reference outputs of released code and of transformers; each case is one `Golden`.

A case is a pair of files, NAME.safetensors with the tensors and NAME.meta.json with how they were
made. Cases, checkpoints and images lie below one folder: tests/goldens, or what `--goldens` names.
A test takes its cases from a marker: `@pytest.mark.goldens("fastv/*/case*")` runs it once for each
case whose path below the folder matches, as the argument `golden`. `complete=True` leaves out the
cases whose checkpoint or image is not in the folder.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import assert_close, pad_left
from torch import Tensor

from minillava import load, parse_plan
from minillava.generate import Result, generate

LLAVA_IMAGE_ID = -200  # the placeholder of an image in prompts of the original LLaVA
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


@dataclass(frozen=True)
class Golden:
    """One case: its tensors, its meta.json, and the model and image that it was made with."""

    path: Path
    root: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(self.root).with_suffix(""))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Integer tensors are int64; the files hold them as int32."""
        tensors = load_file(self.path)
        return {k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}

    @cached_property
    def meta(self) -> Any:
        return json.loads(self.path.with_suffix(".meta.json").read_text())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def beside(self, name: str) -> Golden:
        """Another case in the same folder."""
        return Golden(self.path.with_name(f"{name}.safetensors"), self.root)

    @property
    def model(self) -> Any:
        return golden_model(self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        layouts = self.root / "checkpoints" / self.meta["model"]
        sharded = layouts / "hub-sharded"
        return sharded if sharded.is_dir() else layouts / "hub"

    @property
    def image_case(self) -> Golden:
        """The case that holds the image: this one, or an input that meta.json names."""
        if "pixel_u8" in self.meta["tensors"]:
            return self
        if "input" in self.meta["parameters"]:
            name = f"{self.meta['parameters']['input']}.safetensors"
            return Golden(self.path.parent.parent / name, self.root)
        named = re.search(r"fastv/\S+/input\d+", self.meta["parameters"]["pixels"])
        assert named, f"{self} names no image"
        return Golden(self.root / f"{named[0]}.safetensors", self.root)

    @property
    def pixels(self) -> Tensor:
        """Images (n, 3, S, S) float32, as the vision tower takes them."""
        return (self.image_case["pixel_u8"].float() / 255 - MEAN) / STD

    @property
    def complete(self) -> bool:
        """Whether the checkpoint and the image are in the folder, if the case has any."""
        if self.meta["model"] is None or self.meta["model"].startswith("none"):
            return True
        return self.checkpoint.is_dir() and self.image_case.path.is_file()

    def widened(self, ids: Sequence[int]) -> list[int]:
        """Ids of a prompt with each image's placeholder repeated N times."""
        image, N = self.model.config.image_token_id, self.model.config.vision.num_patches
        return [y for x in ids for y in ([image] * N if x in (image, LLAVA_IMAGE_ID) else [x])]

    @property
    def prompt(self) -> list[int]:
        if "input_ids" in self:
            return self.widened(self["input_ids"].flatten().tolist())
        sides = ("ids_before_image", "ids_after_image")
        before, after = (self[side].tolist() for side in sides)
        return self.widened([*before, LLAVA_IMAGE_ID, *after])

    @property
    def start(self) -> int:
        """Index of the first image token in the prompt."""
        return self.prompt.index(self.model.config.image_token_id)

    def run(self, plan: str, max_new_tokens: int, **batch: Any) -> Result:
        """Generate from its prompt and image. EOS does not end the answer, as in the files.
        batch: further fields of the Batch."""
        model = copy.copy(self.model)  # shares the weights
        model.config = replace(model.config, eos_token_ids=())
        prompt = replace(pad_left([self.prompt], self.pixels), **batch)
        return generate(model, prompt, parse_plan(plan), max_new_tokens, output_logits=True)

    def assert_close(self, ours: Tensor, name: str, *index: Any) -> None:
        """Within the tolerance that meta.json states, and within 1e-4 x rms."""
        expected = self[name][index]
        stated = dict(re.findall(r"\b(atol|rtol) ([\d.e-]+)", self.meta["tolerance"]))
        rtol, atol = float(stated.get("rtol", 0)), float(stated["atol"])
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
        assert_close(ours, expected)


@cache
def golden_model(checkpoint: Path) -> Any:
    """A model that the reference data was made with; all cases of a run share it."""
    return load(checkpoint)[0]


def cases(root: Path, *patterns: str, complete: bool = False) -> list[Golden]:
    """Cases below `root` whose path without the suffix matches a pattern, sorted by path."""
    root = root.resolve()
    paths = [path for pattern in patterns for path in root.glob(f"{pattern}.safetensors")]
    found = [Golden(path, root) for path in sorted(paths)]
    return [case for case in found if case.complete] if complete else found
