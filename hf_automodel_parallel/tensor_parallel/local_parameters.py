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
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from ..core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from ..errors import UnsupportedError
from .boundary_hooks import ReduceOutput, SharedInputs, SharedInputsForward
from .collectives import copy_to_tp
from .full_parameter_view import FullParameterView
from .local_leaf import is_hooked, known_leaf, local_leaf


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
        full_and_cut: full shape of a parameter of which the module sees a shard, and how the shard is cut, like
            ``forward_shard``; for a full tensor in its place (``torch.func.functional_call``).
        group: the tp group, for the gradient of such a tensor.
        dtype: what the parameter is cast to, where FSDP2 does not manage it and so does not cast it; None: nothing.
        packed: the module gets the shard as one column, the form in which bitsandbytes keeps packed numbers.
    """

    owner: nn.Module
    name: str
    on_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None
    on_sequence_shards: bool = False
    bias_of: ReduceOutput | None = None
    zero: bool = False
    forward_shard: tuple[int, int, int, int] | None = None
    local: bool = False
    full_and_cut: tuple[torch.Size, tuple[int, int, int, int]] | None = None
    group: dist.ProcessGroup | None = None
    dtype: torch.dtype | None = None
    packed: bool = False

    def shard_of(self, tensor: Any) -> torch.Tensor | None:
        """This rank's shard of a full ``tensor`` in the place of the parameter, connected by autograd; None if the
        tensor in that place is something else.
        """
        if self.full_and_cut is None or isinstance(tensor, DTensor) or not isinstance(tensor, torch.Tensor):
            return None
        shape, (dim, blocks, index, shards) = self.full_and_cut
        if tensor.shape != shape:
            return None
        # Each rank uses its shard: the gradients, zero elsewhere, are summed.
        return cut(copy_to_tp(tensor, self.group), dim, blocks, index, shards)  # type: ignore[arg-type]

    def accepts(self, parameter: Any) -> TypeGuard[nn.Parameter]:
        """True if ``parameter`` is one to replace, and no scope around this one has replaced it."""
        if isinstance(parameter, DTensor):
            # More than one mesh axis, the last one for tp: still sharded by FSDP2, because a unit further inside
            # unshards it by itself; or a replica that FSDP2 does not manage.
            return all(p.is_replicate() for p in parameter.placements[:-1])
        # Not by the class alone: the compiler takes the tensor of a scope around this one for a parameter, too.
        special = (
            self.on_gradient is not None or self.bias_of is not None or self.zero or self.forward_shard is not None
        )
        return self.local and special and isinstance(parameter, nn.Parameter)

    def refuse_parametrization(self) -> None:
        """Raise if the parameter was parametrised after it had been sharded; FSDP2 does not manage the new one."""
        if is_parametrized(self.owner, self.name):
            raise UnsupportedError(
                f"{self.name} of a {type(self.owner).__bases__[0].__name__} was parametrised (weight_norm, "
                f"register_parametrization) after accelerator.prepare, and the parameter behind it is not sharded. "
                f"Register parametrizations before prepare."
            )

    def refuse_hooks(self, parameter: nn.Parameter) -> None:
        """Raise if the user's hooks on the gradient of ``parameter`` would see this rank's part of a sum."""
        if isinstance(parameter, DTensor) and is_hooked(parameter):
            raise UnsupportedError(
                f"a hook is registered on the gradient of {self.name} of a {type(self.owner).__name__}, which is "
                f"Partial over tp when it arrives: the hook would see this rank's part of a sum. Read parameter.grad "
                f"after accelerator.backward instead of the hook."
            )

    def known(self, held: nn.Parameter, sequence_shards: bool) -> torch.Tensor | None:
        """The leaf that the last call computed with, where nothing else is to be done with it; mostly so."""
        if self.bias_of is not None or self.zero or self.forward_shard is not None or self.dtype is not None:
            return None
        if self.packed:
            return None
        partial = self.on_gradient is not None and (sequence_shards or not self.on_sequence_shards)
        return known_leaf(held, self.on_gradient if partial and held.requires_grad else None)

    def local_tensor(self, parameter: nn.Parameter, sequence_shards: bool) -> torch.Tensor:
        """The tensor that the module computes with instead of ``parameter``, in a call on sequence shards or not."""
        partial = self.on_gradient is not None and (sequence_shards or not self.on_sequence_shards)
        on_gradient = self.on_gradient if partial and parameter.requires_grad else None
        if isinstance(parameter, DTensor):
            if on_gradient is not None and not torch.compiler.is_compiling():
                self.refuse_hooks(parameter)
            # The gradient is declared complete: Partial gradients are reduced later, once, by PartialGradients.
            tensor = local_leaf(parameter, on_gradient)
        else:
            tensor = parameter.view_as(parameter)
            if on_gradient is not None and tensor.requires_grad:
                tensor.register_hook(on_gradient)
        if self.dtype is not None:
            tensor = tensor.to(self.dtype)
        if self.zero:
            tensor = tensor * 0
        if self.forward_shard is not None:
            tensor = cut(tensor, *self.forward_shard)
        return tensor.reshape(-1, 1) if self.packed else tensor


def cut(tensor: torch.Tensor, dim: int, blocks: int, index: int, shards: int) -> torch.Tensor:
    """Of each of ``blocks`` equal blocks along ``dim``, the shard ``index`` of ``shards``."""
    width = tensor.shape[dim] // (blocks * shards)
    return tensor.unflatten(dim, (blocks, -1)).narrow(dim + 1, index * width, width).flatten(dim, dim + 1)


class LocalParamForward(ForwardWrapper):
    """The forward of a module with its parameters replaced by local tensors.

    Args:
        module: the root of the scope.
        bindings: the parameters to replace.
        shared: the activations that are known to the hooks inside, or None.

    Attributes:
        on_sequence_shards: keyword arguments of a call -> does it work on sequence shards? Set by sequence parallelism.
        before: called before each forward, outside of compiled code: the check of the user's hooks.
    """

    as_method = False
    before: Callable[[], None] | None = None

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
        # In this order: Dynamo would guard on all that the check refers to, parameters that FSDP2 replaces included.
        if not torch.compiler.is_compiling() and self.before is not None:
            self.before()
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
        compiling = torch.compiler.is_compiling()
        for binding in self.bindings:
            owner = binding.owner
            if "parametrizations" in owner._modules:
                binding.refuse_parametrization()
            held: Any = owner._parameters.get(binding.name)
            known = None if compiling or held is None else binding.known(held, sequence_shards)
            if known is not None:
                owner._parameters[binding.name] = known  # type: ignore[assignment]
                replaced.append((binding, held))
                continue
            parameter: Any = held.parameter if isinstance(held, FullParameterView) else held
            accepted = binding.accepts(parameter)
            shard = None if accepted else binding.shard_of(parameter)
            if not accepted and shard is None:
                continue
            tensor = local.get(id(parameter)) if shard is None else shard
            if tensor is None:
                tensor = local[id(parameter)] = binding.local_tensor(parameter, sequence_shards)
            if binding.bias_of is not None:
                binding.bias_of.bias = tensor
            shown: Any = None if binding.bias_of is not None else tensor
            owner._parameters[binding.name] = shown
            replaced.append((binding, held))
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
