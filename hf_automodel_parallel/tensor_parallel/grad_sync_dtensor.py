"""Partial gradients on torch's own engine, where this package's registry of partial gradients is not in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .collectives import copy_to_tp


def sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of all parameters below ``module`` over the 1-D ``mesh``, in each backward.

    For parameters that are whole on every rank and meet activations that are not (a norm over the heads of each rank).
    While the module's forward runs it sees its parameters through :func:`copy_to_tp` (identity / all-reduce), so it
    does not matter whether FSDP2, before or after this call, puts other parameter objects in their places, and a
    gradient that accumulates over several backwards is right, too.

    Args:
        module: called as a module; its ``forward`` stays as it is.
        mesh: the tp axis.
    """
    group = mesh.get_group()
    shown: list[tuple[nn.Module, str, nn.Parameter]] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        copies: dict[int, torch.Tensor] = {}
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is None or not parameter.requires_grad:
                    continue
                if id(parameter) not in copies:
                    local: torch.Tensor = parameter
                    if isinstance(parameter, DTensor):
                        local = parameter.to_local(grad_placements=parameter.placements)
                    copies[id(parameter)] = copy_to_tp(local, group)
                shown.append((owner, name, parameter))
        for owner, name, parameter in shown:
            owner._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while shown:
            owner, name, parameter = shown.pop()
            owner._parameters[name] = parameter

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
