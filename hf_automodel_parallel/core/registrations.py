"""Has a model got a module or parameter since? By torch's hooks, instead of a walk through all modules per forward."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


class Registrations:
    """Says whether a model may have got a parameter since it was looked through.

    A parameter that is written into ``module._parameters`` is not noticed; FSDP2 and this package do that.

    Attributes:
        news: True until :meth:`seen` is called, and after each registration in a module of the model.
    """

    def __init__(self) -> None:
        self.news = True
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        if _WATCHED is None:
            _watch()
        _EVERY.add(self)

    def seen(self, model: nn.Module) -> None:
        """The parameters of ``model`` have been looked through."""
        self._known = weakref.WeakSet(model.modules())
        self.news = False

    def notice(self, owner: nn.Module, module: nn.Module | None = None) -> None:
        """A parameter, or ``module``, is being registered in ``owner``."""
        # A slice of a ModuleList, as in each forward of a decoder, is a list of its own: no owner of the model.
        if owner in self._known and module not in self._known:
            self.news = True

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has been looked through by nobody."""
        return type(self), ()


_EVERY: weakref.WeakSet[Registrations] = weakref.WeakSet()
_WATCHED: list[Any] | None = None


def _watch() -> None:
    global _WATCHED
    _WATCHED = [
        torch_module.register_module_parameter_registration_hook(lambda owner, *_: _notice(owner)),
        torch_module.register_module_module_registration_hook(lambda owner, name, module: _notice(owner, module)),
    ]


def _notice(owner: nn.Module, module: nn.Module | None = None) -> None:
    for registrations in list(_EVERY):
        registrations.notice(owner, module)
