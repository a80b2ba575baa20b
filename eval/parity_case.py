"""Read the cases of eval.parity: what somebody's implementation was given, and what it kept.

A case is one safetensors file. Its header (the metadata of save_file) has the plan; its tensors are
the inputs and the kept sets. eval/README.md lists the names. A file with NAME.meta.json beside it,
as in tests/goldens, is read by the names that are used there. Nothing is unpickled, and a plan that
a file names never runs a user's own method file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillava.loading.json_entries import read_json
from minillava.loading.regular_files import is_present
from minillava.processing.image import ImageConfig
from minillava.pruning import parse_plan
from minillava.pruning.base import Plan

KEPT, BY_POSITION = "kept", "kept_positions"
HEADER = ("plan", "model", "sizes", "note", "format")  # "format" is written by other programs
WHOLE = ("ids", "mask", "pixels", "focus")  # what a model is given
CHOICE = (  # what a method is given, by the names of Context
    "features",
    "before",
    "entered",
    "text",
    "focus",
    "patches",
    "attention",
    "attention_by_row",
    "vision_attention",
    "vision_attention_mean",
    "vision_keys",
    "vision_state",
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NAME = re.compile(r"(?P<what>[a-z_]+?)(_(?P<number>-?\d+))?(\.(?P<step>\d+))?")
KEPT_IN_GOLDENS = ("kept_image_index", "selected_sorted", "kept_sorted")
WINDOWS = ("stage_tower_place", "stage_tower_patches_in_row")  # of MustDrop
LLAVA_IMAGE = -200  # the placeholder of an image in prompts of the original LLaVA


@dataclass(frozen=True)
class Case:
    """One case. kept: for each step of the plan the image tokens that stayed, image * N + patch, or
    if `by_position` is set the places of all rows that stayed in the prompt."""

    path: Path
    plan: Plan
    model: str | None  # folder or hub id
    tensors: Mapping[str, Tensor]
    kept: tuple[tuple[int, ...], ...]
    by_position: bool
    sizes: list[tuple[int, int, str]] | None = None

    @property
    def whole(self) -> bool:
        """Whether it holds the inputs of a whole model, and not those of the choice alone."""
        return "ids" in self.tensors

    @property
    def eps(self) -> float:
        """Rounding of the least precise of its floating-point tensors, and of our float32."""
        dtypes = {x.dtype for x in self.tensors.values() if x.is_floating_point()}
        return max(torch.finfo(dtype).eps for dtype in {*dtypes, torch.float32})


def read_case(path: Path, plan: Plan | None) -> Case:
    """Read a case; `plan` replaces the one in the file. Raises ValueError for a damaged case."""
    header, tensors = read_file(path)
    beside = path.with_suffix(".meta.json")
    if "plan" not in header and is_present(beside):
        header, tensors = rename_golden(path, read_json(beside), tensors)
    if unknown := sorted(header.keys() - {*HEADER}):
        raise ValueError(f"the header has {unknown[0]!r}; it may have {', '.join(HEADER)}")
    if plan is None:
        if not header.get("plan"):
            where = f"parameters of {beside.name}" if is_present(beside) else "header"
            raise ValueError(
                f"no plan in the {where}; give it, for example --prune divprune:keep=0.098, or "
                "write metadata={'plan': …} into the case"
            )
        plan = parse_plan(header["plan"])
    if not plan.steps:
        raise ValueError("a plan without pruning keeps everything: there is nothing to compare")
    inputs = {name: x for name, x in tensors.items() if not name.startswith("kept")}
    check_names(inputs)
    by_position = any(name.startswith(BY_POSITION) for name in tensors)
    if by_position and "ids" not in inputs:
        raise ValueError(f"{BY_POSITION} are places in a prompt; give its ids, or kept")
    kept = read_kept(tensors, len(plan.steps), BY_POSITION if by_position else KEPT)
    sizes = None if "sizes" not in header else read_sizes(header["sizes"])
    return Case(path, plan, header.get("model"), inputs, kept, by_position, sizes)


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, integers as int64."""
    if not is_present(path):
        raise ValueError("there is no such file")
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"it is no whole safetensors file ({error}); write it anew") from error
    for name, x in tensors.items():
        if x.dtype not in FLOATS + INTEGERS:
            raise ValueError(f"{name} is {x.dtype}; save floats of 16 bits or more, or integers")
        if x.dtype in FLOATS and not x.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite numbers")
        tensors[name] = x.long() if x.dtype in (torch.int8, torch.int16, torch.int32) else x
    return header, tensors


