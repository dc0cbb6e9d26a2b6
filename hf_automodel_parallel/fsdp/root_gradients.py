"""The same parameters of the root have a gradient on every data-parallel rank, whatever each rank's batch ran.

FSDP2 reduces the gradients of a unit in one collective, over those parameters that have one. If the images are all on
one rank, only that rank has gradients in the vision tower, the ranks' collectives differ in size, and they hang or mix
up parameters. So the ranks agree before: what has a gradient on some rank gets zeros on the others, what has none
anywhere has none, as in one process, where an optimizer then leaves it alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from .. import compat
from .dtype_groups import ParamGroupModule, companions


class RootGradients:
    """The agreement for one sharded model: one all-reduce of a byte per parameter in each backward.

    It happens when the gradients of the root are complete, which FSDP2 reduces last. Without trained parameters in the
    root there is no collective.

    Args:
        root: the root unit.
        mesh: the data-parallel axes.
        units: those that are gathered with the root and have no agreement yet; None for the root and all its
            companions.
    """

    def __init__(self, root: nn.Module, mesh: DeviceMesh, units: list[ParamGroupModule] | None = None) -> None:
        self.places = _own_parameters(root)
        self.mesh = mesh
        self.root = root
        for unit in (root, *companions(root)) if units is None else units:
            compat.before_reduction(unit, self.agree)

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters of the root, as they stand in their modules now: gathered, while a backward runs."""
        return [p for p in (m._parameters.get(name) for m, name in self.places) if p is not None and p.requires_grad]

    @torch.no_grad()
    def agree(self) -> None:
        """Collective over the data-parallel ranks."""
        parameters = self.trained()
        if not parameters:
            return
        # Where images went into frozen embeddings, only ranks with images have a gradient at the input of the first
        # layer. On the others FSDP2 would reduce that layer after the root.
        compat.reduce_all_but((self.root, *companions(self.root)))
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        present = present.to(self.mesh.device_type)
        for dim in range(self.mesh.ndim):
            if self.mesh.size(dim) > 1:
                dist.all_reduce(present, dist.ReduceOp.MAX, group=self.mesh.get_group(dim))
        for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _own_parameters(root: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the parameters of the root unit are, each once, in the order of the module tree."""
    found: dict[int, tuple[nn.Module, str]] = {}
    waiting, seen = [root], {id(root)}
    while waiting:
        module = waiting.pop()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (module, name))
        for child in reversed(list(module.children())):
            if id(child) not in seen and (not isinstance(child, FSDPModule) or isinstance(child, ParamGroupModule)):
                seen.add(id(child))
                waiting.append(child)
    return list(found.values())
