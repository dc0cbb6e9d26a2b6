"""The data-parallel ranks reduce the gradients of the same parameters, also if a batch did not use some of them.

FSDP2 reduces those parameters of a unit that have a gradient. With experts as modules the tokens of each rank choose
other experts, so the ranks would add up gradients of different parameters, or hang. So a parameter without a gradient
gets zeros before the reduction. A parameter that no rank used has no gradient afterwards, as in one process, where an
optimizer then skips it.

Each unit has one more, tiny *usage* parameter, whose gradient marks the others that this rank used. It is reduced
together with the gradients, so this costs no extra collective, and only ranks that have filled in zeros read the
result.
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
    """Holds the usage parameter of a unit; in the module tree only while FSDP2 looks for the unit's parameters.

    Attributes:
        usage: 1-D, one copy of ``count`` numbers for each of ``shards`` ranks, so that the reduce-scatter leaves every
            rank with a full copy in its shard.

    Args:
        count: number of parameters of the unit.
        shards: number of ranks that FSDP2 shards over.
        like: a trained parameter of the unit, for the dtype: FSDP2 reduces a group in one dtype.
        device: device type of the mesh; ``like`` may still be on the meta device.
    """

    def __init__(self, count: int, shards: int, like: torch.Tensor, device: str) -> None:
        super().__init__()
        self.count, self.shards = count, shards
        self.usage = nn.Parameter(torch.zeros(count * shards, dtype=like.dtype, device=device))


def shard_counting(
    shard: Callable[..., Any],
    modules: nn.Module | list[nn.Module],
    members: list[nn.Parameter],
    mesh: DeviceMesh,
    **options: Any,
) -> None:
    """Call ``shard(modules, mesh=mesh, **options)`` so that the ranks reduce the same gradients of the new unit.

    Args:
        shard: ``fully_shard``, or a function that is called in its place.
        modules: one module, or several that form one unit.
        members: the parameters of the unit.
        mesh: the data-parallel axes.
        options: options of ``fully_shard``.
    """
    trained = [p for p in members if p.requires_grad]
    if mesh.size() == 1 or not trained:
        shard(modules, mesh=mesh, **options)
        return
    first = modules[0] if isinstance(modules, list) else modules
    used = Used(len(members), mesh.size(mesh.ndim - 1), trained[0], mesh.device_type)
    # FSDP2 manages the parameters that are in the module tree at this moment. Taken out again, the usage parameter has
    # no name in the model, so neither checkpoints nor optimizers see it.
    first.add_module(_NAME, used)
    try:
        shard(modules, mesh=mesh, **options)
    finally:
        delattr(first, _NAME)
    if isinstance(first, FSDPModule) and (group := compat.group_of(first, used.usage)) is not None:
        _SameGradients(group, used)


class _SameGradients:
    """Fills in zeros before the reduction of one param group, and removes the gradients that no rank had after it."""

    def __init__(self, group: Any, used: Used) -> None:
        self.group, self.used = group, used
        self.usage = next(p for p in group.fsdp_params if compat.owner_of(p) is used)
        self.members = [p for p in group.fsdp_params if p is not self.usage]
        self.ran = False  # a forward with gradients has run since the last reduction
        self.filled: dict[int, Any] = {}  # parameters whose gradient on this rank is nothing but filled-in zeros
        compat.around_group(group, self.before_forward, self.fill, self.convert_usage)

    def before_forward(self) -> None:
        """Before each forward of the unit."""
        self.ran = self.ran or torch.is_grad_enabled()

    def convert_usage(self) -> None:
        """Before FSDP2 looks at dtypes, once: the model may have been converted since it was sharded."""
        dtypes = [p.sharded_param.dtype for p in self.members if p.sharded_param.requires_grad]
        if dtypes and dtypes[0] != self.used.usage.dtype:
            self.used.usage = nn.Parameter(self.used.usage.detach().to(dtypes[0]))

    @torch.no_grad()
    def fill(self) -> None:
        """Before a reduction. Every rank has run the unit's all-gathers, so if one rank reduces the unit all do, with
        gradients of their own or without.
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
        # Once for each shard, so that the reduce-scatter leaves the sum over all ranks on every rank.
        compat.give_gathered_gradient(self.usage, mine.repeat(self.used.shards))
        if not expected:  # a unit of several modules whose main reduction has run: only late gradients are left
            missing = []
        # Zeros, because FSDP2 reduces those parameters of a unit that have a gradient: ranks must agree on them.
        for _, parameter in missing:
            compat.give_gathered_gradient(parameter, None)
        for i, parameter in missing:
            if parameter.sharded_param.grad is None:
                self.filled[i] = parameter
        compat.unify_gathered_gradients([self.usage, *(p for _, p in members)])
        compat.after_backward(self.remove_unused)

    @torch.no_grad()
    def remove_unused(self) -> None:
        """At the end of a backward: a parameter that no rank used has no gradient."""
        usage = self.usage.sharded_param
        if usage.grad is None:  # HSDP without the all-reduce between replicas: FSDP2 holds the result until that comes
            return
        counts, usage.grad = usage.grad, None
        if not self.filled:
            return
        filled, self.filled = self.filled, {}
        local = counts.to_local() if isinstance(counts, DTensor) else counts
        if local.device.type != "cpu":
            torch.accelerator.synchronize()  # FSDP2 reduces on streams of its own
        used_on_any_rank = local.tolist()
        for i, parameter in filled.items():
            if used_on_any_rank[i] == 0:
                parameter.sharded_param.grad = None
