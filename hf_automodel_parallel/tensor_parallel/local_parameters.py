"""DTensors between forwards, local tensors during them: the local-parameter scope of a module.

Optimizer, FSDP2, clipping and checkpoints see every parameter as a DTensor, with its placement. A *scope* is a module
(usually a decoder layer) whose forward is wrapped: on entry each DTensor on the tp axis below it is replaced by its
local shard, connected by autograd; on exit the DTensors return, also when the forward raises. So no operator inside
pays for DTensor dispatch, a parent may read a child's weight, and torch.compile sees no DTensor.

The wrapper is inside of ``__call__``, so hooks of FSDP2 (unshard before, reshard after) run outside of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from .boundary_hooks import ReduceOutput, SharedInputs, SharedInputsForward
from .full_parameter_view import FullParameterView


@dataclass(frozen=True)
class ParamBinding:
    """How one parameter is replaced in a scope.

    Attributes:
        owner: the module that owns it.
        name: its name there.
        on_gradient: hook for the gradient of the local tensor, which is Partial; None if it is complete.
        on_sequence_shards: the gradient is Partial only in calls that work on sequence shards
            (:attr:`LocalParamForward.on_sequence_shards`).
        bias_of: the output hook that adds it after an all-reduce; the bias is None in the forward of the module.
        zero: the module sees zeros, because the parameter is added on TP rank 0 only.
        forward_shard: (dimension, blocks, index, shards): of each equal block along the dimension, the module sees one
            of so many shards, while the parameter is replicated between forwards (KV-head replication).
        local: the parameter is a local tensor between forwards, too (megatron-fsdp). It is replaced only for one of the
            fields above.
    """

    owner: nn.Module
    name: str
    on_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None
    on_sequence_shards: bool = False
    bias_of: ReduceOutput | None = None
    zero: bool = False
    forward_shard: tuple[int, int, int, int] | None = None
    local: bool = False

    def accepts(self, parameter: Any) -> TypeGuard[nn.Parameter]:
        """True if ``parameter`` is one to replace, and no scope around this one has replaced it."""
        if isinstance(parameter, DTensor):
            # More than one mesh axis: still sharded by FSDP2, because a unit further inside unshards it by itself.
            return parameter.device_mesh.ndim == 1
        # Not by the class alone: the compiler takes the tensor of a scope around this one for a parameter, too.
        special = (
            self.on_gradient is not None or self.bias_of is not None or self.zero or self.forward_shard is not None
        )
        return self.local and special and isinstance(parameter, nn.Parameter)

    def local_tensor(self, parameter: nn.Parameter, sequence_shards: bool) -> torch.Tensor:
        """The tensor that the module computes with instead of ``parameter``, in a call on sequence shards or not."""
        # The gradient is declared complete: Partial gradients are reduced later, once, by PartialGradients.
        tensor = (
            parameter.to_local(grad_placements=parameter.placements)
            if isinstance(parameter, DTensor)
            else parameter.view_as(parameter)
        )
        partial = self.on_gradient is not None and (sequence_shards or not self.on_sequence_shards)
        if partial and tensor.requires_grad:
            tensor.register_hook(self.on_gradient)
        if self.zero:
            tensor = tensor * 0
        if self.forward_shard is not None:
            dim, blocks, index, shards = self.forward_shard
            width = tensor.shape[dim] // (blocks * shards)
            tensor = tensor.unflatten(dim, (blocks, -1)).narrow(dim + 1, index * width, width).flatten(dim, dim + 1)
        return tensor


class LocalParamForward(ForwardWrapper):
    """The forward of a module with its parameters replaced by local tensors.

    Args:
        module: the root of the scope.
        bindings: the parameters to replace.
        shared: the activations that are known to the hooks inside, or None.

    Attributes:
        on_sequence_shards: keyword arguments of a call -> does it work on sequence shards? Set by sequence parallelism.
    """

    as_method = False

    def __init__(self, module: nn.Module, bindings: list[ParamBinding], shared: SharedInputs | None) -> None:
        self.module, self.bindings, self.shared = module, bindings, shared
        self.on_sequence_shards: Callable[[dict[str, Any]], bool] = _never

    @classmethod
    def install(
        cls, module: nn.Module, bindings: list[ParamBinding], shared: SharedInputs | None = None
    ) -> LocalParamForward:
        """Make ``module`` a scope; the end of its forward also clears ``shared``."""
        stack, forward = ForwardStack.of(module), cls(module, bindings, shared)
        if shared is not None:
            stack.push(ForwardSlot.SHARED_INPUTS, SharedInputsForward(shared))
        stack.push(ForwardSlot.LOCAL_PARAMETERS, forward)
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.adopt_checkpoint_function()
        return self.inside(self.inner, *args, **kwargs)

    def inside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` with local parameters; where a scope around has replaced them, nothing is done."""
        replaced = self._enter(self.on_sequence_shards(kwargs))
        try:
            return function(*args, **kwargs)
        finally:
            for binding, parameter in replaced:
                binding.owner._buffers.pop(binding.name, None)  # where removing a parametrization leaves a plain tensor
                binding.owner._parameters[binding.name] = parameter  # type: ignore[assignment]
                if binding.bias_of is not None:
                    binding.bias_of.bias = None

    def adopt_checkpoint_function(self) -> None:
        """Let the model's own gradient checkpointing recompute inside of the scope.

        transformers (5.23; outside of ``__call__`` before) checkpoints in the class's ``forward``, so below this
        wrapper: its recomputation begins with DTensors. Looked up at each call, because the method that switches
        checkpointing on may be called at any time.
        """
        function = self.module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, _CheckpointLocalParams):
            checkpoint: Any = _CheckpointLocalParams(function, self)
            self.module._gradient_checkpointing_func = checkpoint

    def _enter(self, sequence_shards: bool) -> list[tuple[ParamBinding, nn.Parameter]]:
        replaced: list[tuple[ParamBinding, nn.Parameter]] = []
        local: dict[int, torch.Tensor] = {}  # tied parameters get one local tensor
        for binding in self.bindings:
            held = binding.owner._parameters.get(binding.name)
            parameter: Any = held.parameter if isinstance(held, FullParameterView) else held
            if not binding.accepts(parameter):
                continue
            tensor = local.get(id(parameter))
            if tensor is None:
                tensor = local[id(parameter)] = binding.local_tensor(parameter, sequence_shards)
            if binding.bias_of is not None:
                binding.bias_of.bias = tensor
            shown: Any = None if binding.bias_of is not None else tensor
            binding.owner._parameters[binding.name] = shown
            replaced.append((binding, held))  # type: ignore[arg-type]
        return replaced


def _never(_: dict[str, Any]) -> bool:
    return False


class _CheckpointLocalParams:
    """A checkpoint function (called with a function and its inputs) whose recomputation enters the scope again."""

    def __init__(self, function: Callable[..., Any], scope: LocalParamForward) -> None:
        self.function, self.scope = function, scope

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shared = self.scope.shared
        inside: Callable[..., Any] = functools.partial(self.scope.inside, function)
        if shared is not None and shared.length is not None:
            inside = shared.resumed(inside)
        return self.function(inside, *args, **kwargs)
