"""minillava's plans in transformers: README.md. transformers is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..pruning.base import Plan

if TYPE_CHECKING:
    from transformers import TextStreamer

    from .model import LlavaForConditionalGeneration
    from .processor import AutoProcessor

__all__ = ["AutoProcessor", "LlavaForConditionalGeneration", "TextStreamer", "to_transformers"]


def __getattr__(name: str) -> Any:
    """The names that FastV's example imports; TextStreamer is transformers' own."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_transformers()
    import transformers

    from . import model, processor

    ours = {"LlavaForConditionalGeneration": model, "AutoProcessor": processor}
    return getattr(ours.get(name, transformers), name)


def to_transformers(hf_model: Any, processor: Any, plan: Plan, seed: int = 0) -> Any:
    """transformers' LLaVA-1.5 with a plan: its `generate` takes and returns what theirs does.

    hf_model: a transformers.LlavaForConditionalGeneration, with attention "sdpa" or "eager". It is
    not changed, and the result shares its weights. processor: its AutoProcessor, for methods that
    read the question's words; None: there are none. seed: prompt b draws random choices with
    seed + b. Raises ValueError for models and plans that cannot run so (README.md).
    """
    _check_transformers()
    from . import model

    return model.to_transformers(hf_model, processor, plan, seed)


def _check_transformers() -> None:
    try:
        import transformers
    except ImportError:
        found = "is not installed"
    else:
        major, minor = transformers.__version__.split(".")[:2]
        if (int(major), int(minor)) >= OLDEST:
            return
        found = f"{transformers.__version__} is too old"
    oldest = ".".join(map(str, OLDEST))
    raise ImportError(
        f"minillava.hf needs transformers {oldest} or later, which {found}: pip install "
        "'minillava[transformers]'"
    )


OLDEST = (4, 51)  # of transformers, as in pyproject.toml
