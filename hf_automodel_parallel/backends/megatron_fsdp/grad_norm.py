"""Norm and clipping of gradients that live in shards, each element counted once, in whatever dtype they are.

torch's own function stacks the norms of DTensors, which fails where they live on different meshes (tensor-parallel
parameters on two axes, replicated ones on one), and knows only DTensor's even shards. Here each rank takes the norm of
what it holds, and the sums go over exactly those axes over which a parameter is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...errors import UnsupportedError


@torch.no_grad()
def total_norm(parameters: Iterable[torch.Tensor], mesh: DeviceMesh, norm_type: float = 2.0) -> torch.Tensor:
    """The norm of all gradients of ``parameters`` together, as one process would compute it.

    Args:
        parameters: plain tensors (equal on all ranks) or DTensors on axes of ``mesh``; their gradients may be None on
            ranks that hold no part of them.
        mesh: the mesh, whose axes all ranks reduce over in the same order. A parameter that is replicated over an axis
            counts once, not once for each of its ranks.
        norm_type: 1, 2, ... or infinity.

    Returns:
        A float32 scalar, equal on all ranks. Collective over the axes of ``mesh``.
    """
    norm_type = float(norm_type)
    if norm_type <= 0 and not math.isinf(norm_type):
        raise UnsupportedError(f"norm_type={norm_type}: give a positive number or inf.")
    names = tuple(mesh.mesh_dim_names or ())
    device = (
        torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu")
    )
    infinite = math.isinf(norm_type)
    # One cell for every set of axes that a parameter can be sharded over; sums run over the axes one after the other.
    cells = torch.zeros(2 ** len(names), dtype=torch.float32, device=device)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        cell, local = 0, gradient
        if isinstance(gradient, DTensor):
            own = gradient.device_mesh.mesh_dim_names or ()
            for axis, placement in zip(own, gradient.placements, strict=True):
                if placement.is_partial():
                    raise UnsupportedError(
                        "the norm of a gradient that is still a sum over ranks is not known; reduce it first."
                    )
                if not placement.is_replicate():
                    cell |= 1 << names.index(axis)
            local = gradient.to_local()
        if not local.numel():
            continue
        norm = torch.linalg.vector_norm(local, norm_type, dtype=torch.float32).to(device)
        cells[cell] = torch.maximum(cells[cell], norm) if infinite else cells[cell] + norm**norm_type
    for bit, name in enumerate(names):
        if mesh[name].size() == 1:
            continue
        chosen = torch.tensor([cell for cell in range(len(cells)) if cell >> bit & 1], device=device)
        part = cells[chosen]
        dist.all_reduce(part, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=mesh[name].get_group())
        cells[chosen] = part
    return cells.max() if infinite else cells.sum() ** (1.0 / norm_type)


@torch.no_grad()
def clip_(
    parameters: Iterable[torch.Tensor], mesh: DeviceMesh, max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Scale the gradients of ``parameters`` so that their norm is at most ``max_norm``; the gradients themselves, not a
    copy.

    Arguments and result are those of :func:`total_norm`: the norm before clipping.
    """
    parameters = list(parameters)
    norm = total_norm(parameters, mesh, norm_type)
    scale_(parameters, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


@torch.no_grad()
def scale_(parameters: Iterable[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply the gradients of ``parameters`` by ``factor``, in place and in their own dtype."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.device))
