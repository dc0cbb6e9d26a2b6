"""Tensor-parallel parameters in the form that megatron-fsdp can shard, and plans in the form that leads there.

megatron-fsdp reads a DTensor's *global* shape where it means the local one: a weight that is sharded on dimension 1 gets rows of
the wrong length, and its own check fails. Local tensors with Megatron-Core's three attributes are its other, well used, way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ..errors import UnsupportedError
from ..plan.spec import REPLICATED, ShardingSpec
from .shards import local_part

#: Layouts of input and output of torch's styles -> the style of the same meaning.
_COLWISE: dict[tuple[Placement, Placement], str] = {
    (Replicate(), Shard(-1)): "colwise",
    (Replicate(), Replicate()): "colwise_gather_output",
}
_ROWWISE: dict[tuple[Placement, Placement], str] = {
    (Shard(-1), Replicate()): "rowwise",
    (Replicate(), Replicate()): "rowwise_split_input",
}


def make_local(model: nn.Module, spec: ShardingSpec) -> None:
    """Replace each tensor-parallel DTensor of ``model`` by a parameter of its local part, in place; ties stay."""
    made: dict[int, tuple[DTensor, nn.Parameter]] = {}  # the old one keeps its id taken
    for module_name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                local = nn.Parameter(local_part(parameter), requires_grad=parameter.requires_grad)
                place = spec.parameters.get(f"{module_name}.{key}" if module_name else key, REPLICATED)
                local.tensor_model_parallel = place.dim is not None  # type: ignore[attr-defined]
                local.partition_dim = -1 if place.dim is None else place.dim  # type: ignore[attr-defined]
                local.partition_stride = 1  # type: ignore[attr-defined]
                made[id(parameter)] = (parameter, local)
            module._parameters[key] = made[id(parameter)][1]


def local_plan(plan: Any) -> Any:
    """``plan`` with torch's ``ColwiseParallel`` and ``RowwiseParallel`` as the styles of the same meaning that compute on local
    tensors; anything that is no dict unchanged.

    Raises:
        UnsupportedError: a style object that has no such counterpart.
    """
    if not isinstance(plan, Mapping):
        return plan
    return {pattern: _local_style(pattern, style) for pattern, style in plan.items()}


def _local_style(pattern: str, style: Any) -> Any:
    if isinstance(style, str):
        return style
    if type(style) is ColwiseParallel and style.use_local_output:
        name = _COLWISE.get(_layouts(style))
    elif type(style) is RowwiseParallel and style.use_local_output:
        name = _ROWWISE.get(_layouts(style))
    else:
        name = None
    if name is None:
        raise _refused(pattern, type(style).__name__)
    return name


def _layouts(style: Any) -> tuple[Placement, Placement]:
    return style.input_layouts[0], style.output_layouts[0]


def check_local(spec: ShardingSpec) -> None:
    """Raise :class:`UnsupportedError` if a module of ``spec`` runs on an engine that needs DTensors in flight."""
    for name, module in spec.modules.items():
        if module.foreign is not None:
            raise _refused(name, type(module.foreign).__name__)


def _refused(place: str, style: str) -> UnsupportedError:
    return UnsupportedError(
        f"the tensor-parallel style {style} of {place!r} cannot be combined with megatron-fsdp: it computes with DTensors, and "
        f"megatron-fsdp gathers local tensors. Use a style name such as 'colwise' or 'rowwise' (or torch's ColwiseParallel and "
        f"RowwiseParallel with local outputs, replicated or sharded on the last dimension), or leave tp_shard_plan out."
    )
