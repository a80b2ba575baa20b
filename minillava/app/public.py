"""The names that `from minillava import ...` gives."""

from ..hf import to_transformers
from ..loading.checkpoint import load
from ..pruning import parse_plan
from ..sample import Batch
from .overlay import overlay

__all__ = ["Batch", "load", "overlay", "parse_plan", "to_transformers"]
