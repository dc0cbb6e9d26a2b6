"""Full tensors from megatron-fsdp's shards, and shards from full tensors.

megatron-fsdp cuts a flat buffer of many parameters into equal chunks, at rows. So the rows of a parameter may be on one
rank, or unevenly on several. Its DTensors have the placement ``Shard(0)``, but ``full_tensor()`` assumes DTensor's even
shards and returns wrong values. So this module notes the rows of each rank once, when the model is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...core.shard_layout import local_slice
from ...core.sharding_spec import REPLICATED, ParameterSpec, ShardingSpec
from .mesh import Layout


@dataclass(frozen=True)
class RowShard:
    """The rows of one parameter that this rank holds.

    Attributes:
        shape: shape of the full parameter.
        spec: its placement on the tp axis.
        start: first row of this rank, counted in the rows of the tp shard.
        rows: number of rows of this rank; may be 0.
        dtype: dtype of the parameter.
        device: device of the shard.
    """

    shape: torch.Size
    spec: ParameterSpec
    start: int
    rows: int
    dtype: torch.dtype
    device: torch.device


class RowShards:
    """The rows of all parameters of one model on this rank. The constructor is collective.

    Args:
        layout: the mesh.
        sharded: the parameters of the optimizer, by name.
        shapes: shapes of the full parameters, by name.
        spec: the resolved tensor-parallel plan, or None.
        split: rows are sharded over the data-parallel ranks; False: each of them holds all rows.
    """

    def __init__(
        self,
        layout: Layout,
        sharded: dict[str, nn.Parameter],
        shapes: dict[str, torch.Size],
        spec: ShardingSpec | None,
        split: bool,
    ) -> None:
        self.split = split
        self.shard_group = layout.mesh[layout.shard].get_group()
        tp = layout.tp_mesh
        self.tp_group = tp.get_group() if tp is not None else None
        self.tp_rank, self.tp_size = (tp.get_local_rank(), tp.size()) if tp is not None else (0, 1)
        locals_ = {name: local_part(parameter) for name, parameter in sharded.items()}
        rows = torch.tensor([part.shape[0] if part.numel() else 0 for part in locals_.values()], dtype=torch.int64)
        self.device = device = next((part.device for part in locals_.values()), torch.device("cpu"))
        gathered = [torch.empty_like(rows, device=device) for _ in range(dist.get_world_size(self.shard_group))]
        dist.all_gather(gathered, rows.to(device), group=self.shard_group)
        before = torch.stack(gathered)[: dist.get_rank(self.shard_group)].sum(0).tolist()
        parameters = {} if spec is None or tp is None else spec.parameters
        self.by_name = {
            name: RowShard(
                shapes[name],
                parameters.get(name, REPLICATED),
                start if split else 0,
                count,
                parameter.dtype,
                locals_[name].device,
            )
            for (name, parameter), start, count in zip(sharded.items(), before, rows.tolist(), strict=True)
        }

    def local(self, name: str, full: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the tensor ``full``, which has the full shape of the parameter ``name``; a view if
        possible.
        """
        shard = self.by_name[name]
        return local_slice(full, shard.spec, self.tp_rank, self.tp_size).narrow(0, shard.start, shard.rows)

    @torch.no_grad()
    def full_tensor(self, name: str, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The full tensor from the rows of all ranks.

        Args:
            name: name of the parameter.
            tensor: this rank's rows of it, of its gradient or of a state of the same shape; None without rows.
            dtype: dtype of the result, equal on all ranks; None: that of the parameter.

        Returns:
            A plain tensor, on every rank. Collective over data-parallel and tp ranks.
        """
        shard = self.by_name[name]
        shape = list(shard.shape)
        if shard.spec.dim is not None:
            shape[shard.spec.dim] //= self.tp_size
        local = None if tensor is None else local_part(tensor)
        dtype = dtype or shard.dtype
        # Uneven rows cannot be all-gathered in one collective: each rank fills its rows of zeros, and all are summed.
        part = torch.zeros(shape, dtype=dtype, device=shard.device)
        if local is not None and shard.rows:
            part.narrow(0, shard.start, shard.rows).copy_(local.reshape(shard.rows, *shape[1:]))
        if self.split:
            dist.all_reduce(part, group=self.shard_group)
        if shard.spec.dim is None or self.tp_group is None:
            return part
        result = torch.zeros(shard.shape, dtype=dtype, device=shard.device)
        dim, blocks = shard.spec.dim, shard.spec.blocks
        for target, source in zip(result.chunk(blocks, dim), part.chunk(blocks, dim), strict=True):
            target.narrow(dim, self.tp_rank * source.shape[dim], source.shape[dim]).copy_(source)
        dist.all_reduce(result, group=self.tp_group)
        return result


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of ``tensor``, detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
