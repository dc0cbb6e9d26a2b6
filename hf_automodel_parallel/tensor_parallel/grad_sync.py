"""The place that completes gradients over the tp axis, but for styles on torch's own engine (:mod:`.summed_gradients`).

A small replicated parameter in a sharded region (lora_A of a column-wise layer, a norm of sharded heads) gets on every
rank only its summand of the gradient. FSDP2 on its own would reduce each of them in every micro-batch; here all of them
are averaged by one flat all-reduce per dtype and optimizer step, after the data-parallel reduction, in the dtype of the
sharded gradients (float32 under mixed precision).

Averaged, because a parameter may get another part of its gradient that is whole on every rank: a weight penalty in the
loss, or a norm that is applied to hidden states outside of the layers. Summands are therefore multiplied by the size of
the axis where they arise (exact for powers of two); what is whole stays as it is, and so does what has been averaged
before.

The rule to keep: every use of a registered parameter that yields a summand goes through its
:meth:`PartialGradients.hook`. A parameter of which no hook was called is not averaged, so that a summand that came past
its hook shows in the audit.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import compat
from .collectives import all_reduce


class PartialGradients:
    """Registry of the parameters with partial gradients of one model, and the idempotent :meth:`flush`.

    Attributes:
        sums_after_backward: flush at the end of each backward, for loops in which nobody calls :meth:`flush`.
    """

    sums_after_backward = False

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group()
        self._size = mesh.size()
        self._device_type = mesh.device_type
        self._parameters: dict[tuple[nn.Module, str], nn.Parameter | None] = {}
        self._reached: set[tuple[nn.Module, str]] = set()  # those that have got summands since the last flush
        self._queued = False  # the end of the running backward is awaited

    def add(self, module: nn.Module, name: str) -> None:
        """Register the parameter ``name`` of ``module`` (whatever object stands there after sharding)."""
        self._parameters[module, name] = None

    def resolve(self) -> None:
        """Look the parameters up again; to be called once they are sharded."""
        for module, name in self._parameters:
            self._parameters[module, name] = module._parameters.get(name)

    def hook(self, module: nn.Module, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The hook for what a forward uses of the parameter ``name`` of ``module``, where its gradient will be a
        summand.
        """
        return functools.partial(self._scaled, (module, name))

    def _scaled(self, place: tuple[nn.Module, str], summand: torch.Tensor) -> torch.Tensor:
        if self.sums_after_backward and not self._queued:
            self._queued = True
            compat.after_backward(self._after_backward)
        self._reached.add(place)
        return summand * self._size

    def _after_backward(self) -> None:
        self._queued = False
        self.resolve()  # a model from the meta device got other parameter objects when it was filled
        self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Complete the outstanding partial gradients over the tp axis. Does nothing when none is outstanding.

        Collective over the tp axis: every rank of it has run the same backwards, so all of them call it alike.
        """
        if not self._reached:
            return
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        # In the order of the registry, which all ranks share. A parameter that several modules hold is there once.
        reached = [p for place, p in self._parameters.items() if place in self._reached and p is not None]
        for parameter in {id(p): p for p in reached}.values():
            if parameter.grad is not None:
                gradient = _local(parameter.grad)
                by_dtype[gradient.dtype].append(gradient)
        if not by_dtype:
            return
        for gradients in by_dtype.values():
            # Offloaded gradients lie on the CPU, where the group of a GPU mesh may not communicate.
            flat = torch.cat([g.reshape(-1) for g in gradients]).to(self._device_type)
            mean = all_reduce(flat, self._group).div_(self._size)
            for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        self._reached.clear()


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
