"""Options of the Trainer that would give wrong results on a mesh without a word, and that Accelerate does not hand on."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

_TRAINERS: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def remember_trainer(accelerator: Accelerator, trainer: Any) -> None:
    """Note the Trainer that makes ``accelerator``."""
    _TRAINERS[accelerator] = weakref.ref(trainer)


def check_trainer(accelerator: Accelerator) -> None:
    """Before a model is prepared for training.

    Raises:
        ConfigError: ``average_tokens_across_devices=False`` where ranks share batches. The Trainer then divides the number
            of tokens by the tp and cp sizes although it has not summed it, so that gradients would be that much too large.
    """
    reference = _TRAINERS.get(accelerator)
    trainer = None if reference is None else reference()
    if trainer is None or getattr(trainer.args, "average_tokens_across_devices", True):
        return
    counts = getattr(trainer, "model_accepts_loss_kwargs", True) or getattr(trainer, "compute_loss_func", None)
    shared = accelerator.parallelism_config.non_data_parallel_size  # type: ignore[union-attr]
    if counts and shared > 1:
        raise ConfigError(
            f"average_tokens_across_devices=False with {shared} ranks to a batch (tp_size x cp_size): the Trainer would make "
            f"losses and gradients {shared} times too large. Leave it at True, its default."
        )
