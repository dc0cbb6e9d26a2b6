"""Swap the tensors in the parameter slots of modules, temporarily or permanently.

A *slot* is an entry of a module's ``_parameters`` (or ``_buffers``). Slots with the same tensor object are tied; their
replacements are tied, too.

The slots are written directly instead of with ``setattr``: ``nn.Module.__setattr__`` rejects a plain tensor for a
registered parameter, and forwards under tensor parallelism compute with plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

#: In the place of a tensor whose slot does not exist any more.
_GONE = object()


class Slot(NamedTuple):
    """A tensor and the place where it is registered.

    Attributes:
        holder: the dict ``_parameters`` or ``_buffers`` of a module.
        key: key in this dict.
        tensor: a tensor of any class; None for an entry without a tensor.
    """

    holder: dict[str, Any]
    key: str
    tensor: Any


def tensor_slots(module: nn.Module, buffers: bool = False) -> Iterator[tuple[str, Slot]]:
    """Yield full name and slot of each parameter of ``module``; a tied parameter once for each of its slots.

    Args:
        module: the module; its submodules are included, each once.
        buffers: include the buffers.
    """
    for prefix, owner in module.named_modules():
        for holder in (owner._parameters, owner._buffers) if buffers else (owner._parameters,):
            for key, tensor in holder.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, Slot(holder, key, tensor)


def stand_ins(
    module: nn.Module, stand_in: Callable[[str, Any], torch.Tensor | None], buffers: bool = False
) -> list[Slot]:
    """Return slots of ``module`` with replacement tensors. Nothing is changed yet, see :func:`exchange`.

    Args:
        module: see :func:`tensor_slots`.
        stand_in: (full name, tensor) -> replacement, or None to leave this slot. For tied slots the first replacement
            is used for all later ones.
        buffers: include the buffers.
    """
    # The list keeps all tensors alive while `made` uses their ids as keys: Python reuses the id of a deleted object.
    slots = list(tensor_slots(module, buffers))
    made: dict[int, torch.Tensor | None] = {}
    result = []
    for name, slot in slots:
        new = made.get(id(slot.tensor))
        if new is None:
            new = made[id(slot.tensor)] = stand_in(name, slot.tensor)
        if new is not None:
            result.append(Slot(slot.holder, slot.key, new))
    return result


def exchange(slots: Iterable[Slot]) -> list[Slot]:
    """Write the tensors of ``slots`` into the modules.

    Returns:
        The same slots with their previous tensors. ``exchange`` of this list restores them.
    """
    before = []
    for slot in slots:
        before.append(Slot(slot.holder, slot.key, slot.holder[slot.key]))
        slot.holder[slot.key] = slot.tensor
    return before


@contextmanager
def swapped_parameters(
    module: nn.Module,
    stand_in: Callable[[str, Any], torch.Tensor | None],
    write_back: Callable[[Any, Any], object] | None = None,
    buffers: bool = False,
) -> Iterator[None]:
    """Swap the parameters of ``module`` for other tensors in the block, and restore them afterwards, also on errors.

    Args:
        module: the module, between forwards: no FSDP unit is unsharded, and no local tensor is swapped in.
        stand_in: see :func:`stand_ins`. All replacements are made before the first slot changes.
        write_back: called after all slots are restored, under ``no_grad``, for each swapped slot with (original tensor,
            last tensor in the slot).
        buffers: include the buffers.
    """
    before = exchange(stand_ins(module, stand_in, buffers))
    try:
        yield
    finally:
        # All are restored before anything else: the block may have removed a slot, or ended with an error.
        last = [slot.holder.get(slot.key, _GONE) for slot in before]
        for slot in before:
            slot.holder[slot.key] = slot.tensor
        if write_back is not None:
            with torch.no_grad():
                for slot, tensor in zip(before, last, strict=True):
                    if tensor is not _GONE:
                        write_back(slot.tensor, tensor)
