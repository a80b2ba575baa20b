"""Split the decoder over several processes, each with a device of its own (tensor parallelism).

Every process runs the same program on the same prompts. Of each decoder layer it holds the weights
of H / P heads and of M / P of the MLP's M columns, P being the number of processes:

    q_proj, k_proj, v_proj, gate_proj, up_proj    a part of the outputs
    o_proj, down_proj                             a part of the inputs; the processes' results are
                                                  added, so each has the whole hidden states
    lm_head                                       a part of the vocabulary, and the logits are
                                                  gathered; whole if it is tied to the embedding
    embedding, norms, projector, vision tower     whole in every process

The KV cache of a process holds its own heads. A pruning method gets the queries and keys of all
heads (WholeHeads), and what the first process has chosen holds in all (Agreement).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from ..config import TextConfig
from ..llava import LLaVA
from ..rows import Keep
from .tensor_files import StoredTensor


@dataclass(frozen=True)
class Split:
    """The weights of a decoder that are split: our name -> DTensor on the meta device."""

    weights: Mapping[str, DTensor]

    def parts(self, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The stored tensors, of which `read` gives what this process holds."""
        return {
            name: replace(tensor, part=own_part(self.weights[name]))
            if name in self.weights
            else tensor
            for name, tensor in found.items()
        }

    def join(self, model: LLaVA) -> None:
        """Make one tensor of the parts of each weight that the processes have loaded."""
        for name, whole in self.weights.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            part, mesh = layer.get_parameter("weight"), whole.device_mesh
            shape, stride = whole.shape, whole.stride()
            joined = DTensor.from_local(
                part.data, mesh, whole.placements, run_check=False, shape=shape, stride=stride
            )
            layer.weight = nn.Parameter(joined, requires_grad=False)


def split_decoder(model: LLaVA, mesh: DeviceMesh) -> Split:
    """Split the decoder of a model on the meta device over the processes of a mesh.

    Raises ValueError if its heads or its MLP cannot be cut into equal parts.
    """
    config, n = model.config.text, mesh.size()
    check_sizes(config, mesh)
    plan: dict[str, ParallelStyle] = {
        "blocks.*.attn.q_proj": ColwiseParallel(),
        "blocks.*.attn.k_proj": ColwiseParallel(),
        "blocks.*.attn.v_proj": ColwiseParallel(),
        "blocks.*.attn.o_proj": RowwiseParallel(),
        "blocks.*.mlp.gate_proj": ColwiseParallel(),
        "blocks.*.mlp.up_proj": ColwiseParallel(),
        "blocks.*.mlp.down_proj": RowwiseParallel(),
    }
    if not config.tie_word_embeddings:
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model.llama, mesh, plan)
    model.llama.config = replace(  # what this process computes, and caches
        config,
        num_attention_heads=config.num_attention_heads // n,
        num_key_value_heads=config.num_key_value_heads // n,
    )
    model.llama.whole_heads, model.llama.agree = WholeHeads(mesh), Agreement(mesh)
    return Split({n: w.data for n, w in model.named_parameters() if isinstance(w.data, DTensor)})


def check_sizes(config: TextConfig, mesh: DeviceMesh) -> None:
    """Raises ValueError if the processes of a mesh cannot hold equal parts of such a decoder."""
    n = mesh.size()
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has the shape {tuple(mesh.shape)}, but must have one dimension; make it with "
            "init_device_mesh(device_type, (n,))"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % n:
            raise ValueError(
                f"{n} processes cannot hold equal parts of a decoder with {name}="
                f"{getattr(config, name)}; start a number of processes that divides it"
            )


def own_part(whole: DTensor) -> tuple[slice, slice]:
    """Which rows and columns of a split weight (N, K) this process holds.

    As torch.chunk cuts, which is how DTensor counts. Only a vocabulary may be uneven.
    """
    (placement,), mesh = whole.placements, whole.device_mesh
    assert isinstance(placement, Shard)
    size = whole.shape[placement.dim]
    each = -(-size // mesh.size())
    start = min(mesh.get_local_rank() * each, size)
    own, all_of_it = slice(start, min(start + each, size)), slice(None)
    return (own, all_of_it) if placement.dim == 0 else (all_of_it, own)


class WholeHeads(nn.Module):
    """Queries or keys of the heads of all processes."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        """(R, heads of this process, Dh) -> (R, all heads, Dh), equal in all processes."""
        return DTensor.from_local(x, self.mesh, [Shard(1)], run_check=False).full_tensor()


class Agreement(nn.Module):
    """What the first process has chosen, in all processes.

    All choose from the same numbers, so they choose the same, unless their devices round
    differently. Then one of them has to decide, since each holds other heads of the same rows.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group = mesh.get_group()
        self.first = dist.get_global_rank(self.group, 0)
        self.device = mesh.device_type

    def forward(self, chosen: Tensor | Keep) -> Tensor | Keep:
        """New tokens (B,), or a Keep with its index on the CPU."""
        if isinstance(chosen, Tensor):
            return self._send(chosen)
        rows = {"merged": chosen.merged, "extra": chosen.extra}
        # how many rows there are may depend on the data, so the index and the shapes go first
        shapes = {name: (x.shape, x.dtype) for name, x in rows.items() if x is not None}
        told: list[Any] = [(chosen.index, shapes)]
        dist.broadcast_object_list(told, self.first, self.group)
        index, shapes = told[0]
        sent = {
            name: self._send(torch.empty(shape, dtype=dtype, device=self.device))
            if (x := rows[name]) is None or x.shape != shape
            else self._send(x)
            for name, (shape, dtype) in shapes.items()
        }
        return replace(chosen, index=index, merged=sent.get("merged"), extra=sent.get("extra"))

    def _send(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)  # it may be the model's own
        dist.broadcast(x, self.first, self.group)
        return x
