"""Complete the Partial gradients of replicated parameters over the tp axis: once per step, or after each backward.

A replicated parameter that is combined with sharded activations (lora_A of a column-wise layer, a norm of sharded
heads) gets a gradient that is Partial: each rank holds its local contribution to a sum.

:class:`PartialGradients` defers the sum. FSDP2 on its own would reduce the gradients in every micro-batch; here one
flat all-reduce per dtype and optimizer step completes them all, after the data-parallel reduction, in the dtype of the
sharded gradients (float32 under mixed precision). :func:`sum_gradients` sums at once, for styles that
``parallelize_module`` applies without this package's own engine.

Deferred gradients are averaged and not summed, because one parameter may also get a contribution that is replicated: a
weight penalty in the loss, or a norm that is applied to hidden states outside of the layers. Partial contributions are
therefore multiplied by the size of the axis where they arise (exact for powers of two). An average leaves a replicated
contribution as it is, and also one that has been averaged before, so flushing twice is safe.

The rule to keep: every use of a registered parameter that yields a Partial gradient goes through its
:meth:`PartialGradients.hook`. A parameter of which no hook was called is not averaged, so that a contribution that
bypassed the hook shows in the audit.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.swap import Slot, exchange, stand_ins
from .collectives import all_reduce, copy_to_tp


class PartialGradients:
    """Registry of the parameters with Partial gradients of one model, and the idempotent :meth:`flush`.

    Attributes:
        sums_after_backward: flush at the end of each backward, for training loops that never call :meth:`flush`.
        deferred: the running backward is followed by a flush, so that gradients can wait for the last micro-batch.
        resolves: look up the parameter objects before the flush at the end of a backward, because filling a model from
            the meta device has replaced them.
    """

    sums_after_backward = False
    deferred = False
    resolves = False

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group()
        self._size = mesh.size()
        self._device_type = mesh.device_type
        self._parameters: dict[tuple[nn.Module, str], nn.Parameter | None] = {}
        self._reached: set[tuple[nn.Module, str]] = set()  # those with Partial gradients since the last flush
        self._queued = False  # a callback for the end of the running backward is registered

    def add(self, module: nn.Module, name: str) -> None:
        """Register the parameter ``name`` of ``module``; by name, because sharding replaces the object."""
        self._parameters[module, name] = None

    def resolve(self) -> None:
        """Look up the parameter objects; to be called once they are sharded."""
        for module, name in self._parameters:
            self._parameters[module, name] = module._parameters.get(name)

    def hand_over(self, parameters: Collection[nn.Parameter]) -> set[nn.Parameter]:
        """Leave the sums of these ``parameters`` to the caller, and return those that have Partial gradients.

        Their contributions are still multiplied by the size of the axis.
        """
        keys = [(module, name) for module, name in self._parameters if module._parameters.get(name) in parameters]
        return {self._handed_over(key) for key in keys}

    def _handed_over(self, key: tuple[nn.Module, str]) -> nn.Parameter:
        del self._parameters[key]
        return key[0]._parameters[key[1]]  # type: ignore[return-value]

    def hook(self, module: nn.Module, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The gradient hook for a use of the parameter ``name`` of ``module`` that yields a Partial gradient."""
        return functools.partial(self._scaled, (module, name))

    def _scaled(self, key: tuple[nn.Module, str], gradient: torch.Tensor) -> torch.Tensor:
        if self.sums_after_backward and not self.deferred and not self._queued:
            self._queued = True
            compat.after_backward(self._after_backward)
        self._reached.add(key)
        return gradient * self._size

    def _after_backward(self) -> None:
        self._queued = False
        if self.resolves:
            self.resolve()
        # Not forgotten: this may be the end of a backward inside of another one (a reentrant checkpoint), after which
        # FSDP2 still adds to these gradients. Averaging twice changes nothing.
        reached = set(self._reached)
        self.flush()
        self._reached |= reached

    @torch.no_grad()
    def flush(self) -> None:
        """Complete the outstanding Partial gradients over the tp axis; without any, do nothing.

        Collective over the tp axis. Its ranks run the same backwards, so all of them have the same ones outstanding.
        """
        self._queued = False  # also where an error has ended the backward before its callbacks
        if not self._reached:
            return
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        # In the order of the registry, which is equal on all ranks. A parameter that several modules hold counts once.
        reached = [p for key, p in self._parameters.items() if key in self._reached and p is not None]
        for parameter in {id(p): p for p in reached}.values():
            if parameter.grad is not None:
                gradient = parameter.grad
                gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                by_dtype[gradient.dtype].append(gradient)
        if not by_dtype:
            return
        for gradients in by_dtype.values():
            # Offloaded gradients lie on the CPU, where the group of a GPU mesh may not communicate.
            flat = torch.cat([g.reshape(-1) for g in gradients]).to(self._device_type)
            mean = all_reduce(flat, self._group).div_(self._size)
            for gradient, average in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(average.view_as(gradient))
        self._reached.clear()


def sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of all parameters below ``module`` over the 1-D ``mesh``, in each backward.

    During the module's forward its parameters are replaced by :func:`copy_to_tp` of them (identity forward, all-reduce
    backward). So FSDP2 may replace the parameter objects before or after this call, and a gradient that accumulates
    over several backwards is right, too.

    Args:
        module: called as a module; its ``forward`` stays as it is.
        mesh: the tp axis.
    """
    group = mesh.get_group()
    replaced: list[list[Slot]] = []  # one list for each running call

    def copied(name: str, parameter: nn.Parameter) -> torch.Tensor | None:
        if not parameter.requires_grad:
            return None
        local: torch.Tensor = parameter
        if isinstance(parameter, DTensor):
            local = parameter.to_local(grad_placements=parameter.placements)
        return copy_to_tp(local, group)

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        replaced.append(exchange(stand_ins(module, copied)))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if replaced:  # empty if an earlier pre-hook has failed
            exchange(replaced.pop())

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
