"""Where a checkpoint is: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .config_file import read_config

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # org/name


def find(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, fetched first if it is not a local one.

    Raises ValueError where there is neither a folder nor a repository of that name.
    """
    name = str(path_or_hub_id)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # not Path's, which raises for a name that is too long
        if revision is not None:
            raise ValueError(
                f"revision={revision!r}, but {name} is a local folder, which has none; leave it out"
            )
        return folder
    if os.path.exists(folder):
        raise ValueError(f"{name} is a file, not a checkpoint; give the folder that holds it")
    if not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"there is no folder {name!r}, and a hub id has the form org/name; "
            "give a checkpoint's folder or an id such as llava-hf/llava-1.5-7b-hf"
        )
    return fetch(name, revision)


def fetch(hub_id: str, revision: str | None = None, to: str | Path | None = None) -> Path:
    """Download what this package reads of a repository; returns its folder.

    Cache, progress bar, resumed downloads and HF_HUB_OFFLINE are huggingface_hub's. The small files
    come first, so that a model which is not supported costs no gigabytes. `to` is a folder of your
    own instead of the cache. Raises ValueError if the hub, the network or the config refuses.
    """
    folder = snapshot(hub_id, revision, to, ["*.json", "tokenizer.model"])
    read_config(folder / "config.json")
    return snapshot(hub_id, revision, to, ["*.json", "tokenizer.model", "*.safetensors"])


def snapshot(hub_id: str, revision: str | None, to: str | Path | None, patterns: list[str]) -> Path:
    # a third of a second, and a local checkpoint needs none of it
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                local_dir=to,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # folders inside hold other things than the model
            )
        )
    except Exception as error:  # its own kinds, httpx's and the system's: no base class in common
        at = "" if revision is None else f" at revision {revision!r}"
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"there is no folder {hub_id!r}, and the hub's {hub_id!r}{at} could not be fetched "
            f"({reason}); check the id, the revision and the network (HF_HUB_OFFLINE=1 reads the "
            "cache only; private and gated ones need `hf auth login`), or give a local folder"
        ) from error
