"""Replicas of one parameter on several ranks: their gradients and their values must be equal.

A plan says which replicated parameters see sharded activations, so that their gradients are summed. Where it forgets
one (a learnable activation between two sharded projections, say), each rank would train its own copy, without an error
and with a loss that looks right. Complete gradients of copies are computed alike and come out equal; forgotten ones
differ by as much as they are large, so one look tells. Values are equal from the start and stay so if gradients do.
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
#: Gradients below this part of the largest one are rounding noise of something that is zero in exact arithmetic.
NOISE_FLOOR = 1e-5
#: Numbers of a fingerprint are summed over this many elements at a time, to bound the temporary memory.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Replicas:
    """What a comparison of the copies found.

    Attributes:
        gradients: names of the parameters whose copies have different gradients; None if a gradient is not finite,
            which says nothing about copies.
        values: names of the parameters whose copies have different values.
        inputs: the ranks of a tp group were given different inputs.
        troubled: a rank has a problem of its own.
    """

    gradients: list[str] | None
    values: list[str]
    inputs: bool
    troubled: bool


@torch.no_grad()
def compare_replicas(model: nn.Module, tolerance: float, inputs: torch.Tensor, tp_size: int, trouble: bool) -> Replicas:
    """Compare gradients and values of the parameters that several ranks hold copies of.

    Collective over all ranks, one gather of three numbers per parameter; call it after outstanding partial gradients
    were summed and before the step.

    Args:
        model: the sharded model, its parameters at rest.
        tolerance: relative difference that the values' fingerprints may have.
        inputs: two numbers made of what this rank's forwards were given, float64 of shape (2,).
        tp_size: number of ranks of a tp group, which are neighbours; they have to be given the same.
        trouble: this rank has a problem of its own that the others should know of.
    """
    # Every copied parameter, trainable or not, has its row: what a rank finds must not decide about a collective.
    copied = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor) and _is_copied(p)}
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

    def differing_gradients(copies: torch.Tensor) -> bool:
        spread = copies[:, 0].max() - copies[:, 0].min()
        return bool(spread > GRADIENT_TOLERANCE * copies[:, 0].max() and spread > NOISE_FLOOR * largest)

    def differing_values(copies: torch.Tensor) -> bool:
        prints = copies[:, 1:]
        if torch.equal(prints.nan_to_num(), prints[:1].nan_to_num().expand_as(prints)):
            return False  # also where all of them are infinite or not a number
        return not bool((prints.amax(0) - prints.amin(0) <= tolerance * prints[:, 0].max()).all())

    finite = bool(torch.isfinite(norms).all())
    return Replicas(
        _disagreeing(copied, table, differing_gradients) if finite else None,
        _disagreeing(copied, table, differing_values),
        other_inputs,
        troubled,
    )


def _is_copied(tensor: DTensor) -> bool:
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return any(placement.is_replicate() and size > 1 for placement, size in sizes)


def _gradient_norm(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(1, dtype=torch.float64, device=parameter.device)
    return torch.linalg.vector_norm(parameter.grad.to_local().float()).double()[None]  # type: ignore[attr-defined]


def _fingerprint(local: torch.Tensor) -> torch.Tensor:
    """Norm and weighted sum of ``local``, float64 of shape (2,), equal for equal content."""
    flat = local.detach().reshape(-1)
    result = torch.zeros(2, dtype=torch.float64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].float()
        result[0] += part.pow(2).sum()
        result[1] += (part * torch.linspace(-1.0, 1.0, part.numel(), device=part.device)).sum()
    result[0].sqrt_()
    return result


def _copied_axes(tensor: DTensor) -> tuple[DeviceMesh, list[int]]:
    """A mesh of all ranks, the same on each of them, and its axes over which ``tensor`` is replicated.

    What FSDP2 leaves alone (a replicated tower) knows of the tp axis only, and is a copy along the others.
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
        mesh, copied = _copied_axes(tensor)
        by_place = table[mesh.mesh.cpu(), index]  # mesh shape, then the numbers
        for axis in copied:
            lines = by_place.movedim(axis, -2).flatten(0, -3)  # (places, copies, numbers)
            if any(wrong(line) for line in lines):
                found.append(name)
                break
    return found
