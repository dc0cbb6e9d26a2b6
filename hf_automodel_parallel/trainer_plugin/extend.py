"""The Trainer plugin: how one Trainer instance, of any subclass, comes to save and load through this package.

The Trainer calls Accelerate's functions for FSDP checkpoints by the names it has imported, so that there is no object
to bind to. But it builds its ``Accelerator`` in its own constructor, which is on the stack when our config is called.
That one instance gets a class of its own, with :class:`.checkpoints.ParallelTrainer` between the Trainer's subclasses
and ``Trainer``: what a subclass (TRL's, the user's) overrides comes first, and its ``super()`` calls reach ours. FSDP2
extends modules likewise. No class is changed, and other Trainers of the process stay stock.
"""

from __future__ import annotations

import functools
import sys
import weakref
from typing import TYPE_CHECKING, Any

from .. import compat
from ..accelerate_plugin import methods
from ..accelerate_plugin.hooks import Hooks
from ..accelerate_plugin.saving import bind_trainer
from ..core.mesh import inherit_timeouts
from .checks import check_trainer
from .preemption import adopt_signal_handler, agree_on_signal

if TYPE_CHECKING:
    from accelerate import Accelerator, ParallelismConfig


class TrainerHooks(Hooks):
    """What a Trainer adds to the ``Accelerator`` that it builds; without a Trainer, the handler of SIGTERM alone."""

    _trainer: weakref.ref[Any] | None = None

    def attach(self, trainer: Any) -> None:
        """Note the Trainer; it refers to the ``Accelerator`` that these hooks belong to, so weakly."""
        self._trainer = weakref.ref(trainer)

    @property
    def trainer(self) -> Any | None:
        """The Trainer, None if there is none (any more)."""
        return None if self._trainer is None else self._trainer()

    def check(self, accelerator: Accelerator) -> None:
        if self.trainer is not None:
            check_trainer(accelerator, self.trainer)

    def before_prepare(self) -> None:
        adopt_signal_handler()

    def trains(self, model: Any) -> bool:
        return self.trainer is not None and getattr(self.trainer, "model", None) is model

    def before_step(self) -> None:
        agree_on_signal()


def install(accelerator: Accelerator, config: ParallelismConfig) -> None:
    """Bind this package to ``accelerator``, and to the Trainer that builds it, if there is one.

    Raises:
        ConfigError: what Accelerate was given beside the config contradicts it.
    """
    hooks = TrainerHooks()
    methods.install(accelerator, config, hooks)
    trainer = _extend_trainer(accelerator)
    if trainer is None or config.device_mesh is None:
        return
    bind_trainer(trainer, accelerator)
    hooks.attach(trainer)
    timeout = getattr(trainer.args, "ddp_timeout_delta", None)
    if accelerator.device.type == "cpu" and timeout is not None:
        # TrainingArguments (5.17 to 5.24) set the timeout of the process group from ddp_timeout on accelerators only.
        compat.set_timeout(timeout)
        inherit_timeouts(accelerator.torch_device_mesh)


def _extend_trainer(accelerator: Accelerator) -> Any | None:
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
