"""A method in a file of the user's own, as tests of several commands use it."""

from __future__ import annotations

from pathlib import Path

FIRST = """
from dataclasses import dataclass
import torch
from minillava.pruning import Keep, Method

@dataclass(frozen=True)
class Mine(Method):
    keep: float = 0.5  # of the demo's 144 image tokens
    layer: int = 3

    def stages(self):
        return (("decoder", self.layer),)

    def choose(self, c):
        k = self.keep if self.keep >= 1 else round(144 * self.keep)
        return Keep(torch.arange(int(k)))
"""
LAST = FIRST.replace("torch.arange(int(k))", "torch.arange(144 - int(k), 144)")


def write(folder: Path, text: str = FIRST) -> str:
    """mine.py in a folder, as FILE.py:Class."""
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:Mine"


def write_mark(folder: Path) -> tuple[str, Path]:
    """A method whose file, when it is run, makes another file; the method and that file."""
    mark = folder / "mark"
    head = f"open({str(mark)!r}, 'a').write('run ')\n"
    return write(folder, head + FIRST), mark
