"""DoRA under tensor parallelism: the norm of weight rows that are spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .collectives import all_reduce

#: PEFT's method that computes the norm; an instance attribute of this name replaces it.
_METHOD = "get_weight_norm"


def sum_weight_norm(magnitude: nn.Module, mesh: DeviceMesh) -> None:
    """Let DoRA compute the full norm of the rows of W + scaling B A in a row-wise layer.

    Each rank holds a slice of the columns, so the squares are summed over ``mesh`` by one all-reduce of
    ``out_features`` numbers. DoRA treats the norm as a constant (Liu et al., 2024, arXiv:2402.09353, section 4.3), so
    the all-reduce needs no backward.

    Args:
        magnitude: PEFT's layer that holds the magnitude vector.
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
    """Undo :func:`sum_weight_norm` below ``module`` meanwhile, for code that is shown full weights (merging)."""
    replaced = [(m, m.__dict__.pop(_METHOD)) for m in module.modules() if _METHOD in m.__dict__]
    try:
        yield
    finally:
        for owner, method in replaced:
            owner.__dict__[_METHOD] = method