def read_kept(tensors: Mapping[str, Tensor], steps: int, name: str) -> tuple[tuple[int, ...], ...]:
    """The kept sets, which are `kept` for a plan of one step, or `kept.0`, `kept.1`, ..."""
    names = [name] if steps == 1 and name in tensors else [f"{name}.{i}" for i in range(steps)]
    there = sorted(name for name in tensors if name.startswith(KEPT))
    if there != sorted(names):
        raise ValueError(
            f"the plan has {steps} steps, so the kept sets are {', '.join(names)}; "
            f"the file has {', '.join(there) or 'none'}"
        )
    kept = []
    for name in names:
        x = tensors[name]
        x = x[0] if x.ndim == 2 and len(x) == 1 else x
        if x.ndim != 1 or x.is_floating_point():
            raise ValueError(
                f"{name} must be integers (k,) or a mask, not {tuple(x.shape)} {x.dtype}"
            )
        numbers = (x.nonzero()[:, 0] if x.dtype == torch.bool else x).tolist()
        if len({*numbers}) < len(numbers):
            raise ValueError(f"{name} names a token twice")
        kept.append(tuple(sorted(numbers)))
    return tuple(kept)


def check_names(inputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError for unknown tensors, and for both kinds of inputs or none."""
    known = WHOLE if "ids" in inputs else CHOICE
    for name in inputs:
        match = NAME.fullmatch(name)
        if not match or match["what"] not in known or ("ids" in inputs and match[0] not in WHOLE):
            raise ValueError(f"it has the tensor {name!r}; it may have {', '.join(known)}")
    if not inputs:
        raise ValueError(
            "it has no inputs: give ids and pixels, or what the method reads, such as features"
        )


def read_sizes(text: str) -> list[tuple[int, int, str]]:
    """Widths, heights and aspects of the images; request.py checks them."""
    try:
        return [tuple(size) for size in json.loads(text)]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f'sizes={text!r} must be JSON like [[640, 480, "pad"]]') from error


# ---------------------------------------------------------------- reference data


def rename_golden(
    path: Path, meta: Any, tensors: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a case of tests/goldens by the names that are used here."""
    parameters = meta.get("parameters")
    if not isinstance(parameters, dict):
        raise ValueError(f"{path.stem}.meta.json has no object `parameters`")
    stages = sorted(name for name in tensors if re.fullmatch(r"stage\d+_kept_image_index", name))
    kept = stages or [name for name in KEPT_IN_GOLDENS if name in tensors][:1]
    sets = [tensors[name] for name in kept]
    if {*WINDOWS} <= tensors.keys():
        sets = patches_of_rows(sets, *(tensors[name] for name in WINDOWS))
    new = {f"kept.{i}" if len(sets) > 1 else "kept": x for i, x in enumerate(sets)}
    header = {"plan": golden_plan(parameters)} if "plan" in parameters else {}
    if str(meta.get("model", "none")).startswith("none"):
        names = {"features": "features", "image_embeds": "features", "text_embeds": "focus"}
        return header, new | {ours: tensors[n] for n, ours in names.items() if n in tensors}
    given = tensors | golden_input(path, parameters)
    if "pixel_u8" not in given or not {"input_ids", "ids_before_image"} & given.keys():
        raise ValueError("its picture (pixel_u8) or its ids were not found")
    if "input_ids" in given:
        new["ids"] = given["input_ids"].flatten()
    else:
        image = torch.tensor([LLAVA_IMAGE])
        new["ids"] = torch.cat((given["ids_before_image"], image, given["ids_after_image"]))
    usual = ImageConfig()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (usual.mean, usual.std))
    new["pixels"] = (given["pixel_u8"].float() / 255 - mean) / std
    new |= {"focus": given["focus_ids"]} if "focus_ids" in given else {}
    if size := parameters.get("original_size_width_height"):
        header["sizes"] = json.dumps([[*size, "pad"]])
    folders = [p / "checkpoints" / meta["model"] / "hub" for p in path.resolve().parents[:4]]
    folders = [f for hub in folders for f in (hub, hub.with_name("hub-sharded")) if f.is_dir()]
    return header | ({"model": str(folders[0])} if folders else {}), new


def patches_of_rows(sets: list[Tensor], place: Tensor, size: Tensor) -> list[Tensor]:
    """MustDrop's kept sets, which name rows after the tower, as patches; the tower's own is first.

    place (n,): a row's patch, of a merged window the last. size (n,): how many patches a row has.
    """
    side = round(float(size.sum()) ** 0.5)  # of the grid
    patches = place - (size > 1) * (2 * side + 2)  # ours of a window: the first of its 3 x 3
    if any(len(x) and not 0 <= int(x.min()) <= int(x.max()) < len(patches) for x in sets):
        raise ValueError(f"a kept set names rows beyond the {len(patches)} after the tower")
    return [patches, *(patches[x] for x in sets)]


def golden_plan(parameters: Mapping[str, Any]) -> str:
    """The plan of a case, with what the released code drew at random."""
    plan = str(parameters["plan"]).partition(" ")[0]
    if plan.startswith("prunesid:") and "seed" in parameters:
        plan += f",seed={parameters['seed']}"
    if plan.startswith("apet:") and "first_basis" in parameters:
        plan += f",first={'/'.join(map(str, parameters['first_basis']))}"
    return plan


def golden_input(path: Path, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the file that a case names as its input, in its own folder or in one above."""
    named = re.search(r"\S*input\S*", str(parameters.get("input", parameters.get("pixels"))))
    for folder in path.resolve().parents[:3]:
        if named is None:
            break
        file = folder / f"{named[0]}.safetensors"
        if file.is_file():
            return read_file(file)[1]
    return {}
