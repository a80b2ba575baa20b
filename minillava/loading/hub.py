"""Find a checkpoint: a local folder, or a repository on the Hugging Face hub to download."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config_file import read_config
from .error_text import cut_path, shorten

SECONDS = 5.0  # that a download has to end after Ctrl-C

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # org/name


def find_checkpoint(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded first if it is not a local one.

    Raises ValueError if there is neither a folder nor a repository of that name.
    """
    name = str(path_or_hub_id)
    if not name:  # Path("") is the current folder, which an unset variable does not mean
        raise ValueError("'' is no checkpoint; give a folder (for this one .) or a hub id")
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # Path.is_dir would raise for a name that is too long
        if revision is not None:
            raise ValueError(
                f"revision={shorten(revision)}, but {cut_path(name)} is a local folder, which has "
                "none; leave it out"
            )
        return folder
    if os.path.exists(folder):
        raise ValueError(
            f"{cut_path(name)} is a file, not a checkpoint; give the folder that contains it"
        )
    if not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"there is no folder {shorten(name)}, and a hub id has the form org/name; "
            "give a checkpoint's folder or an id such as llava-hf/llava-1.5-7b-hf"
        )
    return download_checkpoint(name, revision)


def download_checkpoint(
    hub_id: str, revision: str | None = None, to: str | Path | None = None
) -> Path:
    """Download the files of a repository that this package reads; returns their folder.

    `to` is a folder to write instead of the hub's cache. huggingface_hub handles the cache, the
    progress bar and HF_HUB_OFFLINE, and does not download complete files again. The small files
    come first, so that an unsupported model is refused before gigabytes of weights are downloaded.
    Raises ValueError if the hub, the network or the config refuses.
    """
    folder = download_files(hub_id, revision, to, ["*.json", "*.jinja", "tokenizer.model"])
    read_config(folder / "config.json")
    return download_files(
        hub_id, revision, to, ["*.json", "*.jinja", "tokenizer.model", "*.safetensors"]
    )


def download_files(
    hub_id: str, revision: str | None, to: str | Path | None, patterns: list[str]
) -> Path:
    """Download the files at the top of a repository that match one of the patterns."""
    # Importing it takes a third of a second, which a local checkpoint need not pay.
    from huggingface_hub import snapshot_download

    stop = threading.Event()

    def download() -> str:
        return snapshot_download(
            hub_id,
            revision=revision,
            local_dir=to,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],  # subfolders hold other things than the model
            tqdm_class=_make_bar(stop),
        )

    try:
        return Path(_call_in_thread(download, stop))
    except Exception as error:  # of huggingface_hub, httpx or the system: they share no base class
        at = "" if revision is None else f" at revision {shorten(revision)}"
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"there is no folder {shorten(hub_id)}, and the hub's {shorten(hub_id)}{at} could not "
            f"be downloaded ({reason}); check the id, the revision and the network "
            "(HF_HUB_OFFLINE=1 reads only the cache; private and gated ones need `hf auth login`), "
            "or give a local folder"
        ) from error


def _make_bar(stop: threading.Event) -> Any:
    """A progress bar for terminals only, which ends the download that it shows after `stop`."""
    from huggingface_hub import utils

    class Bar(utils.tqdm):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = options.get("disable") or None  # None: unless stderr is a terminal
            super().__init__(*args, **options)  # type: ignore[no-untyped-call,unused-ignore]

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    return Bar


def _call_in_thread(call: Callable[[], str], stop: threading.Event) -> str:
    """The result of a download, which Ctrl-C ends within seconds.

    huggingface_hub would first wait for the files that are being downloaded. Now their threads are
    told to stop, and have SECONDS to remove what they have.
    """
    done: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put(call())
        except BaseException as error:
            done.put(error)

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        result = done.get()
    except BaseException:
        stop.set()
        if thread.is_alive():
            thread.join(SECONDS)
        raise
    if isinstance(result, BaseException):
        raise result
    return result
