"""Has an activation been changed in place since it was noted? Also while the compiler traces, where autograd cannot be
asked.

Who reads the whole sequence may give its gradient straight to the share that it was gathered from, past what the model
does in between. That is right while the model does nothing, and a write in place is all that it can do to the same
tensor object.

A trace has versions of tensors, too, but does not show them: compiled code may not depend on them. What can look at
them is an operator's code for tensors without values, which runs while the trace is made. Both operators here do
nothing else, have no result, and are dropped with all that nobody uses before a graph is compiled.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from ..errors import UnsupportedError

_noted: dict[int, tuple[StorageWeakRef, int]] = {}


@torch.library.custom_op("hf_automodel_parallel::note_version", mutates_args=())
def _note(x: torch.Tensor) -> None:
    return None


@torch.library.custom_op("hf_automodel_parallel::refuse_changed", mutates_args=())
def _refuse(x: torch.Tensor) -> None:
    return None


@_note.register_fake
def _(x: torch.Tensor) -> None:
    for key, (storage, _version) in list(_noted.items()):
        if storage.expired():
            del _noted[key]
    storage = StorageWeakRef(x.untyped_storage())
    _noted[storage.cdata] = (storage, compat.version_of(x))


@_refuse.register_fake
def _(x: torch.Tensor) -> None:
    known = _noted.get(StorageWeakRef(x.untyped_storage()).cdata)
    if known is not None and known[1] != compat.version_of(x):
        raise UnsupportedError(
            "sequence_parallel=True with compile: a block changes its input in place before its layers read it, which "
            "it did not do when the model was prepared. Its gradient would be wrong. Change a copy of the input, or "
            "leave out compile."
        )


def note_version(x: torch.Tensor) -> None:
    """Remember, while the compiler traces, how often ``x`` has been changed."""
    torch.ops.hf_automodel_parallel.note_version.default(x.detach())


def refuse_changed(x: torch.Tensor) -> None:
    """Compare, while the compiler traces.

    Raises:
        UnsupportedError: inside of the compiler's own error, if ``x`` has been changed in place since it was noted.
    """
    torch.ops.hf_automodel_parallel.refuse_changed.default(x.detach())
