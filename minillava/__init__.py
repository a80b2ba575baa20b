"""LLaVA-1.5 in PyTorch with visual-token pruning in its forward and KV cache: see README.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app.public import Batch, load, overlay, parse_plan, to_transformers

__all__ = ["Batch", "load", "overlay", "parse_plan", "to_transformers"]


def __getattr__(name: str) -> Any:
    """Import torch only when one of them is asked for: the command line begins without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .app import public

    return getattr(public, name)
