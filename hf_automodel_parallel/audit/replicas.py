"""Copies of one parameter on several ranks: their gradients and their values must be equal.

A plan says which replicated parameters see sharded activations, so that their gradients are summed. Where it forgets one (a
learnable activation between two sharded projections, say), each rank would train its own copy, without an error and with a
loss that looks right. Complete gradients of copies are computed alike and come out equal; forgotten ones differ by as much
as they are large, so one look tells. Values are equal from the start and stay so if gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..synchronize import communication_device

#: Copies may differ by rounding (kernels with atomics); a forgotten sum differs by about the gradient itself.
GRADIENT_TOLERANCE = 1e-2
#: Gradients below this part of the largest one are rounding noise of something that is zero in exact arithmetic.
NOISE_FLOOR = 1e-5
#: Numbers of a fingerprint are summed over this many elements at a time, to bound the temporary memory.
_CHUNK = 1 << 22

#: Name -> parameter, and the numbers that are compared between its copies.
_Rows = Mapping[str, tuple[DTensor, torch.Tensor]]


@torch.no_grad()
def differing_gradients(model: nn.Module) -> list[str] | None:
    """Names of the parameters whose copies have different gradients.

    Collective over all ranks; call it after outstanding partial gradients were summed and before the step.

    Returns:
        None if nothing can be said: a gradient is not finite.
    """
    # Every copied parameter, trainable or not, has its row: what a rank finds must not decide about a collective.
    norms = {
        name: (parameter, _gradient_norm(parameter))
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and _copied(parameter)
    }
    largest = [torch.zeros((), dtype=torch.float64)]

    def wrong(copies: torch.Tensor) -> bool:
        spread = copies.max() - copies.min()
        return bool(spread > GRADIENT_TOLERANCE * copies.max() and spread > NOISE_FLOOR * largest[0])

    table = _gathered(norms)
    if not torch.isfinite(table).all():
        return None
    largest[0] = table.max() if table.numel() else largest[0]
    return _disagreeing(norms, table, wrong)


@torch.no_grad()
def differing_values(model: nn.Module, tolerance: float) -> list[str]:
    """Names of the parameters whose copies have different values.

    Collective over all ranks. Costs one pass over the copied parameters and one small gather.

    Args:
        model: the sharded model, its parameters at rest.
        tolerance: relative difference of two numbers computed from each copy (a norm and a weighted sum).
    """
    prints = {
        name: (parameter, _fingerprint(parameter.to_local()))
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and _copied(parameter)
    }

    def wrong(copies: torch.Tensor) -> bool:
        spread = copies.amax(0) - copies.amin(0)
        return not bool(
            (spread <= tolerance * copies[:, 0].abs().max()).all()
        )  # also true for values that are not finite

    return _disagreeing(prints, _gathered(prints), wrong)


def _gradient_norm(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(1, dtype=torch.float64, device=parameter.device)
    return torch.linalg.vector_norm(parameter.grad.to_local().float()).double()[None]  # type: ignore[attr-defined]


def _copied(tensor: DTensor) -> bool:
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return any(placement.is_replicate() and size > 1 for placement, size in sizes)


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


def _gathered(rows: _Rows) -> torch.Tensor:
    """The numbers of every rank, float64 of shape (world size, number of parameters, numbers per parameter), on the CPU."""
    device = communication_device()
    mine = (
        torch.stack([numbers.to(device) for _, numbers in rows.values()]) if rows else torch.empty(0, 1, device=device)
    )
    mine = mine.double()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    if rows:  # the same on every rank: the ranks hold one model
        dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu()


def _disagreeing(rows: _Rows, table: torch.Tensor, wrong: Callable[[torch.Tensor], bool]) -> list[str]:
    """Names of the rows whose numbers differ, by ``wrong``, along a mesh axis over which the tensor is replicated."""
    found = []
    for index, (name, (tensor, _)) in enumerate(rows.items()):
        by_place = table[tensor.device_mesh.mesh.cpu(), index]  # mesh shape, then the numbers
        for axis, placement in enumerate(tensor.placements):
            if not placement.is_replicate() or tensor.device_mesh.shape[axis] == 1:
                continue
            lines = by_place.movedim(axis, -2).flatten(0, -3)  # (places, copies, numbers)
            if any(wrong(line) for line in lines):
                found.append(name)
                break
    return found
