"""The local tensor that a module computes with in the place of a DTensor parameter, and the way of its gradient back.

``DTensor.to_local`` is an operator of autograd: each use costs a Python function in forward and the checks of
``from_local`` in backward, more than the arithmetic of a small layer. A *local leaf* is a parameter of its own on the
same memory. Autograd accumulates into it as into any parameter; a hook then hands the gradient to the DTensor, with its
mesh and placements. FSDP2 does the same for its unsharded parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..errors import UnsupportedError

#: Attribute of the parameter object. A table with weak references would do, but ``Module.to`` refuses to move a
#: parameter that has any.
_LEAVES = "_hf_automodel_parallel_local_leaves"


def local_leaf(
    parameter: nn.Parameter, on_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """The local tensor of the DTensor ``parameter``, a leaf whose gradient becomes the one of ``parameter``.

    The gradient is declared complete, with the placements of the parameter. With hooks on its gradient autograd itself
    has to reach the parameter, through ``to_local``; and the compiler, where a script compiles all of the model, knows
    ``to_local``.

    Args:
        parameter: a DTensor.
        on_gradient: called with the gradient of this use, before it is added to others; its result takes its place.
    """
    if torch.compiler.is_compiling() or is_hooked(parameter):
        local: torch.Tensor = parameter.to_local(grad_placements=parameter.placements)  # type: ignore[attr-defined]
        if on_gradient is not None and local.requires_grad:
            local.register_hook(on_gradient)
        return local
    if (known := known_leaf(parameter, on_gradient)) is not None:
        return known
    leaves = parameter.__dict__.setdefault(_LEAVES, _Leaves())
    leaves.drop_stale(parameter)
    leaf = leaves.by_use[on_gradient] = _Leaf(parameter, on_gradient)
    return leaf.tensor


def known_leaf(
    parameter: torch.Tensor, on_gradient: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor | None:
    """What the last :func:`local_leaf` returned, if it would return it again; None if it has to be called.

    Called for each parameter in each forward, so with few operations.
    """
    if torch.compiler.is_compiling():  # of this function alone, behind a graph break of a script's compiled model
        return None
    leaves = parameter.__dict__.get(_LEAVES)
    leaf = None if leaves is None else leaves.by_use.get(on_gradient)
    if leaf is None or not leaf.is_of(parameter) or is_hooked(parameter):
        return None
    tensor: torch.Tensor = leaf.tensor
    return tensor if tensor.requires_grad == parameter.requires_grad else None


def is_hooked(parameter: torch.Tensor) -> bool:
    """True if something is called when ``parameter`` gets its gradient."""
    return bool(compat.gradient_hooks(parameter)) or compat.has_accumulation_hooks(parameter)


class _Leaves:
    """The leaves of one parameter: one for each function that is called with the gradient of a use, and for None."""

    def __init__(self) -> None:
        self.by_use: dict[Callable[[torch.Tensor], torch.Tensor] | None, _Leaf] = {}

    def drop_stale(self, parameter: nn.Parameter) -> None:
        """Forget the leaves on a shard that ``parameter`` had before, which keep its memory alive."""
        self.by_use = {use: leaf for use, leaf in self.by_use.items() if leaf.is_of(parameter)}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the parameter, in memory or in a file, gets leaves of its own."""
        return type(None), ()


class _Leaf:
    """One leaf.

    Attributes:
        tensor: the leaf.
    """

    def __init__(self, parameter: nn.Parameter, on_gradient: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        with torch.inference_mode(False):  # the first forward may be one for inference, and a later one for training
            # By torch's protocol for tensor subclasses, which costs less than to_local.
            self._name: str = parameter.__tensor_flatten__()[0][0]  # type: ignore[attr-defined]
            self._local: torch.Tensor = getattr(parameter, self._name)
            self._owner, self._on_gradient = parameter, on_gradient
            self.tensor = nn.Parameter(self._local, parameter.requires_grad)
            if parameter.is_floating_point():
                self._watch(self.tensor)

    def _watch(self, tensor: nn.Parameter) -> None:
        was_trained = tensor.requires_grad
        tensor.requires_grad_(True).register_post_accumulate_grad_hook(self._hand_over)
        tensor.requires_grad_(was_trained)

    def is_of(self, parameter: nn.Parameter) -> bool:
        """False if the shard of ``parameter`` has been replaced (``model.to`` of another dtype or device)."""
        return getattr(parameter, self._name) is self._local

    def _hand_over(self, tensor: torch.Tensor) -> None:
        # Without torch.no_grad(): a backward has switched gradients off, but for create_graph, which is refused here.
        gradient, tensor.grad = tensor.grad, None
        parameter = self._owner
        if gradient is None:
            return
        if gradient.requires_grad:
            raise UnsupportedError(
                "backward(create_graph=True) through a sharded parameter: its gradient would be cut off from the graph "
                "when it is handed from the shard to the parameter. Second derivatives need a model that is not "
                "sharded: leave AutoParallelismConfig out."
            )
        if self._on_gradient is not None:
            gradient = self._on_gradient(gradient)
        # FSDP2 of torch 2.15 accumulates in the dtype in which it reduces, which may be wider than the parameter's.
        gradient = gradient.to(getattr(parameter, "grad_dtype", None) or gradient.dtype)
        before = parameter.grad
        if isinstance(before, DTensor) and before.placements == parameter.placements:  # type: ignore[attr-defined]
            getattr(before, self._name).add_(gradient)
            return
        shown = compat.dtensor_like(gradient, parameter)
        parameter.grad = shown if before is None else before + shown
