"""The seam to the Trainer: how one Trainer instance, of whatever subclass, comes to save and load through this package.

The Trainer calls Accelerate's functions for FSDP checkpoints by the names it has imported, so that there is no object
to bind to. But it builds its ``Accelerator`` in its own constructor, which is on the stack when our config is asked.
That one instance gets a class of its own, with :class:`.trainer_checkpoints.ParallelTrainer` between the Trainer's
subclasses and ``Trainer``: what a subclass (TRL's, the user's) overrides comes first, and its ``super()`` calls reach
ours. FSDP2 extends modules likewise. No class is changed, and other Trainers of the process stay stock.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from .. import compat

if TYPE_CHECKING:
    from accelerate import Accelerator


def extend_trainer(accelerator: Accelerator) -> Any | None:
    """Extend the Trainer whose constructor is building ``accelerator`` and return it; None if there is none."""
    module = sys.modules.get("transformers.trainer")
    trainer = None if module is None else compat.owner_of_running_accelerator_init(accelerator, module.Trainer)
    if trainer is not None:
        trainer.__class__ = _extended(type(trainer))  # type: ignore[arg-type]
    return trainer


@functools.cache
def _extended(cls: type) -> type[Any]:
    """``cls`` with our methods in front of those of ``Trainer``, under its own name."""
    from transformers import Trainer

    from .checkpoints import ParallelTrainer

    if issubclass(cls, ParallelTrainer):
        return cls
    bases = (ParallelTrainer,) if cls is Trainer else (cls, ParallelTrainer)
    attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, bases, attributes)
