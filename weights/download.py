"""Fetch a LLaVA-1.5 checkpoint from the Hugging Face hub: `python -m weights.download`.

Fetched are *.json, tokenizer.model and *.safetensors, into the hub's cache or into a folder. An
interrupted download goes on where it stopped; llava-hf/llava-1.5-7b-hf is 14 GB, 13b 27 GB.
"""

from __future__ import annotations

import argparse
import sys

from minillava.hub import fetch


def main(argv: list[str] | None = None) -> int:
    """Print the folder that `--model` takes; 2 and one line on stderr where there is none."""
    parser = argparse.ArgumentParser(prog="python -m weights.download", description=__doc__)
    parser.add_argument("hub_id", nargs="?", default="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument("--to", metavar="DIR", help="a folder of your own instead of the cache")
    args = parser.parse_args(argv)
    try:
        print(fetch(args.hub_id, args.revision, args.to))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
