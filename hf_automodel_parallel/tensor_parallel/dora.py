"""What adapters need beyond boundaries: DoRA's norm of rows spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .collectives import all_reduce


def sum_weight_norm(magnitude: nn.Module, mesh: DeviceMesh) -> None:
    """Make DoRA's norm of the rows of W + scaling B A whole for a row-wise layer, whose ranks hold slices of the
    columns.

    The squares are summed over ``mesh`` by one small all-reduce of ``out_features`` numbers. DoRA treats the norm as a
    constant (Liu et al., 2024, arXiv:2402.09353, section 4.3), so nothing is needed in backward.

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

    magnitude.get_weight_norm = get_weight_norm  # type: ignore[assignment]
