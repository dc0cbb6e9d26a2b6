"""torch's ``parallelize_module`` with its styles, and ``fully_shard``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from .case import Case, build, compile_layers, layers_of, mesh_of
from .floor import COLUMN, ROW
from .peer import NotPossible, Peer


def build_peer(case: Case) -> Peer:
    """The model in the styles' words; FSDP2 around it where the case has a dp axis."""
    if case.tp == 1:
        raise NotPossible("torch's styles are of tensor parallelism; without it, see fully_shard")
    model: Any = build(case)
    model = model.get_base_model() if case.lora else model
    mesh = mesh_of(case)
    parallelize_module(model, mesh["tp"], _plan(case))
    if case.compiled:
        compile_layers(model)
    if case.dp > 1:
        for module in (*layers_of(model), model):
            fully_shard(module, mesh=mesh["dp"])
    if not case.whole:
        return Peer(model)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), labels)

    def whole_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with loss_parallel():
            return loss(batch)

    def backward(value: torch.Tensor) -> None:
        with loss_parallel():
            value.backward()

    return Peer(model, loss=whole_loss, backward=backward)


def _plan(case: Case) -> dict[str, ParallelStyle]:
    if case.sequence_parallel and case.lora:
        raise NotPossible("torch's styles have none for an adapter on sequence shards")
    plan: dict[str, ParallelStyle] = {}
    sharded = {"output_layouts": Shard(1)} if case.sequence_parallel else {}
    for index in range(case.layers):
        layer = f"model.layers.{index}"
        blocks = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
        for name in COLUMN:
            path = f"{layer}.{blocks.get(name, 'mlp')}.{name}"
            if case.lora:
                plan |= {f"{path}.base_layer": ColwiseParallel(), f"{path}.lora_B.default": ColwiseParallel()}
            else:
                plan[path] = ColwiseParallel()
        for name in ROW:
            path = f"{layer}.{blocks.get(name, 'mlp')}.{name}"
            if case.lora:
                plan |= {f"{path}.base_layer": RowwiseParallel(), f"{path}.lora_A.default": RowwiseParallel()}
            else:
                plan[path] = RowwiseParallel(**sharded)
        if case.sequence_parallel:
            full = {"hidden_states": Shard(1)}, {"hidden_states": Replicate()}
            plan[f"{layer}.self_attn"] = PrepareModuleInput(
                input_kwarg_layouts=full[0], desired_input_kwarg_layouts=full[1]
            )
            plan[f"{layer}.mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
            plan[f"{layer}.input_layernorm"] = SequenceParallel(use_local_output=True)
            plan[f"{layer}.post_attention_layernorm"] = SequenceParallel(use_local_output=True)
    if case.sequence_parallel:
        plan["model.layers.0"] = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        )
        plan["model.norm"] = PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
        )
    if case.whole:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        plan["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return plan
