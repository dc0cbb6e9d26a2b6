"""HunyuanVideo, the video transformer of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from ...core.options import GivenPlan
from .video import VideoParallelizationStrategy


class HunyuanParallelizationStrategy(VideoParallelizationStrategy):
    """``HunyuanVideo15Transformer3DModel``: double-stream blocks, both streams and their joint attention sharded by
    heads.

    As in the reference API, :meth:`parallelize` computes and returns bfloat16 if no policy is given, and checkpoints
    the blocks by default. ``Accelerator.prepare`` follows its config.
    """

    mp_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)

    def parallelize(  # type: ignore[override]
        self,
        model: nn.Module,
        device_mesh: DeviceMesh,
        mp_policy: MixedPrecisionPolicy | None = None,
        offload_policy: OffloadPolicy | None = None,
        sequence_parallel: bool = False,
        activation_checkpointing: bool | str | None = True,
        tp_shard_plan: GivenPlan = None,
        dp_replicate_mesh_name: str = "dp_replicate",
        dp_shard_cp_mesh_name: str = "dp_shard_cp",
        tp_mesh_name: str = "tp",
        **kwargs: Any,
    ) -> nn.Module:
        """As :meth:`DefaultParallelizationStrategy.parallelize`, with ``activation_checkpointing=True`` as default."""
        return super().parallelize(
            model,
            device_mesh,
            mp_policy,
            offload_policy,
            sequence_parallel,
            activation_checkpointing,
            tp_shard_plan,
            dp_replicate_mesh_name,
            dp_shard_cp_mesh_name,
            tp_mesh_name,
            **kwargs,
        )
