"""minillava as a model of other people's benchmark programs: lmms-eval and VLMEvalKit."""

from __future__ import annotations

from typing import Any


def lmms_manifest() -> Any:
    """What lmms-eval asks installed packages for, by the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        ModelManifest,
    )

    return ModelManifest("minillava", simple_class_path=f"{__name__}.lmms_eval.MiniLLaVA")
