"""Slicing full parameters into DTensors on the tp axis."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .. import compat
from ..core.shard_layout import local_slice
from ..core.sharding_spec import ParameterSpec


def placement_of(spec: ParameterSpec) -> Placement:
    """The DTensor placement on the tp axis that ``spec`` describes."""
    if spec.dim is None:
        return Replicate()
    return Shard(spec.dim) if spec.blocks == 1 else compat.strided_shard(spec.dim, spec.blocks)


def shard_parameter(
    parameter: nn.Parameter, spec: ParameterSpec, mesh: DeviceMesh, device: torch.device
) -> nn.Parameter:
    """A new parameter that holds this rank's part of ``parameter`` as a DTensor of the full shape.

    Every rank must hold equal values; nothing is communicated. ``requires_grad`` is kept. Attributes that a library set
    on the parameter object are carried over. One without values (on the meta device) stays without.
    """
    device = parameter.device if parameter.device.type == "meta" else device
    with torch.no_grad():
        local = local_slice(parameter.detach(), spec, mesh.get_local_rank(), mesh.size()).to(device).contiguous()
        tensor = DTensor.from_local(
            local,
            mesh,
            [placement_of(spec)],
            run_check=False,
            shape=parameter.shape,
            stride=torch.empty(parameter.shape, device="meta").stride(),
        )
    result = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    result.__dict__.update(parameter.__dict__)
    return result
