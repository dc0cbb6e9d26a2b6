"""Local in flight: while a module's forward runs, its parameters are plain local tensors instead of DTensors.

At rest every parameter is a DTensor, so the optimizer, FSDP2, clipping and checkpoints see its placement. A *region* is
a module (usually a decoder layer) whose forward is wrapped: on entry each DTensor on the tp axis below it is replaced
by its local shard, connected by autograd; on exit the DTensors return, also when the forward raises. So no operator
inside pays DTensor dispatch, a parent may read a child's weight, and the code that torch.compile sees contains no
DTensor at all.

The wrapper is the module's ``forward``, inside of ``__call__``: hooks of FSDP2 (gather before, free after) run outside
of it, and an activation checkpoint around the module runs it again in the recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .boundary_hooks import ReduceOutput, SharedInputs
from .full_parameter_view import FullParameterView


@dataclass(frozen=True)
class Entry:
    """One parameter of a region.

    Attributes:
        owner: the module that holds it.
        name: its name there.
        on_gradient: hook for its gradient in flight, which is a summand of it, or None.
        on_sequence_shards: it is a summand only in calls that work on shares of the sequence
        (:attr:`LocalParamForward.on_sequence_shards`).
        bias_of: the boundary that adds it after a reduction; the module itself sees no bias meanwhile.
        zero: the module sees zeros, because another rank's value is the one that counts in a sum over the ranks.
        part: (dimension, blocks, index, number): of each equal block along the dimension, the module sees the one of so
            many equal parts, while the parameter is whole at rest.
        local: the parameter is a local tensor at rest, too (megatron-fsdp); what is left is to mark, to move or to hide
        it.
    """

    owner: nn.Module
    name: str
    on_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None
    on_sequence_shards: bool = False
    bias_of: ReduceOutput | None = None
    zero: bool = False
    part: tuple[int, int, int, int] | None = None
    local: bool = False


class LocalParamForward:
    """The wrapped forward of one module.

    Args:
        module: the root of the region.
        entries: the parameters to exchange.
        shared: the boundaries' memory to clear at the end of the forward, or None.

    Attributes:
        on_sequence_shards: keyword arguments of a call -> does it work on shares of the sequence; sequence parallelism
            sets it.
    """

    def __init__(
        self,
        module: nn.Module,
        entries: list[Entry],
        shared: SharedInputs | None,
    ) -> None:
        functools.update_wrapper(
            self, module.forward
        )  # first: it copies the attributes of a forward that is an object, too
        self.module = module
        self.entries = entries
        self.shared = shared
        self.inner: Callable[..., Any] = module.forward
        self.body: Callable[..., Any] = self._run
        self.on_sequence_shards: Callable[[dict[str, Any]], bool] = _never
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.adopt_checkpoint_function()
        return self.inside(self.body, *args, **kwargs)

    def inside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` with the region's parameters exchanged; where they already are, nothing is done."""
        replaced = self._enter(self.on_sequence_shards(kwargs))
        try:
            return function(*args, **kwargs)
        finally:
            for entry, parameter in replaced:
                entry.owner._buffers.pop(entry.name, None)  # where a parametrization's removal leaves a plain tensor
                entry.owner._parameters[entry.name] = parameter  # type: ignore[assignment]
                if entry.bias_of is not None:
                    entry.bias_of.bias = None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.inner(*args, **kwargs)
        finally:
            if self.shared is not None:
                self.shared.clear()

    def adopt_checkpoint_function(self) -> None:
        """Let the model's own gradient checkpointing recompute inside the region.

        transformers (5.23; outside of ``__call__`` before) checkpoints in the class's ``forward``, so below this
        wrapper: its recomputation starts where nobody has exchanged the parameters. Looked up at each call, because the
        model's method that switches checkpointing on may be called at any time.
        """
        function = self.module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, _CheckpointLocalParams):
            self.module._gradient_checkpointing_func = _CheckpointLocalParams(function, self)  # type: ignore[assignment]

    def _enter(self, on_sequence_shards: bool) -> list[tuple[Entry, nn.Parameter]]:
        replaced: list[tuple[Entry, nn.Parameter]] = []
        local: dict[int, torch.Tensor] = {}
        for entry in self.entries:
            held = entry.owner._parameters.get(entry.name)
            parameter: Any = held.parameter if isinstance(held, FullParameterView) else held
            if not _to_exchange(parameter, entry):
                continue
            tensor = local.get(id(parameter))
            if tensor is None:
                # The gradient is declared complete: summands are summed later, once, by PartialGradients.
                tensor = (
                    parameter.to_local(grad_placements=parameter.placements)
                    if isinstance(parameter, DTensor)
                    else parameter.view_as(parameter)
                )
                if (
                    entry.on_gradient is not None
                    and tensor.requires_grad
                    and (on_sequence_shards or not entry.on_sequence_shards)
                ):
                    tensor.register_hook(entry.on_gradient)
                if entry.zero:
                    tensor = tensor * 0
                if entry.part is not None:
                    dim, blocks, index, number = entry.part
                    width = tensor.shape[dim] // (blocks * number)
                    tensor = (
                        tensor.unflatten(dim, (blocks, -1)).narrow(dim + 1, index * width, width).flatten(dim, dim + 1)
                    )
                local[id(parameter)] = tensor
            if entry.bias_of is not None:
                entry.bias_of.bias = tensor
            entry.owner._parameters[entry.name] = None if entry.bias_of is not None else tensor  # type: ignore[assignment]
            replaced.append((entry, held))  # type: ignore[arg-type]
        return replaced


def _never(_: dict[str, Any]) -> bool:
    return False


def _to_exchange(parameter: Any, entry: Entry) -> TypeGuard[nn.Parameter]:
    """True if ``parameter`` is one to exchange, and not exchanged yet by a region around this one."""
    if isinstance(parameter, DTensor):
        # More than one mesh axis: still sharded by FSDP, so it belongs to a unit below that gathers it itself.
        return parameter.device_mesh.ndim == 1
    # Not by the class alone: the compiler takes what a region around this one has put there for a parameter, too.
    special = entry.on_gradient is not None or entry.bias_of is not None or entry.zero or entry.part is not None
    return entry.local and special and isinstance(parameter, nn.Parameter)


class _CheckpointLocalParams:
    """A checkpoint function (called with a function and its inputs) whose recomputation enters the region again."""

    def __init__(self, function: Callable[..., Any], region: LocalParamForward) -> None:
        self.function = function
        self.region = region

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shared = self.region.shared
        inside: Callable[..., Any] = functools.partial(self.region.inside, function)
        if shared is not None and shared.length is not None:
            inside = shared.resumed(inside)
        return self.function(inside, *args, **kwargs)
