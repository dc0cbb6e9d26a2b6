"""Keep this rank's share of what a layer gathered along the sequence, and gather it once more in backward.

Under sequence parallelism the inputs of attention and MLP are gathered, and the column-wise layers keep them whole for
the gradients of their weights: what is saved of norms and residuals is paid for there (Korthikanti et al., 2022,
arXiv:2205.05198, section 4.2.2, gather again for this reason). Here nothing but the share is kept. Where a backward
asks for the whole, it is gathered, once for all consumers; the last of them lets it go.

Done by hooks on what autograd saves, so that it does not matter who consumes the activation: projections, adapters, a
router. Compiled layers have no such hooks; there the compiler is told to recompute the all-gathers, see
:func:`.activation_checkpointing.gathering_contexts`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import compat


class SavedShards:
    """One gathered activation.

    Attributes:
        share: what it was gathered from; its values stay, since autograd forbids that they are written to.
        gather: share -> whole, contiguous; collective. Every rank's backward asks in the same order.
    """

    def __init__(self, share: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.share, self.gather = share.detach(), gather
        self.version = compat.version_of(self.share)
        self.waiting = 0  # saved places that have not asked yet
        self.whole: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """The whole, for one of the places."""
        if compat.version_of(self.share) != self.version:
            raise RuntimeError(_CHANGED)
        whole = self.whole
        if whole is None:
            with torch.no_grad():
                whole = self.gather(self.share)
        self.waiting -= 1
        # A second backward through the same graph finds no more places waiting, and gathers for each of them.
        self.whole = whole if self.waiting > 0 else None
        return whole


class _Place:
    """A view of a gathered activation, saved by one consumer."""

    def __init__(self, source: SavedShards, view: torch.Tensor) -> None:
        self.source = source
        self.shape, self.strides, self.offset = view.shape, view.stride(), view.storage_offset()
        source.waiting += 1

    def restore(self) -> torch.Tensor:
        return self.source.take().as_strided(self.shape, self.strides, self.offset)


class _Kept:
    """Any other saved tensor. Hooks switch autograd's own check for changes in place off, so it is made here."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor.detach(), compat.version_of(tensor)  # detached: an output would hold itself

    def restore(self) -> torch.Tensor:
        if compat.version_of(self.tensor) != self.version:
            raise RuntimeError(_CHANGED)
        return self.tensor


_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation, inside of a layer "
    "under sequence_parallel_regather=True. Without that option, torch.autograd.set_detect_anomaly(True) shows where."
)


def saving_shards(find: Callable[[torch.Tensor], SavedShards | None]) -> AbstractContextManager[Any]:
    """Context of a forward: of a saved tensor for which ``find`` names its source, nothing is kept but that."""

    def pack(tensor: torch.Tensor) -> _Place | _Kept:
        source = find(tensor)
        return _Kept(tensor) if source is None else _Place(source, tensor)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.restore())


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors, both alive, share their memory and type of numbers."""
    return a.dtype == b.dtype and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
