"""A forward that reads a parameter of another module sees it whole.

Between forwards of its own module a parameter is a DTensor, which does not mix with the plain activations around it.
While the forward of a module runs that :mod:`..plan.cross_module_reads` has found to read it, a stand-in takes its
place: single rows are fetched from the rank that has them, everything else is computed with the gathered whole. Outside
of the layers all ranks compute the same, so of the whole's gradient each rank keeps its own part, and no sum is due.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from .. import compat
from .collectives import reduce_from_tp


class FullParameterView(torch.Tensor):
    """Stands for a parameter that is a DTensor on the tp axis; made by :meth:`of`.

    Attributes:
        parameter: the DTensor, of any shape and dtype.
    """

    parameter: DTensor
    _whole: torch.Tensor | None

    @staticmethod
    def of(parameter: DTensor) -> FullParameterView:
        """The stand-in for ``parameter``."""
        result = torch.empty(0, dtype=parameter.dtype).as_subclass(FullParameterView)
        result.parameter, result._whole = parameter, None
        return result

    def whole(self) -> torch.Tensor:
        """The plain tensor of the whole shape, gathered once."""
        if self._whole is None or (
            torch.is_grad_enabled() and self.parameter.requires_grad and not self._whole.requires_grad
        ):
            self._whole = self.parameter.full_tensor()
        return self._whole

    def row(self, index: int) -> torch.Tensor:
        """Row ``index`` of a matrix that is sharded by rows: ``(columns,)``, at the price of one all-reduce of that
        size.
        """
        parameter = self.parameter
        mesh = parameter.device_mesh
        local = parameter.to_local(grad_placements=parameter.placements)
        owner, place = divmod(index % parameter.shape[0], local.shape[0])
        row = local[place]
        return reduce_from_tp(row if owner == mesh.get_local_rank() else row * 0, mesh.get_group())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FullParameterView):
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if type(first) is int and _by_rows(args[0].parameter):
                row = args[0].row(first)
                return row[tuple(rest)] if rest else row
        metadata = getattr(func, "__name__", "") == "__get__" or func in _METADATA
        stand = (lambda x: x.parameter.detach()) if metadata else (lambda x: x.whole())
        args, kwargs = compat.tree_map_only(FullParameterView, stand, (args, kwargs or {}))
        return func(*args, **kwargs)


_METADATA = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__}


def _by_rows(parameter: DTensor) -> bool:
    rows, ranks = parameter.shape[0], parameter.device_mesh.size()
    return parameter.ndim > 1 and parameter.placements == (Shard(0),) and rows % ranks == 0


class CrossModuleReadForward:
    """The wrapped forward of a module that reads parameters of other modules.

    Args:
        module: the reading module.
        places: (owner, name) of what it reads.
    """

    def __init__(self, module: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
        functools.update_wrapper(self, module.forward)
        self.places = places
        self.inner: Callable[..., Any] = module.forward
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replaced: list[tuple[nn.Module, str, Any]] = []
        try:
            for owner, name in self.places:
                parameter = owner._parameters.get(name)
                if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:
                    owner._parameters[name] = FullParameterView.of(parameter)  # type: ignore[assignment]
                    replaced.append((owner, name, parameter))
            return self.inner(*args, **kwargs)
        finally:
            for owner, name, parameter in replaced:
                owner._parameters[name] = parameter


def install_full_parameter_views(model: nn.Module, reads: dict[str, list[str]]) -> None:
    """Let the modules of ``reads`` (name -> names of parameters) see whole what they read. After regions and FSDP2."""
    for reader, names in reads.items():
        places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        shared = {id(owner._parameters[key]) for owner, key in places}
        everywhere = [
            (owner, key)
            for owner in model.modules()
            for key, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) in shared
        ]
        CrossModuleReadForward(model.get_submodule(reader), everywhere)
