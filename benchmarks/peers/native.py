"""transformers' own parallelism, ``DistributedConfig``."""

from __future__ import annotations

import tempfile
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM

from .case import Case, build_model, compile_layers, mesh_of, with_lora
from .peer import NotPossible, Peer


def load(case: Case) -> nn.Module:
    """The model sharded while it is loaded, as ``from_pretrained`` does it."""
    from transformers.distributed import DistributedConfig

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


def build_peer(case: Case) -> Peer:
    """The model sharded by transformers; only its decoder layers, unless the case is the whole model."""
    if case.sequence_parallel:
        raise NotPossible("transformers' DistributedConfig says of enable_sequence_parallel: not wired up yet")
    model: Any
    if case.whole or case.dp > 1:
        model = load(case)
    else:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        model = build_model(case)
        plan = {name: style for name, style in model.tp_plan.items() if "layers" in name}
        apply_tensor_parallelism(model, mesh_of(case)["tp"], model._expand_parallel_plan(plan))
    model = with_lora(model) if case.lora else model
    model.train()
    if case.compiled:
        compile_layers(model)
    return Peer(model)
