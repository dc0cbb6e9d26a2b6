"""What adapters need beyond boundaries: DoRA's norm of rows spread over ranks, and no change of structure afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..errors import UnsupportedError
from .collectives import all_reduce

#: Methods of a PEFT model that replace layers or add parameters, which would escape the placements and boundaries.
STRUCTURAL_METHODS = (
    "merge_and_unload",
    "unload",
    "merge_adapter",
    "unmerge_adapter",
    "add_adapter",
    "load_adapter",
    "add_weighted_adapter",
)


def refuse_structural_changes(model: nn.Module) -> None:
    """Let the methods of a tensor-parallel PEFT model that rebuild layers raise instead of computing something wrong."""
    if not compat.is_peft_model(model):
        return
    for owner in (model, model.base_model):
        for method in STRUCTURAL_METHODS:
            if callable(getattr(owner, method, None)):
                setattr(owner, method, _refusal(method))


def _refusal(method: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"{method}() on a tensor-parallel model is not available yet: it replaces layers or adds parameters that have no "
            f"place on the tp axis. Set adapters up before accelerator.prepare; to merge, save the adapter and merge it in "
            f"one process with plain PEFT."
        )

    return refuse


def sum_weight_norm(magnitude: nn.Module, mesh: DeviceMesh) -> None:
    """Make DoRA's norm of the rows of W + scaling B A whole for a row-wise layer, whose ranks hold slices of the columns.

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
