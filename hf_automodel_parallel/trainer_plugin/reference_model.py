"""Reference models of preference trainers that follow the trained model, on any mesh.

TRL shards a reference model with FSDP2 over ``dp_shard`` alone, and updates it in place, element by element, from the
parameters of the trained model. These are DTensors on another mesh (with a tp axis), so that the two cannot be added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import compat
from ..fsdp.shard import fsdp_units


def let_references_follow(trainer: Any) -> None:
    """Let the callbacks of ``trainer`` that update a reference model do so on any mesh.

    These are TRL's ``SyncRefModelCallback`` and subclasses that keep its ``sync_target_model(model, target_model,
    alpha)``. It is set on the instance.
    """
    for callback in trainer.callback_handler.callbacks:
        update = getattr(type(callback), "sync_target_model", None)
        # A user's own function may do something else.
        if str(getattr(update, "__module__", "")).partition(".")[0] == "trl":
            callback.sync_target_model = follow


@torch.no_grad()
def follow(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
    """Move each parameter of ``target_model`` to ``(1 - alpha) * its value + alpha * that of model``, in place.

    Collective: the parameters of ``model`` are gathered one at a time.

    Args:
        model: the trained model.
        target_model: a model with the same parameters in the same order, sharded otherwise or not at all.
        alpha: between 0 and 1.
    """
    for unit in (*fsdp_units(model), *fsdp_units(target_model)):
        unit.reshard()
    for target, source in zip(target_model.parameters(), model.parameters(), strict=True):
        value: Any = source
        if isinstance(source, DTensor):
            compat.mark_packed_placements([source])
            value = source.full_tensor()
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
        local: Any = target.to_local() if isinstance(target, DTensor) else target
        local.mul_(1.0 - alpha).add_(value.to(local.device, local.dtype), alpha=alpha)
