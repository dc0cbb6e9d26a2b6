"""Tensor-parallel parameters in the form that megatron-fsdp can shard.

megatron-fsdp reads a DTensor's *global* shape where it means the local one: a weight that is sharded on dimension 1
gets rows of the wrong length, and its own check fails. Local tensors with Megatron-Core's three attributes are its
other, well used, way.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from ...core.sharding_spec import REPLICATED, ShardingSpec
from ...errors import UnsupportedError
from .shards import local_part


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


def check_local(spec: ShardingSpec) -> None:
    """Raise :class:`UnsupportedError` if a module of ``spec`` runs on an engine that needs DTensors in flight."""
    for name, module in spec.modules.items():
        if module.native_style is not None:
            raise UnsupportedError(
                f"the tensor-parallel style {type(module.native_style).__name__} of {name!r} cannot be combined with "
                f"megatron-fsdp, which gathers local tensors: it computes with DTensors. Use a style name such as "
                f"'colwise' or 'rowwise' (or a style of torch's that means the same), or leave tp_shard_plan out."
            )
