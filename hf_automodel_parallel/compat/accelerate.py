"""Private names of Accelerate and the Trainer; their table is :mod:`.names`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_already_exists() -> Any | None:
    """Return Accelerate's shared state if an ``Accelerator`` was created in this process, else None."""
    from accelerate.state import AcceleratorState, PartialState

    shared = AcceleratorState._shared_state
    if shared == {} or shared == PartialState._shared_state:
        return None
    return AcceleratorState()


def arguments_of_running_accelerator_init(accelerator: Accelerator) -> dict[str, Any]:
    """Return the local variables of the ``Accelerator.__init__`` call that is constructing ``accelerator``.

    On CPU, Accelerate 1.15 drops a given ``fsdp_plugin`` before any object of ours can see it; the running constructor
    still holds it. Returns an empty dict if the constructor is not on the stack.
    """
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is Accelerator.__init__.__code__ and frame.f_locals.get("self") is accelerator:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def owner_of_running_accelerator_init(accelerator: Accelerator, kind: type) -> Any:
    """The object of type ``kind`` whose method is constructing ``accelerator``, None if there is none on the stack.

    The Trainer (transformers 5.17 to 5.24) builds its ``Accelerator`` in its own constructor and never introduces
    itself to it.
    """
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    constructor_seen = False
    while frame is not None:
        holder = frame.f_locals.get("self")
        if frame.f_code is Accelerator.__init__.__code__:
            constructor_seen = holder is accelerator
        elif constructor_seen and isinstance(holder, kind):
            # One that has its Accelerator already runs a script's code, in which another one is built.
            return None if "accelerator" in vars(holder) else holder
        frame = frame.f_back
    return None


def set_distributed_type_fsdp(accelerator: Accelerator) -> None:
    """Make Accelerate's state say FSDP, on CPU too, so that its FSDP2 code path is taken everywhere."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def parameters_of_ignored_modules(plugin: Any, model: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """The parameters that an FSDP plugin's ``ignored_modules`` (modules, or a regex over names) stands for."""
    from accelerate.utils.fsdp_utils import get_parameters_from_modules

    return set(get_parameters_from_modules(plugin.ignored_modules, model, device))


def trainer_signal_manager_type() -> type | None:
    """The class whose instance handles SIGTERM for a Trainer with ``enable_jit_checkpoint``; None without such a
    Trainer.
    """
    module = sys.modules.get("transformers.trainer_jit_checkpoint")
    return getattr(module, "CheckpointManager", None)


def replace_checkpoint_request(manager: Any, function: Callable[[], None]) -> None:
    """Let ``manager``, of the type above, call ``function`` some seconds after SIGTERM."""
    manager._enable_checkpoint = function


def save_trainer_checkpoint(trainer: Any) -> None:
    """Write the checkpoint of the current step, as ``save_strategy`` does."""
    trainer._save_checkpoint(trainer.model, trial=None)


def trainer_save(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """``Trainer._save`` of the trainer's class: weights, configs, tokenizer and arguments into a directory."""
    return type(trainer)._save(trainer, *args, **kwargs)


def bind_trainer_save(trainer: Any, save: Callable[..., Any]) -> None:
    """Let ``trainer`` call ``save`` instead, on all ranks."""
    trainer._save = save
