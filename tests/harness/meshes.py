"""The device meshes that tests run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .pool import run_distributed

#: mesh name -> (world size, size fields of the config, number of data-parallel ranks)
MESHES: dict[str, tuple[int, dict[str, int], int]] = {
    "tp2": (2, {"tp_size": 2}, 1),
    "fsdp2": (2, {"dp_shard_size": 2}, 2),
    "tp2_fsdp2": (4, {"tp_size": 2, "dp_shard_size": 2}, 2),
    "hsdp": (4, {"dp_replicate_size": 2, "dp_shard_size": 2}, 4),
    "tp4": (4, {"tp_size": 4}, 1),
    "tp2_hsdp": (8, {"tp_size": 2, "dp_replicate_size": 2, "dp_shard_size": 2}, 4),
    "ddp_like": (2, {"dp_replicate_size": 2, "dp_shard_size": 1}, 2),
    "cp2": (2, {"cp_size": 2}, 1),
    "cp2_tp2": (4, {"cp_size": 2, "tp_size": 2}, 1),
    "cp2_fsdp2": (4, {"cp_size": 2, "dp_shard_size": 2}, 2),
    "cp2_replicas": (4, {"cp_size": 2, "dp_replicate_size": 2}, 2),
    "cp4": (4, {"cp_size": 4}, 1),
}

each_mesh = pytest.mark.parametrize("mesh", ["tp2", "fsdp2", "tp2_fsdp2"])
"""The three meshes that between them have every kind of axis and their product."""


def run_on_mesh(mesh: str, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Run ``job(sizes, dp_size, ...)`` on all ranks of ``mesh``, see `run_distributed`."""
    world, sizes, dp_size = MESHES[mesh]
    return run_distributed(world, job, sizes, dp_size, *args, **kwargs)
