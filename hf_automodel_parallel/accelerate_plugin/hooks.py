"""What a training loop on top of an ``Accelerator`` can add: the interface that the Trainer plugin implements.

It keeps the imports in one direction: this package calls hooks and does not know the Trainer.
"""

from __future__ import annotations

import weakref
from typing import Any

from accelerate import Accelerator


class Hooks:
    """Hooks that do nothing: for a loop of the user's own."""

    def check(self, accelerator: Accelerator) -> None:
        """Raise for what would train wrongly; before a model is prepared for training, on every rank."""

    def before_prepare(self) -> None:
        """Before each ``Accelerator.prepare``, without collectives."""

    def trains(self, model: Any) -> bool:
        """True if the loop trains ``model``, also where it is prepared in the way of an evaluation."""
        return False

    def before_step(self) -> None:
        """During each optimizer step of a prepared model, on every rank; may call collectives."""


_HOOKS: weakref.WeakKeyDictionary[Accelerator, Hooks] = weakref.WeakKeyDictionary()
_NONE = Hooks()


def set_hooks(accelerator: Accelerator, hooks: Hooks) -> None:
    """Let the functions bound on ``accelerator`` call ``hooks``."""
    _HOOKS[accelerator] = hooks


def hooks_of(accelerator: Accelerator) -> Hooks:
    """The hooks of ``accelerator``."""
    return _HOOKS.get(accelerator, _NONE)
