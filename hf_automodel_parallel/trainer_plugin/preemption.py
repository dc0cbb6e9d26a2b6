"""SIGTERM during training: all ranks write their checkpoint after the same step.

``TrainingArguments(enable_jit_checkpoint=True)`` lets each process save on its own, some seconds after its own signal.
Signals do not reach all ranks during the same step, and saving a sharded model is a collective: ranks would wait for
each other in different ones. So a rank only notes its signal; during each optimizer step the ranks ask each other, and
the first step with a signal anywhere is the last one for all of them.
"""

from __future__ import annotations

import logging
import signal
from typing import Any

import torch
import torch.distributed as dist

from .. import compat
from ..core.ranks import communication_device

logger = logging.getLogger(__name__)

_NOTED = "_automodel_parallel_signal"


def adopt_signal_handler() -> None:
    """Take over the Trainer's handler of SIGTERM, if it has one: on its instance, once. Call it before the first
    step.
    """
    manager = _manager()
    if manager is None or hasattr(manager, _NOTED):
        return
    setattr(manager, _NOTED, bool(manager.is_checkpoint_requested))
    manager.is_checkpoint_requested = False

    def note() -> None:
        setattr(manager, _NOTED, True)

    def save() -> None:
        # Like the Trainer's, without its file "checkpoint-is-incomplete.txt", which each rank would write and remove.
        manager.is_checkpoint_requested = False
        setattr(manager, _NOTED, False)
        logger.info("SIGTERM: checkpoint at step %d, then the end", manager.trainer.state.global_step)
        compat.save_trainer_checkpoint(manager.trainer)

    compat.replace_checkpoint_request(manager, note)
    manager.execute_jit_checkpoint = save


def agree_on_signal() -> None:
    """During an optimizer step, on all ranks: if any of them has got a signal, each one's Trainer saves after this
    step.

    Costs an all-reduce of one number, and nothing where ``enable_jit_checkpoint`` is off.
    """
    manager = _manager()
    if manager is None or not hasattr(manager, _NOTED):
        return
    noted = torch.tensor(int(getattr(manager, _NOTED)), device=communication_device())
    dist.all_reduce(noted, op=dist.ReduceOp.MAX)
    manager.is_checkpoint_requested = bool(noted.item())


def _manager() -> Any | None:
    """What the Trainer handles SIGTERM with, None if somebody else does or nobody."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, compat.trainer_signal_manager_type() or ()) else None
