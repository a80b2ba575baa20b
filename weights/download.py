"""Fetch a LLaVA-1.5 checkpoint from the Hugging Face hub: `python -m weights.download`.

Fetched are the json files, tokenizer.model and the weights, into the hub's cache or into a folder.
An interrupted download goes on where it stopped; llava-hf/llava-1.5-7b-hf is 14 GB, 13b 27 GB.
Checkpoints in the original layout (liuhaotian/llava-v1.5-7b) come with their pickled weights, and
the CLIP that they name with them; `python -m weights.convert` makes of them what is loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

from minillava.app.command import CommandParser as Parser
from minillava.app.command import run_command as command
from minillava.loading.hub import download_checkpoint as fetch
from minillava.loading.hub import download_files as snapshot
from minillava.loading.json_entries import read_json

_SMALL = ["*.json", "tokenizer.model"]


def main(argv: list[str] | None = None) -> int:
    """Print the folder that `--model` takes; 2 and one line on stderr where there is none."""
    parser = Parser(prog="python -m weights.download", description=__doc__, allow_abbrev=False)
    parser.add_argument("hub_id", nargs="?", default="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument("--to", metavar="DIR", help="a folder of your own instead of the cache")

    def run() -> None:
        args = parser.parse_args(argv)
        folder = fetch_any(args.hub_id, args.revision, args.to)
        print(folder)
        if "mm_vision_tower" in read_json(folder / "config.json"):
            print(f"next: python -m weights.convert {folder} DST", file=sys.stderr)

    return command(run)


def fetch_any(hub_id: str, revision: str | None = None, to: str | None = None) -> Path:
    """A checkpoint in the llava-hf layout, or in the original one with the CLIP that it names."""
    values = read_json(snapshot(hub_id, revision, to, ["config.json"]) / "config.json")
    tower = values.get("mm_vision_tower")
    if tower is None:
        return fetch(hub_id, revision, to)
    folder = _weights(hub_id, revision, to)
    if not (folder / str(tower)).exists():
        fetch_tower(str(tower))
    return folder


def fetch_tower(hub_id: str) -> Path:
    """A CLIP, into the hub's cache: where it has safetensors those, else its pickle."""
    return _weights(hub_id, None, None)


def _weights(hub_id: str, revision: str | None, to: str | None) -> Path:
    folder = snapshot(hub_id, revision, to, [*_SMALL, "*.safetensors", "SHA256SUMS"])
    if any(folder.glob("*.safetensors")):
        return folder
    return snapshot(hub_id, revision, to, [*_SMALL, "*.bin", "SHA256SUMS"])


if __name__ == "__main__":
    sys.exit(main())
