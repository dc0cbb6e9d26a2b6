"""Has a model got a module or parameter since? A counter, instead of a walk through all modules in each forward."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


class Registrations:
    """Says whether ``model`` may have got a parameter since it was looked through, by torch's global hooks.

    A parameter that is written into ``module._parameters`` is not noticed; FSDP2 and this package do that.
    """

    _count = 0  # of the process
    _known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    _watching = False

    def __init__(self) -> None:
        self._seen: int | None = None
        if not Registrations._watching:
            Registrations._watching = True
            torch_module.register_module_parameter_registration_hook(_one_more)
            torch_module.register_module_module_registration_hook(_one_more_module)

    @property
    def news(self) -> bool:
        """True until :meth:`seen` is called, and after each registration that may concern the model."""
        return self._seen != Registrations._count

    def seen(self, model: nn.Module) -> None:
        """The parameters of ``model`` have been looked through."""
        Registrations._known.update(model.modules())
        self._seen = Registrations._count


def _one_more(*_: Any) -> None:
    Registrations._count += 1


def _one_more_module(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    # A slice of a ModuleList, as in each forward of a decoder, is a new list of known modules.
    if module not in Registrations._known:
        Registrations._count += 1
