"""Linear layers whose weights are stored smaller than they are computed with.

load() puts them in the place of nn.Linear; the model's own code knows nothing of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_AT_ONCE = 1024  # output rows that are widened at one time


class StoredLinear(nn.Linear):
    """A 16-bit weight, widened piece by piece to the dtype of the input: half the memory, and on a
    CPU, which has no fast 16-bit arithmetic, about the speed and the very result of float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        pieces = [F.linear(x, rows.to(x.dtype)) for rows in self.weight.split(ROWS_AT_ONCE)]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return y if self.bias is None else y + self.bias


def store_small(model: nn.Module) -> None:
    """Replace every nn.Linear of a model without memory (meta device) by a StoredLinear."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                bias = child.bias is not None
                new = StoredLinear(child.in_features, child.out_features, bias, device="meta")
                setattr(parent, name, new)


def stored_names(model: nn.Module) -> set[str]:
    """Parameters that stay in the storage dtype: weights of StoredLinear and token embeddings."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, StoredLinear) or name.endswith("embed_tokens")
    }
