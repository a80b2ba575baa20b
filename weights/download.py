"""Download a LLaVA-1.5 checkpoint from the Hugging Face hub: `python -m weights.download`.

The JSON files, tokenizer.model and the weights are stored in the hub's cache or in a given folder.
After an interruption, the same command downloads the files that are not complete yet.
llava-hf/llava-1.5-7b-hf has 14 GB, the 13B model has 27 GB.
For a checkpoint in the original layout (liuhaotian/llava-v1.5-7b), the pickled weights and the CLIP
that its config names are downloaded; `python -m weights.convert` then writes the llava-hf layout.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from minillava.app.command import CommandParser, end_program, run_command
from minillava.loading.hub import download_checkpoint as fetch
from minillava.loading.hub import download_files as snapshot
from minillava.loading.json_entries import read_json

_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]


def main(argv: list[str] | None = None) -> int:
    """Print the checkpoint's folder; returns 0, 2 after an error, or 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m weights.download", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("hub_id", nargs="?", default="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--to", metavar="DIR", help="download to this folder, not the hub's cache")

    def run() -> None:
        args = parser.parse_args(argv)
        folder = fetch_any(args.hub_id, args.revision, args.to)
        print(folder)
        if "mm_vision_tower" in read_json(folder / "config.json"):
            command = f"python -m weights.convert {shlex.quote(str(folder))} DST"
            print(f"next: {command}", file=sys.stderr)

    return run_command(run)


def fetch_any(hub_id: str, revision: str | None = None, to: str | None = None) -> Path:
    """Download a checkpoint in the llava-hf or the original layout and return its folder.

    For the original layout, the CLIP that its config names is downloaded to the cache too. Raises
    ValueError if the hub refuses or cannot be reached.
    """
    values = read_json(snapshot(hub_id, revision, to, ["config.json"]) / "config.json")
    tower = values.get("mm_vision_tower")
    if tower is None:
        return fetch(hub_id, revision, to)
    folder = _fetch_weights(hub_id, revision, to)
    if not (folder / str(tower)).exists():
        fetch_tower(str(tower))
    return folder


def fetch_tower(hub_id: str) -> Path:
    """Download a CLIP to the hub's cache and return its folder."""
    return _fetch_weights(hub_id, None, None)


def _fetch_weights(hub_id: str, revision: str | None, to: str | None) -> Path:
    """Download the small files and the weights: safetensors if there are any, else pickles."""
    folder = snapshot(hub_id, revision, to, [*_SMALL_FILES, "*.safetensors", "SHA256SUMS"])
    if any(folder.glob("*.safetensors")):
        return folder
    return snapshot(hub_id, revision, to, [*_SMALL_FILES, "*.bin", "SHA256SUMS"])


if __name__ == "__main__":
    end_program(main())
