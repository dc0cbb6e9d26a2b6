"""Put other tensors into the parameter slots of modules: for the duration of a call, or for good.

A *slot* is an entry of a module's ``_parameters`` (or ``_buffers``). Slots that hold the same object are
tied, and so are their replacements.

The slots are written directly and not with ``setattr``: ``nn.Module.__setattr__`` rejects a plain tensor where a
parameter is registered, and forwards under tensor parallelism compute with plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class Slot(NamedTuple):
    """A tensor and where it is registered.

    Attributes:
        holder: ``_parameters`` or ``_buffers`` of a module.
        key: the name there.
        tensor: of any kind; None for an entry without a tensor.
    """

    holder: dict[str, Any]
    key: str
    tensor: Any


def tensor_slots(module: nn.Module, buffers: bool = False) -> Iterator[tuple[str, Slot]]:
    """Full name and slot of every parameter below ``module``, tied ones at each of their places.

    Args:
        module: its submodules are included, each once.
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
    """The slots below ``module`` with other tensors; nothing is changed yet, see :func:`exchange`.

    Args:
        module: see :func:`tensor_slots`.
        stand_in: full name and tensor -> the tensor to take its place, None to leave this slot. What it gives for one
            name of a tied tensor is taken for the later ones.
        buffers: include the buffers.
    """
    # The slots are listed first: they keep the tensors alive, and ids are unique among living objects only.
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
    """Write the tensors of ``slots`` to their places.

    Returns:
        The same slots with what they held before: ``exchange()`` of that restores them.
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
    """Show other tensors in the parameter slots below ``module``; the former ones return, also after an error.

    Args:
        module: between forwards, so that no unit of FSDP2 is unsharded and no local tensors are in place.
        stand_in: see :func:`stand_ins`. All of them are made before the first slot changes.
        write_back: called at the end, without gradients and after all slots are restored, for each slot that was
            exchanged: the former tensor, and what the slot held last.
        buffers: include the buffers.
    """
    before = exchange(stand_ins(module, stand_in, buffers))
    try:
        yield
    finally:
        shown = exchange(before)
        if write_back is not None:
            with torch.no_grad():
                for former, last in zip(before, shown, strict=True):
                    write_back(former.tensor, last.tensor)
