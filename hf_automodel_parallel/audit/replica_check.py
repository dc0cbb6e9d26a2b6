"""Replicas of one parameter on several ranks: their gradients and their values must be equal.

A plan says which replicated parameters are combined with sharded activations, so that their Partial gradients are
summed. If it forgets one (a learnable activation between two sharded projections, say), each rank would train its own
replica, without an error and with a loss that looks right. Complete gradients of replicas are equal; Partial ones
differ by about their own size, so one comparison finds them. Values are equal at first, and stay equal if gradients
are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from .. import compat
from ..core.ranks import communication_device, gather_tensors

#: Replicas may differ by rounding (kernels with atomics); a forgotten sum differs by about the gradient itself.
GRADIENT_TOLERANCE = 1e-2
#: A norm below this fraction of the largest one is rounding noise of a gradient that is zero in exact arithmetic.
NOISE_FLOOR = 1e-5
#: A fingerprint is summed over this many elements at a time, to bound the temporary memory.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Replicas:
    """The result of a comparison of replicas.

    Attributes:
        gradients: names of the parameters whose replicas have different gradients; None if a gradient is not finite, so
            that they cannot be compared.
        values: names of the parameters whose replicas have different values.
        inputs: the ranks of a tp group were given different inputs.
        troubled: a rank has a problem of its own.
    """

    gradients: list[str] | None
    values: list[str]
    inputs: bool
    troubled: bool


@torch.no_grad()
def compare_replicas(model: nn.Module, tolerance: float, inputs: torch.Tensor, tp_size: int, trouble: bool) -> Replicas:
    """Compare gradients and values of the parameters that several ranks hold replicas of.

    Collective over all ranks: one all-gather of three numbers per parameter. To be called after Partial gradients were
    summed, and before the step.

    Args:
        model: the sharded model, all units resharded.
        tolerance: relative difference that the fingerprints of values may have.
        inputs: fingerprint of the inputs of this rank's forwards, float64 of shape (2,).
        tp_size: number of ranks of a tp group, which have consecutive ranks and need equal inputs.
        trouble: this rank has found a problem of its own.
    """
    # Every replicated parameter, trainable or not, has a row, so that all ranks gather tables of the same size.
    copied = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor) and _is_replicated(p)}
    device = communication_device()
    rows = [torch.cat([_gradient_norm(p), _fingerprint(p.to_local())]).to(device) for p in copied.values()]
    mine = torch.stack(
        [*rows, torch.cat([torch.tensor([float(trouble)], dtype=torch.float64), inputs.cpu()]).to(device)]
    )
    table = gather_tensors(mine).cpu()  # (world size, rows, 3)
    groups = table[:, -1, 1:].view(-1, tp_size, 2).nan_to_num()
    other_inputs = not torch.allclose(groups, groups[:, :1], rtol=1e-9, atol=0.0)
    troubled, table = bool(table[:, -1, 0].any()), table[:, :-1]
    norms = table[:, :, 0]
    largest = norms.max() if norms.numel() else torch.zeros(())

    def differing_gradients(replicas: torch.Tensor) -> bool:
        spread = replicas[:, 0].max() - replicas[:, 0].min()
        return bool(spread > GRADIENT_TOLERANCE * replicas[:, 0].max() and spread > NOISE_FLOOR * largest)

    def differing_values(replicas: torch.Tensor) -> bool:
        prints = replicas[:, 1:]
        if torch.equal(prints.nan_to_num(), prints[:1].nan_to_num().expand_as(prints)):
            return False  # also if all of them are infinite or nan
        return not bool((prints.amax(0) - prints.amin(0) <= tolerance * prints[:, 0].max()).all())

    finite = bool(torch.isfinite(norms).all())
    return Replicas(
        _disagreeing(copied, table, differing_gradients) if finite else None,
        _disagreeing(copied, table, differing_values),
        other_inputs,
        troubled,
    )


def _is_replicated(tensor: DTensor) -> bool:
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return any(placement.is_replicate() and size > 1 for placement, size in sizes)


def _gradient_norm(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(1, dtype=torch.float64, device=parameter.device)
    return torch.linalg.vector_norm(parameter.grad.to_local().float()).double()[None]  # type: ignore[attr-defined]


def _fingerprint(local: torch.Tensor) -> torch.Tensor:
    """Norm and weighted sum of ``local``, float64 of shape (2,); equal for equal values."""
    flat = local.detach().reshape(-1)
    result = torch.zeros(2, dtype=torch.float64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].float()
        result[0] += part.pow(2).sum()
        result[1] += (part * torch.linspace(-1.0, 1.0, part.numel(), device=part.device)).sum()
    result[0].sqrt_()
    return result


def _replicated_axes(tensor: DTensor) -> tuple[DeviceMesh, list[int]]:
    """A mesh of all ranks, the same on each of them, and its axes over which ``tensor`` is replicated.

    A parameter that FSDP2 does not manage (of a replicated modality encoder) is a DTensor on the tp axis only, and is
    replicated over the other axes.
    """
    mesh, placements = tensor.device_mesh, list(tensor.placements)
    if mesh.size() < dist.get_world_size():
        own = dict(zip(mesh.mesh_dim_names or (), placements, strict=False))
        mesh = compat.root_mesh(mesh)
        placements = [own.get(name, Replicate()) for name in mesh.mesh_dim_names or ()]
    return mesh, [axis for axis, p in enumerate(placements) if p.is_replicate() and mesh.shape[axis] > 1]


def _disagreeing(rows: Mapping[str, DTensor], table: torch.Tensor, wrong: Callable[[torch.Tensor], bool]) -> list[str]:
    """Names of the rows whose numbers differ, by ``wrong``, along a mesh axis over which the tensor is replicated."""
    found = []
    for index, (name, tensor) in enumerate(rows.items()):
        mesh, axes = _replicated_axes(tensor)
        by_rank = table[mesh.mesh.cpu(), index]  # (*mesh shape, 3)
        for axis in axes:
            groups = by_rank.movedim(axis, -2).reshape(-1, by_rank.shape[axis], 3)
            if any(wrong(group) for group in groups):
                found.append(name)
                break
    return found
