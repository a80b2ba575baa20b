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
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..config import TextConfig
from ..llava import LLaVA
from ..rows import Keep
from .tensor_files import StoredTensor


def split_decoder(
    model: LLaVA, found: Mapping[str, StoredTensor], mesh: DeviceMesh
) -> dict[str, StoredTensor]:
    """Split the decoder of a model on the meta device over the processes of a mesh.

    Returns the stored tensors found for it, of which `read` now gives what this process holds.
    Raises ValueError if the heads or the MLP cannot be cut into equal parts.
    """
    config, n = model.config.text, mesh.size()
    check_sizes(config, mesh)
    plan: dict[str, ParallelStyle] = {
        "blocks.*.attn.[qkv]_proj": SplitOutputs(),
        "blocks.*.attn.o_proj": SplitInputs(),
        "blocks.*.mlp.gate_proj": SplitOutputs(),
        "blocks.*.mlp.up_proj": SplitOutputs(),
        "blocks.*.mlp.down_proj": SplitInputs(),
    }
    if not config.tie_word_embeddings:
        plan["lm_head"] = SplitOutputs(gather=True)
    parallelize_module(model.llama, mesh, plan)
    model.llama.config = replace(  # what this process computes, and caches
        config,
        num_attention_heads=config.num_attention_heads // n,
        num_key_value_heads=config.num_key_value_heads // n,
    )
    model.llama.set_submodule("whole_heads", WholeHeads(mesh))
    model.llama.set_submodule("agree", Agreement(mesh))
    split = {n: w.data for n, w in model.named_parameters() if isinstance(w.data, DTensor)}
    parts = {name: replace(found[name], part=own_part(weight)) for name, weight in split.items()}
    return {**found, **parts}


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
    own, every = slice(start, min(start + each, size)), slice(None)
    return (own, every) if placement.dim == 0 else (every, own)


# ---------------------------------------------------------------- linear layers


# torch's own ColwiseParallel and RowwiseParallel multiply DTensors. For each new number of rows
# these work out on the host how to (25 ms for each shape of weight), and after pruning almost every
# prompt has a number of its own. So here weights are plain tensors, and only results are joined.


class SplitOutputs(ParallelStyle):
    """A linear layer of which each process computes a part of the outputs.

    gather: each process gets the whole outputs.
    """

    def __init__(self, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split_weight(module, device_mesh, Shard(0))
        if self.gather:
            module.register_forward_hook(JoinResults(device_mesh, Shard(1)))
        return module


class SplitInputs(ParallelStyle):
    """A linear layer of which each process multiplies a part of the inputs; results are added."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split_weight(module, device_mesh, Shard(1))
        module.register_forward_hook(JoinResults(device_mesh, Partial()))
        return module


def split_weight(module: nn.Module, mesh: DeviceMesh, placement: Shard) -> None:
    """Cut a weight on the meta device. Loading replaces it by a plain tensor of the own part."""
    weight = distribute_tensor(module.get_parameter("weight").data, mesh, [placement])
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


class JoinResults:
    """A forward hook: the whole result of a linear layer, from what each process computed of it."""

    def __init__(self, mesh: DeviceMesh, placement: Placement) -> None:
        self.mesh, self.placement = mesh, placement

    def __call__(self, layer: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        """y (R, N) or (R, its part of N) -> (R, N)."""
        N = layer.out_features
        joined = DTensor.from_local(
            y,
            self.mesh,
            [self.placement],
            run_check=False,
            shape=torch.Size((len(y), N)),
            stride=(N, 1),
        )
        return joined.full_tensor()


# ---------------------------------------------------------------- pruning


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
        agreed = replace(chosen, index=index, merged=sent.get("merged"), extra=sent.get("extra"))
        if torch.equal(index, chosen.index):
            return agreed
        return replace(agreed, scores=None, order=None, merged_into=None, closest=None)

    def _send(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)  # it may be the model's own
        dist.broadcast(x, self.first, self.group)
        return x
