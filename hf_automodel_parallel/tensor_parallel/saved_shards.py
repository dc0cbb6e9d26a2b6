"""Save this rank's sequence shard of an all-gathered activation, and re-all-gather it in backward.

Under sequence parallelism the inputs of attention and MLP are all-gathered, and the column-wise layers save the full
sequence for the gradients of their weights, which costs the memory that sharded norms and residuals have saved
(Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2, re-all-gather for this reason). With these hooks only the
shard is saved. Backward all-gathers it once for all consumers, and drops it after the last of them.

It works by hooks on the tensors that autograd saves, so it covers every consumer of the activation: projections,
adapters, a router. Compiled layers have no such hooks; there the compiler recomputes the all-gathers, see
:func:`~..activation_checkpointing.gathering_contexts`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import compat


class SavedShards:
    """One all-gathered activation.

    Attributes:
        shard: the sequence shard that it was gathered from.
        gather: shard -> full sequence, contiguous; collective. The backwards of all ranks call it in the same order.
        waiting: number of saved views that backward has not restored yet.
        full: the re-all-gathered activation, while views are waiting.
    """

    def __init__(self, shard: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.shard, self.gather = shard.detach(), gather
        self.version = compat.version_of(self.shard)
        self.waiting = 0
        self.full: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """The full activation, for one of the saved views.

        Raises:
            RuntimeError: the shard was modified in place.
        """
        if compat.version_of(self.shard) != self.version:
            raise RuntimeError(_MODIFIED)
        full = self.full
        if full is None:
            with torch.no_grad():
                full = self.gather(self.shard)
        self.waiting -= 1
        # In a second backward through the same graph no views are waiting, and each restored view gathers anew.
        self.full = full if self.waiting > 0 else None
        return full


class _SavedView:
    """A view of an all-gathered activation, saved by one consumer."""

    def __init__(self, source: SavedShards, view: torch.Tensor) -> None:
        self.source = source
        self.shape, self.strides, self.offset = view.shape, view.stride(), view.storage_offset()
        source.waiting += 1

    def restore(self) -> torch.Tensor:
        return self.source.take().as_strided(self.shape, self.strides, self.offset)


class _SavedTensor:
    """Any other saved tensor. With hooks autograd does not check for modifications in place, so this class does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor.detach(), compat.version_of(tensor)  # detached: an output would hold itself

    def restore(self) -> torch.Tensor:
        if compat.version_of(self.tensor) != self.version:
            raise RuntimeError(_MODIFIED)
        return self.tensor


_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation, inside of a layer "
    "under sequence_parallel_regather=True. Without that option, torch.autograd.set_detect_anomaly(True) shows where."
)


def saving_shards(find: Callable[[torch.Tensor], SavedShards | None]) -> AbstractContextManager[Any]:
    """Context of a forward: if ``find`` finds the source of a saved tensor, only the source is saved."""

    def pack(tensor: torch.Tensor) -> _SavedView | _SavedTensor:
        source = find(tensor)
        return _SavedTensor(tensor) if source is None else _SavedView(source, tensor)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.restore())


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors, both alive, have the same memory and dtype."""
    return a.dtype == b.dtype and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
