"""Common helpers of the numerical checks of one layer.

A check builds a small copy of a layer, runs it unsharded and with each rank's shards of its parameters, in float32 on
the CPU, and compares the sum or the concatenation of the ranks' results with the unsharded one. It needs neither
processes nor the weights of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...core.shard_layout import local_slice
from ...core.sharding_spec import ParameterSpec


class CannotRun(Exception):
    """The small copy does not run even unsharded; the message has the reason."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` itself, without those of its children."""
    return {key: parameter for key, parameter in module._parameters.items() if parameter is not None}


def holds_layers(module: nn.Module) -> bool:
    """True if a child of ``module`` has parameters."""
    return any(True for child in module.children() for _ in child.parameters())


def small_copy(module: nn.Module, values: Mapping[str, torch.Tensor], requires_grad: bool = False) -> nn.Module:
    """A copy of ``module`` with copies of ``values`` instead of its own parameters, of any shape.

    Raises:
        CannotRun: the module cannot be copied.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(values[key].clone(), requires_grad)
        for key, parameter in own_parameters(module).items()
    }
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise CannotRun(f"it cannot be copied: {error}") from error


def local_shards(
    values: Mapping[str, torch.Tensor], specs: Mapping[str, ParameterSpec], rank: int, size: int
) -> dict[str, torch.Tensor]:
    """The local shards of ``values`` on ``rank`` of ``size``."""
    return {key: local_slice(value, specs[key], rank, size) for key, value in values.items()}


def is_close(got: Any, want: torch.Tensor) -> bool:
    """True if ``got`` has the shape of ``want`` and its values up to the rounding of float32."""
    return got.shape == want.shape and bool(torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max())))
