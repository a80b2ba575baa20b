"""LLaVA-1.5 from scratch in PyTorch, with visual-token pruning in its forward and its KV cache.

from minillava import load, parse_plan
from minillava.generate import generate

model, processor = load("weights/demo")
batch = processor(["USER: <image>\\nWhat digit is red? ASSISTANT:"], images=[[image]])
result = generate(model, batch, plan=parse_plan("fastv:k=2,r=0.5"))
print(processor.decode(result.tokens[0]))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app.public import Batch, load, overlay, parse_plan

__all__ = ["Batch", "load", "overlay", "parse_plan"]


def __getattr__(name: str) -> Any:
    """Import torch only when one of them is asked for: the command line begins without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .app import public

    return getattr(public, name)
