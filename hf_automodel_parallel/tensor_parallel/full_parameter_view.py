"""A forward that reads a parameter of another module sees it in full.

Outside of its own module's forward a parameter is a DTensor, which cannot be combined with plain activations.
:mod:`..plan.analysis.cross_module_reads` finds the forwards that read one. During such a forward, a view replaces the
parameter: single rows come from the rank that holds them, everything else is computed with the full tensor. Outside of
the layers all ranks compute the same, so each rank keeps its slice of the full gradient, without an all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from .. import compat
from ..core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from ..core.swap import Slot, exchange
from .collectives import reduce_from_tp


class FullParameterView(torch.Tensor):
    """Replaces a parameter that is a DTensor on the tp axis, during one forward; made by :meth:`of`.

    Attributes:
        parameter: the DTensor, of any shape and dtype.
    """

    parameter: DTensor
    _full: torch.Tensor | None

    @staticmethod
    def of(parameter: DTensor) -> FullParameterView:
        """The view of ``parameter``."""
        result = torch.empty(0, dtype=parameter.dtype).as_subclass(FullParameterView)
        result.parameter, result._full = parameter, None
        return result

    def full(self) -> torch.Tensor:
        """The full tensor, all-gathered once."""
        if self._full is None or (
            torch.is_grad_enabled() and self.parameter.requires_grad and not self._full.requires_grad
        ):
            self._full = self.parameter.full_tensor()
        return self._full

    def row(self, index: int) -> torch.Tensor:
        """Row ``index`` of a matrix that is sharded by rows, ``(columns,)``; one all-reduce of that size."""
        parameter = self.parameter
        mesh = parameter.device_mesh
        local = parameter.to_local(grad_placements=parameter.placements)
        owner, local_index = divmod(index % parameter.shape[0], local.shape[0])
        row = local[local_index]
        return reduce_from_tp(row if owner == mesh.get_local_rank() else row * 0, mesh.get_group())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FullParameterView):
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if type(first) is int and _by_rows(args[0].parameter):
                row = args[0].row(first)
                return row[tuple(rest)] if rest else row
        attribute = getattr(func, "__self__", None) if getattr(func, "__name__", "") == "__get__" else None
        metadata = (attribute is not None and attribute not in _VALUES) or func in _METADATA
        stand_in = (lambda x: x.parameter.detach()) if metadata else (lambda x: x.full())
        args, kwargs = compat.tree_map_only(FullParameterView, stand_in, (args, kwargs or {}))
        return func(*args, **kwargs)


#: Attributes with values, unlike all others.
_VALUES = {getattr(torch.Tensor, name) for name in ("T", "mT", "H", "mH", "data", "real", "imag")}

_METADATA = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__}


def _by_rows(parameter: DTensor) -> bool:
    rows, ranks = parameter.shape[0], parameter.device_mesh.size()
    return parameter.ndim > 1 and parameter.placements == (Shard(0),) and rows % ranks == 0


class CrossModuleReadForward(ForwardWrapper):
    """The forward of a module that reads parameters of other modules.

    Args:
        places: (owner, name) of each parameter that it reads.
    """

    as_method = False

    def __init__(self, places: list[tuple[nn.Module, str]]) -> None:
        self.places = places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        views: list[Slot] = []
        for owner, name in self.places:
            parameter = owner._parameters.get(name)
            if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:
                views.append(Slot(owner._parameters, name, FullParameterView.of(parameter)))
        before = exchange(views)
        try:
            return self.inner(*args, **kwargs)
        finally:
            exchange(before)


def install_full_parameter_views(model: nn.Module, reads: dict[str, list[str]]) -> None:
    """Show the modules in ``reads`` (name -> names of parameters) these parameters in full; after TP and FSDP2."""
    for reader, names in reads.items():
        places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        shared = {id(owner._parameters[key]) for owner, key in places}
        everywhere = [
            (owner, key)
            for owner in model.modules()
            for key, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) in shared
        ]
        ForwardStack.of(model.get_submodule(reader)).push(
            ForwardSlot.CROSS_MODULE_READS, CrossModuleReadForward(everywhere)
        )
