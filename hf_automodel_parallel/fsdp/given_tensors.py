"""Tensors that a user puts in the place of parameters for one call (``torch.func.functional_call``).

FSDP2 replaces the parameters of a unit in front of its forward by unsharded ones, and would overwrite such tensors
without a word. Hooks around FSDP2's own put them back for the forward. After it the unit is resharded, because the
caller restores the parameters that it found, the sharded ones.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class GivenTensors:
    """The hooks of one FSDP unit, in front of and behind FSDP2's.

    Args:
        unit: the unit; parameters of units inside of it are theirs.
    """

    def __init__(self, unit: Any) -> None:
        self.unit = weakref.ref(unit)
        self.places = [
            (module, name)
            for module in _own_modules(unit)
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.given: list[tuple[nn.Module, str, Any]] = []
        self.overwritten = False
        unit.register_forward_pre_hook(self.note, prepend=True)
        unit.register_forward_pre_hook(self.put_back)
        unit.register_forward_hook(self.reshard, always_call=True)

    def note(self, *_: Any) -> None:
        """Find the tensors in front of FSDP2's hook: what is no parameter has been put there."""
        if torch.compiler.is_compiling():
            return
        self.given = [
            (module, name, tensor)
            for module, name in self.places
            if not isinstance(tensor := module._parameters.get(name), nn.Parameter) and tensor is not None
        ]

    def put_back(self, *_: Any) -> None:
        """Put them back behind it."""
        if torch.compiler.is_compiling():
            return
        for module, name, tensor in self.given:
            self.overwritten = self.overwritten or module._parameters.get(name) is not tensor
            module._parameters[name] = tensor
        self.given = []

    def reshard(self, *_: Any) -> None:
        """Reshard the unit if its parameters were sharded when the tensors took their place."""
        if self.overwritten and not torch.compiler.is_compiling():
            self.overwritten = False
            self.unit().reshard()  # type: ignore[union-attr]


def _own_modules(unit: nn.Module) -> list[nn.Module]:
    found, waiting = [], [unit]
    while waiting:
        module = waiting.pop()
        found.append(module)
        waiting += [child for child in module.children() if not isinstance(child, FSDPModule)]
    return found
