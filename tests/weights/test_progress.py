"""A folder whose progress.json was damaged is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weights.files import Planned, write_checkpoint


def write(folder: Path) -> None:
    tensor = torch.arange(4.0)
    planned = Planned("a", tensor.shape, tensor.dtype, lambda: tensor)
    write_checkpoint(folder, [planned], {"config.json": b"{}"}, "here")


@pytest.mark.parametrize(
    "sha256", [[1], None, "x", {"model.safetensors": 5}, {"model.safetensors": None}]
)
def test_digests_of_another_type(sha256: object, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": sha256}))
    with pytest.raises(ValueError, match=r"progress\.json is damaged: sha256 is .*; give a new"):
        write(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[1]", b"[" * 100_000])
def test_no_object(content: bytes, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "progress.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"progress\.json is damaged: .*; give a new") as error:
        write(tmp_path)
    assert "\n" not in str(error.value)


def test_an_undamaged_folder_is_verified(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    write(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
