"""The data-parallel ranks reduce the same gradients of an FSDP2 unit, whatever each rank's batch used of it.

FSDP2 reduces those parameters of a unit that have a gradient. Where each rank's tokens go to other experts, the ranks
would add up gradients of different parameters, or wait for ever. So a parameter without a gradient gets zeros before
the reduction. One that no rank used has no gradient afterwards, as in one process, where an optimizer then leaves it
alone. Who used what travels with the gradients themselves: each unit has one more, tiny parameter, whose gradient says
which of the others this rank used. So nobody pays with a collective, and only a rank that has filled something in reads
the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .. import compat

_NAME = "used"


class Used(nn.Module):
    """Holds the parameter of a unit that counts; in the module tree only while FSDP2 looks for the unit's parameters.

    Args:
        count: for how many parameters.
        shards: over how many ranks FSDP2 shards; each gets the whole answer for its shard.
        like: a trained parameter of the unit.
        device: kind of device of the mesh, since ``like`` may have no values yet.
    """

    def __init__(self, count: int, shards: int, like: torch.Tensor, device: str) -> None:
        super().__init__()
        self.count, self.shards = count, shards
        self.answer = nn.Parameter(torch.zeros(count * shards, dtype=like.dtype, device=device))


def shard_counting(
    shard: Callable[..., Any],
    modules: nn.Module | list[nn.Module],
    members: list[nn.Parameter],
    mesh: DeviceMesh,
    **options: Any,
) -> None:
    """Call ``shard(modules, mesh=mesh, **options)``; from then on the ranks agree on the unit's gradients.

    Args:
        shard: ``fully_shard``, or what is called in its place.
        modules: one module, or several that form one unit.
        members: the parameters of the unit.
        mesh: the data-parallel axes.
        options: of ``fully_shard``.
    """
    trained = [p for p in members if p.requires_grad]
    if mesh.size() == 1 or not trained:
        shard(modules, mesh=mesh, **options)
        return
    first = modules[0] if isinstance(modules, list) else modules
    used = Used(len(members), mesh.size(mesh.ndim - 1), trained[0], mesh.device_type)
    first.add_module(_NAME, used)
    try:
        shard(modules, mesh=mesh, **options)
    finally:
        delattr(first, _NAME)
    if isinstance(first, FSDPModule) and (group := compat.group_of(first, used.answer)) is not None:
        _Agreement(group, used)


class _Agreement:
    """Fills in zeros before the reduction of one group of parameters, and takes back after it what no rank used."""

    def __init__(self, group: Any, used: Used) -> None:
        self.group, self.used = group, used
        self.answer = next(p for p in group.fsdp_params if compat.owner_of(p) is used)
        self.members = [p for p in group.fsdp_params if p is not self.answer]
        self.ran = False  # a forward ran that a backward may follow
        self.filled: dict[int, Any] = {}  # parameters whose gradient this rank has only filled in
        compat.around_group(group, self.note, self.fill, self.follow_dtype)

    def note(self) -> None:
        """Before a forward of the unit."""
        self.ran = self.ran or torch.is_grad_enabled()

    def follow_dtype(self) -> None:
        """Before FSDP2 looks at dtypes, once: the model may have been converted since it was sharded."""
        dtypes = [p.sharded_param.dtype for p in self.members if p.sharded_param.requires_grad]
        if dtypes and dtypes[0] != self.used.answer.dtype:
            self.used.answer = nn.Parameter(self.used.answer.detach().to(dtypes[0]))

    @torch.no_grad()
    def fill(self) -> None:
        """Before a reduction. No rank has run the unit alone, so where one reduces it all do, with a gradient or
        without.
        """
        if not self.group.reduce_grads:
            return
        expected = self.ran or compat.backward_reached(self.group)
        self.ran = False
        members = [(i, p) for i, p in enumerate(self.members) if compat.trained_when_gathered(p)]
        missing = [(i, p) for i, p in members if not compat.has_gathered_gradient(p)]
        if not members or (not expected and len(missing) == len(members)):
            return
        mine = torch.zeros(self.used.count)
        mine[[i for i, _ in members]] = 1
        mine[[i for i, _ in missing]] = 0
        compat.give_gathered_gradient(self.answer, mine.repeat(self.used.shards))
        if not expected:  # a unit of several modules, of which another one was reduced before: nothing more is missing
            missing = []
        for _, parameter in missing:
            compat.give_gathered_gradient(parameter, None)
        for i, parameter in missing:
            if parameter.sharded_param.grad is None:
                self.filled[i] = parameter
        compat.unify_gathered_gradients([self.answer, *(p for _, p in members)])
        compat.after_backward(self.take_back)

    @torch.no_grad()
    def take_back(self) -> None:
        """At the end of a backward: what no rank used has no gradient."""
        answer = self.answer.sharded_param
        if answer.grad is None:  # HSDP that reduces within a replica alone goes on counting
            return
        counts, answer.grad = answer.grad, None
        if not self.filled:
            return
        filled, self.filled = self.filled, {}
        local = counts.to_local() if isinstance(counts, DTensor) else counts
        if local.device.type != "cpu":
            torch.accelerator.synchronize()  # FSDP2 reduces on streams of its own
        found = local.tolist()
        for i, parameter in filled.items():
            if found[i] == 0:
                parameter.sharded_param.grad = None
