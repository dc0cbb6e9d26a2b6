"""A parameter of a prepared model in full, for a loss that reads it outside of its own module."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..errors import PrepareError
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
    """
    if not isinstance(parameter, DTensor):
        return parameter
    for record in all_prepared():
        if any(parameter is known for known in record.context.model.parameters()):
            full = parameter.full_tensor()
            mesh = record.context.dp_mesh
            if full.requires_grad and mesh.size() > 1:
                full.register_hook(functools.partial(_mean_over, mesh))
            return full
    raise PrepareError("full_parameter() was given a sharded parameter that belongs to no prepared model.")


def _mean_over(mesh: DeviceMesh, gradient: torch.Tensor) -> torch.Tensor:
    mean = gradient.contiguous() / mesh.size()
    for dim in range(mesh.ndim):
        dist.all_reduce(mean, group=mesh.get_group(dim))
    return mean
