"""PruMerge+: PruMerge with patches at regular places added to the outliers.

Shang et al., ICCV 2025, arXiv 2403.15388. prumerge.py describes both forms, with the released code.
"""

from __future__ import annotations

from dataclasses import dataclass

from .prumerge import PruMerge


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    name, plus = "prumerge-plus", True
