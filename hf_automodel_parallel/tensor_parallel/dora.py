"""DoRA under tensor parallelism: the norm of weight rows that are spread over the ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.forward_stack import ForwardSlot, ForwardStack, Replacement
from .collectives import all_reduce

#: PEFT's method that computes the norm; an instance attribute of this name replaces it.
_METHOD = "get_weight_norm"


def sum_weight_norm(magnitude: nn.Module, mesh: DeviceMesh) -> None:
    """Let DoRA compute the full norm of the rows of W + scaling B A in a row-wise layer.

    Each rank has a slice of the columns, so the squares are summed over ``mesh`` by one all-reduce of
    ``out_features`` numbers. DoRA treats the norm as a constant (Liu et al., 2024, arXiv:2402.09353, section 4.3), so
    the all-reduce needs no backward.

    Args:
        magnitude: PEFT's layer with the magnitude vector.
        mesh: the tp axis.
    """
    group = mesh.get_group()

    def get_weight_norm(
        weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: Any = None
    ) -> torch.Tensor:
        with torch.no_grad():
            merged = weight.T if magnitude.fan_in_fan_out else weight
            merged = merged + scaling * lora_weight
            return all_reduce(merged.pow(2).sum(dim=1), group).sqrt().to(weight.dtype)

    magnitude.__dict__[_METHOD] = get_weight_norm


@contextmanager
def unsharded_weight_norm(module: nn.Module) -> Iterator[None]:
    """A context without :func:`sum_weight_norm` below ``module``, for code that gets full weights (merging)."""
    replaced = [(m, m.__dict__.pop(_METHOD)) for m in module.modules() if _METHOD in m.__dict__]
    try:
        yield
    finally:
        for owner, method in replaced:
            owner.__dict__[_METHOD] = method


def make_traceable(layer: nn.Module) -> None:
    """Replace the forwards of PEFT's DoRA in ``layer`` by the same computation without a graph break, in place.

    PEFT (0.21) asks for the *name of the type* of the weight in every forward, to see whether it is quantised, and
    dynamo cannot trace that question. Asked once here instead; a quantised weight keeps PEFT's code.
    """
    for adapter in layer.modules():
        base = getattr(adapter, "base_layer", None)
        plain = type(getattr(base, "weight", None)) in (nn.Parameter, torch.Tensor, DTensor)
        if isinstance(base, nn.Linear) and plain and base.weight.is_floating_point():
            for magnitude in getattr(adapter, "lora_magnitude_vector", {}).values():
                if type(magnitude) is compat.peft_dora_layer_type():
                    traceable = Replacement(functools.partial(_dora, magnitude))
                    ForwardStack.of(magnitude).push(ForwardSlot.COMPUTATION, traceable)  # type: ignore[arg-type]


def _dora(
    magnitude: Any,
    x: torch.Tensor,
    *,
    lora_A: nn.Module,
    lora_B: nn.Module,
    scaling: float,
    base_layer: nn.Linear,
    base_result: torch.Tensor | None = None,
    adapter_name: str = "default",
) -> torch.Tensor:
    """The term that DoRA adds to the base layer's output: ``m / |W + s B A|`` times (base + adapter), minus the base.

    Args:
        magnitude: PEFT's layer with the vector m (out_features) and its two methods for the weights.
        x: (..., in_features), after dropout.
        base_result: the base layer's output without dropout, None with dropout.

    Returns:
        (..., out_features); the bias is not scaled.
    """
    names = {"adapter_name": adapter_name}
    update = magnitude.get_lora_weight(lora_A=lora_A, lora_B=lora_B, **names).detach().to(x.dtype)
    weight = base_layer.weight.to(x.dtype)
    norm = magnitude.get_weight_norm(weight=weight, lora_weight=update, scaling=scaling, **names).detach()
    scale = magnitude.weight / norm
    if base_result is None:
        base_result = F.linear(x, weight)
    elif base_layer.bias is not None:
        base_result = base_result - base_layer.bias
    return (scale - 1) * base_result + scale * scaling * lora_B(lora_A(x))
