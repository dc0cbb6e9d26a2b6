"""A parameter of a prepared model in full, for a loss that reads it outside of its own module."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..backends.megatron_fsdp.sharding import managed_by_megatron
from ..errors import PrepareError, UnsupportedError
from .prepared import all_prepared


def full_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """``parameter`` in full, with the gradient that one process computes. Collective: all ranks call it alike.

    DTensor's ``full_tensor()`` takes the gradient of its result for equal on all ranks, and keeps this rank's slice.
    That is right for a penalty. In a loss that depends on the data, each data-parallel rank has a gradient of its own
    batch; here they are averaged, by one all-reduce of full size in backward.

    Args:
        parameter: of a model from ``accelerator.prepare``, or a plain tensor, which is returned as it is.

    Returns:
        A tensor of the parameter's full shape, on its device and in its dtype.

    Raises:
        PrepareError: the parameter is sharded, and of no prepared model.
        UnsupportedError: the model is sharded by megatron-fsdp, whose shards DTensor cannot gather.
    """
    models = [(record.context.model, record.context.dp_mesh) for record in all_prepared()]
    for model, mesh in models:
        if not any(parameter is known for known in model.parameters()):
            continue
        if managed_by_megatron(model) is not None:
            raise UnsupportedError(
                "full_parameter() with backend='megatron_fsdp': its uneven shards cannot be gathered in a loss. Let "
                "the parameter's own module compute with it, or use backend='fsdp2'."
            )
        if not isinstance(parameter, DTensor):  # unsharded by FSDP2 at the moment, which averages its gradient
            return parameter
        full = parameter.full_tensor()
        if full.requires_grad and mesh.size() > 1:
            full.register_hook(functools.partial(_mean_over, mesh))
        return full
    if isinstance(parameter, DTensor):
        raise PrepareError("full_parameter() was given a sharded parameter that belongs to no prepared model.")
    return parameter


def _mean_over(mesh: DeviceMesh, gradient: torch.Tensor) -> torch.Tensor:
    mean = gradient.contiguous() / mesh.size()
    for dim in range(mesh.ndim):
        dist.all_reduce(mean, group=mesh.get_group(dim))
    return mean
