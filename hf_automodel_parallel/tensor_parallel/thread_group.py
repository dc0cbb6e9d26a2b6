"""A process group whose ranks are threads."""

from __future__ import annotations

import threading
from typing import Any

import torch

#: Seconds that a rank waits for the others; they run on the same small model.
_PATIENCE = 120.0


class ThreadGroup:
    """One rank's view of a group of threads.

    Args:
        rank: its rank.
        size: number of ranks.
        barrier: where all of them meet.
        slots: what each of them brings.
    """

    device_type = "cpu"

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self._size, self._barrier, self._slots = rank, size, barrier, slots

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each rank brings, in the order of ranks."""
        self._slots[self.rank] = x.detach()
        self._barrier.wait(_PATIENCE)
        values = list(self._slots)
        self._barrier.wait(_PATIENCE)
        return values

    def all_reduce(self, x: torch.Tensor, operation: str) -> torch.Tensor:
        """The sum (or "max") over the ranks, the same bits on each."""
        values = torch.stack(self.exchange(x))
        return values.sum(0) if operation == "sum" else values.amax(0)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all ranks along ``dim``."""
        return torch.cat(self.exchange(x), dim)

    # What the boundaries ask of a mesh of one axis.

    def get_group(self) -> ThreadGroup:
        """Itself: the axis has no other dimension."""
        return self

    def get_local_rank(self) -> int:
        """The rank."""
        return self.rank

    def size(self) -> int:
        """The number of ranks."""
        return self._size
