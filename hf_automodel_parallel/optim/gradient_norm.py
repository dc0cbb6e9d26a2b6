"""The norm of sharded gradients, and clipping by it: one reduction for each mesh axis, however many parameters.

torch's ``clip_grad_norm_`` does the same for DTensors of one mesh, but cannot stack norms on different meshes
(tensor-parallel parameters on two axes, replicated ones on one), and returns a DTensor. Here each rank takes
the norm of its local shards, and each sum is reduced over exactly those axes over which a parameter is sharded, so that
each element counts once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..errors import UnsupportedError


@torch.no_grad()
def total_norm(
    parameters: Iterable[torch.Tensor], norm_type: float = 2.0, mesh: DeviceMesh | None = None
) -> torch.Tensor:
    """The norm of all gradients of ``parameters`` together, as one process would compute it.

    Args:
        parameters: plain tensors (equal on all ranks) or DTensors; their gradients may be None. All ranks give the same
            ones in the same order.
        norm_type: 1, 2, ... or infinity.
        mesh: the mesh over whose axes all ranks reduce; None for the axes of the parameters. To be given where a rank
            that holds no part of a parameter has no DTensor for it.

    Returns:
        A scalar in float32 (float64 if a parameter is), equal on all ranks. A parameter that is replicated over an axis
        counts once, not once for each of its ranks. Collective: one all-reduce of some numbers for each axis over which
        a parameter is sharded.

    Raises:
        UnsupportedError: another ``norm_type``, or a Partial gradient.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise UnsupportedError(f"norm_type={norm_type}: give a positive number or inf.")
    parameters = list(parameters)
    meshes = [p.device_mesh for p in parameters if isinstance(p, DTensor)] if mesh is None else [mesh]
    groups = {name: m.get_group(name) for m in dict.fromkeys(meshes) for name in m.mesh_dim_names or ()}
    axes = sorted(name for name, group in groups.items() if group.size() > 1)
    # One cell for each set of axes that a parameter is sharded over.
    cells: dict[tuple[str, ...], list[torch.Tensor]] = defaultdict(list)
    for gradient in (p.grad for p in parameters if p.grad is not None):
        cells[_sharded_over(gradient)].append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    sets = sorted({*cells, ()}) if mesh is None else _subsets(axes)
    device = torch.device("cpu")
    if meshes and meshes[0].device_type != "cpu":
        device = torch.device(meshes[0].device_type, torch.get_device_module(meshes[0].device_type).current_device())
    infinite = math.isinf(norm_type)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    sums = torch.zeros(len(sets), dtype=dtype, device=device)
    for index, which in enumerate(sets):
        if cells[which]:
            norm = _norm(cells[which], norm_type, dtype).to(device)
            sums[index] = norm if infinite else norm**norm_type
    for axis in axes:
        chosen = [index for index, which in enumerate(sets) if axis in which]
        if chosen:
            part = sums[chosen]
            dist.all_reduce(part, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=groups[axis])
            sums[chosen] = part
    return sums.max() if infinite else sums.sum() ** (1.0 / norm_type)


def _sharded_over(gradient: torch.Tensor) -> tuple[str, ...]:
    """The axes over which ``gradient`` is sharded, those of one rank apart."""
    if not isinstance(gradient, DTensor):
        return ()
    if any(placement.is_partial() for placement in gradient.placements):
        raise UnsupportedError("the norm of a gradient that is still a sum over ranks is not known; reduce it first.")
    mesh = gradient.device_mesh
    own = zip(mesh.mesh_dim_names or (), mesh.shape, gradient.placements, strict=True)
    return tuple(sorted(name for name, size, placement in own if size > 1 and not placement.is_replicate()))


def _subsets(axes: list[str]) -> list[tuple[str, ...]]:
    sets: list[tuple[str, ...]] = [()]
    for axis in axes:
        sets += [(*which, axis) for which in sets]
    return sorted(sets)


def _norm(tensors: list[torch.Tensor], norm_type: float, dtype: torch.dtype) -> torch.Tensor:
    """The norm of all local ``tensors`` together, computed in ``dtype``."""
    tensors = [tensor for tensor in tensors if tensor.numel()]  # an infinity norm of nothing is an error
    if not tensors:
        return torch.zeros((), dtype=dtype)
    exact = [t for t in tensors if t.dtype == dtype]
    norms = [torch.linalg.vector_norm(t, norm_type, dtype=dtype) for t in tensors if t.dtype != dtype]
    if exact:
        norms.append(torch.nn.utils.get_total_norm(exact, norm_type))
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)


@torch.no_grad()
def clip_(
    parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0, mesh: DeviceMesh | None = None
) -> torch.Tensor:
    """Scale the gradients of ``parameters`` in place, in their own dtype, so that their norm is at most ``max_norm``.

    Arguments and result are those of :func:`total_norm`: it returns the norm before clipping.
    """
    parameters = list(parameters)
    norm = total_norm(parameters, norm_type, mesh)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in (p.grad for p in parameters if p.grad is not None):
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.device))
    return norm
