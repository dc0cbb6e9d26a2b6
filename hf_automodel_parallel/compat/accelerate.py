"""Private names of Accelerate and the Trainer; :mod:`.names` lists them."""

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

    On CPU, Accelerate 1.15 drops a given ``fsdp_plugin`` before it calls any code of this package; only the frame of
    the running constructor still has it. Returns an empty dict if the constructor is not on the stack.
    """
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is Accelerator.__init__.__code__ and frame.f_locals.get("self") is accelerator:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def owner_of_running_accelerator_init(accelerator: Accelerator, kind: type) -> Any:
    """Return the object of type ``kind`` whose method is constructing ``accelerator``; None without one on the stack.

    The Trainer (transformers 5.17 to 5.24) builds its ``Accelerator`` in its own constructor and does not pass itself
    to it, so only the stack shows which Trainer it belongs to.
    """
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    constructor_seen = False
    while frame is not None:
        holder = frame.f_locals.get("self")
        if frame.f_code is Accelerator.__init__.__code__:
            constructor_seen = holder is accelerator
        elif constructor_seen and isinstance(holder, kind):
            # An owner that already has an Accelerator is running user code, which builds another, unrelated one.
            return None if "accelerator" in vars(holder) else holder
        frame = frame.f_back
    return None


def set_distributed_type_fsdp(accelerator: Accelerator) -> None:
    """Set Accelerate's ``distributed_type`` to FSDP, on CPU too, so that all of its code takes the FSDP2 path."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # AcceleratorState copies the type from PartialState each time it is constructed, so both have to be set.
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def parameters_of_ignored_modules(plugin: Any, model: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Return the parameters of an FSDP plugin's ``ignored_modules`` (modules, or a regex over their names)."""
    from accelerate.utils.fsdp_utils import get_parameters_from_modules

    return set(get_parameters_from_modules(plugin.ignored_modules, model, device))


def trainer_signal_manager_type() -> type | None:
    """Return the class that handles SIGTERM for a Trainer with ``enable_jit_checkpoint``; None if not imported."""
    module = sys.modules.get("transformers.trainer_jit_checkpoint")
    return getattr(module, "CheckpointManager", None)


def replace_checkpoint_request(manager: Any, function: Callable[[], None]) -> None:
    """Make ``manager`` (of :func:`trainer_signal_manager_type`) call ``function`` some seconds after SIGTERM."""
    manager._enable_checkpoint = function


def save_trainer_checkpoint(trainer: Any) -> None:
    """Write the checkpoint of the current step, as ``save_strategy`` does."""
    trainer._save_checkpoint(trainer.model, trial=None)


def trainer_save(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``Trainer._save`` of the trainer's class: save weights, configs, tokenizer and arguments to a directory."""
    return type(trainer)._save(trainer, *args, **kwargs)


def bind_trainer_save(trainer: Any, save: Callable[..., Any]) -> None:
    """Replace ``Trainer._save`` of this ``trainer`` by ``save``, which it then calls on all ranks."""
    trainer._save = save
