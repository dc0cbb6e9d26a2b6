"""The local tensor that a module computes with in the place of a DTensor parameter, and the way of its gradient back.

``DTensor.to_local`` is an operator of autograd: each use costs a Python function in forward and the checks of
``from_local`` in backward, more than the arithmetic of a small layer. A *local leaf* is a parameter of its own on the
same memory. Autograd accumulates into it as into any parameter; a hook then hands the gradient to the DTensor, with its
mesh and placements. FSDP2 does the same for its unsharded parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..errors import UnsupportedError

#: Attribute of the parameter object. A table with weak references would do, but ``Module.to`` refuses to move a
#: parameter that has any.
_LEAF = "_hf_automodel_parallel_local_leaf"


def local_leaf(parameter: nn.Parameter) -> torch.Tensor:
    """The local tensor of the DTensor ``parameter``, a leaf whose gradient becomes the one of ``parameter``.

    The gradient is declared complete, with the placements of the parameter. With hooks on its gradient autograd itself
    has to reach the parameter, through ``to_local``; and the compiler, where a script compiles all of the model, knows
    ``to_local``.
    """
    if torch.compiler.is_compiling() or is_hooked(parameter):
        return parameter.to_local(grad_placements=parameter.placements)  # type: ignore[attr-defined,no-any-return]
    leaf = parameter.__dict__.get(_LEAF)
    if leaf is None or not leaf.is_of(parameter):
        leaf = parameter.__dict__[_LEAF] = _Leaf(parameter)
    if leaf.tensor.requires_grad != parameter.requires_grad:
        leaf.tensor.requires_grad_(parameter.requires_grad)
    return leaf.tensor


def is_hooked(parameter: torch.Tensor) -> bool:
    """True if something is called when ``parameter`` gets its gradient."""
    return bool(compat.gradient_hooks(parameter)) or compat.has_accumulation_hooks(parameter)


class _Leaf:
    """One leaf.

    Attributes:
        tensor: the leaf.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        with torch.inference_mode(False):  # the first forward may be one for inference, and a later one for training
            # By torch's protocol for tensor subclasses, which costs a tenth of DTensor.from_local.
            gradient: Any = parameter.detach()
            names, self._context = gradient.__tensor_flatten__()
            self._name = names[0]
            self._others = {name: getattr(gradient, name) for name in names[1:]}
            self._local: torch.Tensor = getattr(parameter, self._name)
            self._owner = parameter
            self.tensor = nn.Parameter(self._local, parameter.requires_grad)
            if parameter.is_floating_point():
                self._watch(self.tensor)

    def _watch(self, tensor: nn.Parameter) -> None:
        was_trained = tensor.requires_grad
        tensor.requires_grad_(True).register_post_accumulate_grad_hook(self._hand_over)
        tensor.requires_grad_(was_trained)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the parameter, in memory or in a file, gets a leaf of its own."""
        return type(None), ()

    def is_of(self, parameter: nn.Parameter) -> bool:
        """False if the shard of ``parameter`` has been replaced (``model.to`` of another dtype or device)."""
        return getattr(parameter, self._name) is self._local

    @torch.no_grad()
    def _hand_over(self, tensor: torch.Tensor) -> None:
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
        # FSDP2 of torch 2.15 accumulates in the dtype in which it reduces, which may be wider than the parameter's.
        gradient = gradient.to(getattr(parameter, "grad_dtype", None) or gradient.dtype)
        before = parameter.grad
        if isinstance(before, DTensor) and before.placements == parameter.placements:  # type: ignore[attr-defined]
            getattr(before, self._name).add_(gradient)
            return
        shown = DTensor.__tensor_unflatten__(  # type: ignore[no-untyped-call]
            {self._name: gradient, **self._others}, self._context, parameter.shape, parameter.stride()
        )
        compat.mark_packed_placements([shown])
        parameter.grad = shown if before is None else before + shown
