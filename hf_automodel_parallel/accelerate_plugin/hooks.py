"""Hooks that a training loop on top of an ``Accelerator`` can implement; the Trainer plugin does.

They keep the imports in one direction: the Accelerate plugin calls hooks and does not import the Trainer plugin.
"""

from __future__ import annotations

import weakref
from typing import Any

from accelerate import Accelerator


class Hooks:
    """Hooks that do nothing, for a user's own training loop.

    Attributes:
        gathers_by_process: the loop expects from ``Accelerator.gather`` what each process has, tp copies included.
        ranks_once: the loop counts data-parallel ranks as processes at the moment.
    """

    gathers_by_process = False
    ranks_once = False

    def check(self, accelerator: Accelerator) -> None:
        """Called on every rank before a model is prepared for training; raises for settings that train wrongly."""

    def before_prepare(self) -> None:
        """Called before each ``Accelerator.prepare``; must not call collectives."""

    def training_batch(self) -> tuple[int, int] | None:
        """Rows of a forward of one data-parallel rank, 0 if they change, and forwards to an optimizer step; None: not
        known.
        """
        return None

    def trains(self, model: Any) -> bool:
        """True if the loop trains ``model``, even where it calls ``prepare_model(model, evaluation_mode=True)``."""
        return False

    def before_step(self) -> None:
        """Called on every rank before each optimizer step of a prepared model; may call collectives."""


_HOOKS: weakref.WeakKeyDictionary[Accelerator, Hooks] = weakref.WeakKeyDictionary()
_NONE = Hooks()


def set_hooks(accelerator: Accelerator, hooks: Hooks) -> None:
    """Let the functions bound on ``accelerator`` call ``hooks``."""
    _HOOKS[accelerator] = hooks


def hooks_of(accelerator: Accelerator) -> Hooks:
    """The hooks of ``accelerator``."""
    return _HOOKS.get(accelerator, _NONE)
