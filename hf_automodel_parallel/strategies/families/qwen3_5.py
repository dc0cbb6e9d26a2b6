"""Qwen3.5: layers of softmax attention and of gated delta nets, with float32 vectors among bfloat16 weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .family import FamilyParallelizationStrategy


class Qwen3_5ParallelizationStrategy(FamilyParallelizationStrategy):
    """``Qwen3_5ForCausalLM`` and ``Qwen3_5ForConditionalGeneration``.

    Parameters of two dtypes in a layer (``A_log`` and the projections) are two param groups of one FSDP unit
    (:mod:`hf_automodel_parallel.fsdp.dtype_groups`), as in every model. So nothing in the layer has to be replaced
    while it is sharded.
    """

    mixes_tokens = "its gated delta nets carry a state along the sequence"

    def parallelize(  # type: ignore[override]
        self, model: nn.Module, device_mesh: DeviceMesh, dp_shard_cp_mesh_name: str = "dp_shard_cp", **kwargs: Any
    ) -> nn.Module:
        """As :meth:`DefaultParallelizationStrategy.parallelize`, with the reference API's order of arguments."""
        return super().parallelize(model, device_mesh, dp_shard_cp_mesh_name=dp_shard_cp_mesh_name, **kwargs)
