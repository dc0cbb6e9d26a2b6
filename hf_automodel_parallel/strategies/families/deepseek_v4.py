"""DeepSeek-V4: a few modules that the model's quality depends on compute in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ...core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from ..context import ParallelizeContext
from .family import FamilyParallelizationStrategy


class DeepseekV4ParallelizationStrategy(FamilyParallelizationStrategy):
    """``DeepseekV4ForCausalLM``: experts, embedding and output projection are sharded over tp, attention is replicated,
    as in transformers' own plan.

    Hyper-connections, attention sinks, compressors with their indexers, and the output projection compute in float32 if
    they are stored in float32, under a bfloat16 policy and under autocast, too.
    """

    mixes_tokens = "its compressors pool windows of keys and values, from which an indexer selects"
    keeps_dtype = ("attn_hc", "ffn_hc", "hc_head", "lm_head", "sinks", "compressor")

    def parallelize(  # type: ignore[override]
        self, model: nn.Module, device_mesh: DeviceMesh, dp_shard_cp_mesh_name: str = "dp_shard_cp", **kwargs: Any
    ) -> nn.Module:
        """As :meth:`DefaultParallelizationStrategy.parallelize`, with the reference API's order of arguments."""
        return super().parallelize(model, device_mesh, dp_shard_cp_mesh_name=dp_shard_cp_mesh_name, **kwargs)

    def finish_layers(self, context: ParallelizeContext) -> None:
        """As for every model; first the forwards of modules that keep their own dtype are wrapped."""
        for name, module in context.model.named_modules():
            own = [f"{name}.{key}" for key, _ in module.named_parameters()]
            if own and context.fsdp.own_dtype.issuperset(own) and not set(self.keeps_dtype).isdisjoint(name.split(".")):
                keep_output = name.rpartition(".")[2] == "lm_head"
                ForwardStack.of(module).push(ForwardSlot.DTYPE, InOwnDtype(module, keep_output))
        super().finish_layers(context)


class InOwnDtype(ForwardWrapper):
    """A forward with autocast disabled. The input of a linear layer is cast to the dtype of its weight.

    Args:
        module: the module, with parameters of one dtype.
        keep_output: the output of a linear layer keeps that dtype; else it is cast back to the dtype of the input.
    """

    def __init__(self, module: nn.Module, keep_output: bool) -> None:
        self.linear = module if isinstance(module, nn.Linear) else None
        self.keep_output = keep_output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        with torch.autocast(device, enabled=False):
            if self.linear is None:
                return self.inner(*args, **kwargs)
            (x,) = args
            y = self.inner(x.to(self.linear.weight.dtype))
            return y if self.keep_output else y.to(x.dtype)
