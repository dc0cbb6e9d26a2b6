"""A process group whose ranks are threads of one process, for numerical checks of a plan on a tiny proxy model.

Its own module, below the collectives: they dispatch on it, and the plan search runs on it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

#: Seconds that a rank waits for the others, which run the same tiny model.
_PATIENCE = 120.0


class ThreadGroup:
    """One rank's view of a group of threads.

    Args:
        rank: its rank.
        size: number of ranks.
        barrier: shared by the threads, for ``size`` parties.
        slots: shared by the threads, one item for each rank.
    """

    device_type = "cpu"

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self._size, self._barrier, self._slots = rank, size, barrier, slots

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in the order of ranks."""
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
        """The tensors of all ranks, concatenated along ``dim``."""
        return torch.cat(self.exchange(x), dim)

    # The methods of a 1-D device mesh that TP hooks call.

    def get_group(self) -> ThreadGroup:
        """The group of the only axis: itself."""
        return self

    def get_local_rank(self) -> int:
        """The rank."""
        return self.rank

    def size(self) -> int:
        """The number of ranks."""
        return self._size
