"""transformers' own parallelism, ``DistributedConfig``."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from .case import Case, build, build_model, compile_layers, mesh_of, with_lora
from .peer import NotPossible, Peer


def load(case: Case) -> nn.Module:
    """The model sharded while it is loaded, as ``from_pretrained`` does it."""
    place: list[Any] = [None]
    with tempfile.TemporaryDirectory() as directory:
        if dist.get_rank() == 0:
            build_model(case).save_pretrained(directory)
            place = [directory]
        dist.broadcast_object_list(place)
        config = DistributedConfig(tp_size=case.tp, fsdp_size=case.dp)
        model = LlamaForCausalLM.from_pretrained(place[0], distributed_config=config)
        dist.barrier()
    return model


def tuned(case: Case) -> nn.Module:
    """:func:`load`, with PEFT's adapters if the case has them."""
    model = load(case)
    if case.lora:
        model = with_lora(model)
        _same_adapters(model, case)
    return model


def build_peer(case: Case) -> Peer:
    """The model sharded by transformers; only its decoder layers, unless the case is the whole model."""
    if case.sequence_parallel:
        raise NotPossible("transformers' DistributedConfig says of enable_sequence_parallel: not wired up yet")
    model: Any
    if case.whole or case.dp > 1:
        model = tuned(case)
    else:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        model, mesh = build_model(case), mesh_of(case)["tp"]
        plan = {name: style for name, style in model.tp_plan.items() if "layers" in name}
        apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(plan))
        model._device_mesh = mesh  # where PEFT looks for it
        model.config.distributed_config = DistributedConfig(tp_size=case.tp)
        if case.lora:
            model = with_lora(model)
            _same_adapters(model, case)
    model.train()
    if case.compiled:
        compile_layers(model)
    return Peer(model)


@torch.no_grad()
def _same_adapters(model: nn.Module, case: Case) -> None:
    """The values that the other peers have; drawn on shards they are others."""
    reference = dict(build(case).named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value = reference[name].detach()
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
