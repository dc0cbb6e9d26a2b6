"""Base of the dispatch modes that follow facts about tensors through operators."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ... import compat

Fact = TypeVar("Fact")


class OperatorTrace(compat.TorchDispatchMode, Generic[Fact]):
    """A dispatch mode that keeps a fact for some tensors.

    Args:
        facts: id of a tensor -> its fact. The caller keeps these tensors alive.
    """

    def __init__(self, facts: dict[int, Fact]) -> None:
        super().__init__()
        self.facts = facts
        # Ids and addresses are unique among living objects only. A tensor that is known stays alive, because a later
        # one that got its id or its memory would inherit the fact, on some ranks and not on others.
        self._alive: list[torch.Tensor] = []

    def note(self, x: torch.Tensor, fact: Fact) -> None:
        """``fact`` is known of ``x`` from now on."""
        self.facts[id(x)] = fact
        self._alive.append(x)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among nested arguments."""
    return [x for x in compat.tree_leaves(value) if isinstance(x, torch.Tensor)]


def storage_id(x: torch.Tensor) -> int:
    """Identifies the storage of ``x`` and its views, while it is alive."""
    return StorageWeakRef(x.untyped_storage()).cdata


def operator_name(func: Any) -> str:
    """The name of an operator without namespace and overload: "sum" for ``aten::sum.dim_IntList``."""
    return func.name().removeprefix("aten::").partition(".")[0]


def argument_of(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument ``name`` of a call of an operator, as given or its default; None if the operator has none."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return kwargs.get(name, args[position] if position < len(args) else argument.default_value)
    return None
