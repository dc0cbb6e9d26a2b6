"""Parameters without dimensions (CLIP's ``logit_scale``), which FSDP2 cannot shard: each rank has a replica.

Between forwards a replica is a DTensor on the mesh of the other parameters, replicated over all its axes, so that
optimizers, clipping and checkpoints see one kind of parameter. Its gradient is averaged over the data-parallel ranks at
the end of each backward, by one all-reduce for all of them. An average leaves what has been averaged before as it is,
so gradients may accumulate over backwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from .. import compat
from .options import on_device


def scalar_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter without dimensions of ``model``; a tied one has an entry for each of its names."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == 0}


def move_scalars(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """The parameters without dimensions of ``model``, moved to the device of ``mesh``: FSDP2 does not move what it
    ignores.
    """
    scalars = set(scalar_parameters(model).values())
    for parameter in scalars:
        if not isinstance(parameter, DTensor) and parameter.device.type != "meta":
            parameter.data = parameter.data.to(on_device(mesh.device_type))
    return scalars


def replicate_scalars(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the parameters without dimensions of ``model`` replicated DTensors, and average their gradients.

    Args:
        model: sharded by FSDP2, which has ignored these parameters; plain, or replicated DTensors on the tp axis.
        mesh: the data-parallel axes.
    """
    scalars = scalar_parameters(model)
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor) and p.ndim]
    whole = max(meshes, key=lambda m: m.ndim, default=mesh)  # a replicated tower is on the tp axis alone
    made: dict[nn.Parameter, nn.Parameter] = {}
    slots = []
    for name, parameter in scalars.items():
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        if parameter not in made:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            replica = DTensor.from_local(local.detach(), whole, [Replicate()] * whole.ndim, run_check=False)
            made[parameter] = nn.Parameter(replica, parameter.requires_grad)
            slots.append((owner, key))
        owner._parameters[key] = made[parameter]
    if slots and mesh.size() > 1:
        _Average(model, slots, mesh)


class _Average:
    """Averages the gradients of replicas over the data-parallel ranks at the end of each backward.

    A replica that some ranks did not use has a gradient on all of them afterwards, and one that no rank used has none,
    as in one process.

    Args:
        root: the model; a backward through one of its outputs ends with the average.
        slots: module and name of each replica.
        mesh: the data-parallel axes.
    """

    def __init__(self, root: nn.Module, slots: list[tuple[nn.Module, str]], mesh: DeviceMesh) -> None:
        self.slots, self.mesh = slots, mesh
        self.queued = False  # the running backward ends with the average
        root.register_forward_pre_hook(self._begin)
        root.register_forward_hook(self._watch)

    def _begin(self, *_: Any) -> None:
        self.queued = False  # also where an error has ended a backward before its callbacks

    def _watch(self, _: nn.Module, __: Any, output: Any) -> None:
        for tensor in compat.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(self._queue)

    def _queue(self, _: torch.Tensor) -> None:
        if not self.queued:
            self.queued = True
            compat.after_backward(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self.queued = False
        held = [owner._parameters.get(key) for owner, key in self.slots]
        trained = [p for p in held if p is not None and p.requires_grad]
        if not trained:
            return
        locals_ = [None if p.grad is None else p.grad.to_local() for p in trained]  # type: ignore[attr-defined]
        # The sum of the gradients, and on how many ranks there is one.
        flat = torch.zeros(2, len(trained), device=on_device(self.mesh.device_type))
        for index, gradient in enumerate(locals_):
            if gradient is not None:
                flat[0, index], flat[1, index] = gradient, 1.0
        for dim in range(self.mesh.ndim):
            if self.mesh.size(dim) > 1:
                dist.all_reduce(flat, group=self.mesh.get_group(dim))
        means = (flat[0] / self.mesh.size()).unbind()
        for parameter, gradient, mean, used in zip(trained, locals_, means, flat[1].tolist(), strict=True):
            if gradient is not None:
                gradient.copy_(mean)
            elif used:
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad.to_local().copy_(mean)  # type: ignore[attr-defined]
