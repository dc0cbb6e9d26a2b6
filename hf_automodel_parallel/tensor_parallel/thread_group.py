"""A process group whose ranks are threads of one process; the plan search runs on it.

It is its own module because the collectives dispatch on it: they import it, and it imports none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..errors import PlanError

#: Seconds that a rank waits for the others, which run the same small model.
_TIMEOUT = 120.0


class ThreadGroup:
    """One rank's view of a group of threads.

    Args:
        rank: its rank.
        size: number of ranks.
        barrier: barrier of all ranks.
        slots: one slot per rank, for the tensor that it sends.
    """

    device_type = "cpu"

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self._size, self._barrier, self._slots = rank, size, barrier, slots

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The ``x`` of each rank, in the order of ranks."""
        self._slots[self.rank] = x.detach()
        self._barrier.wait(_TIMEOUT)
        values = list(self._slots)
        # Again, or a fast rank would overwrite its slot before the others have read it.
        self._barrier.wait(_TIMEOUT)
        return values

    def all_reduce(self, x: torch.Tensor, operation: str) -> torch.Tensor:
        """The sum (or "max") over the ranks, the same bits on each."""
        values = torch.stack(self.exchange(x))
        return values.sum(0) if operation == "sum" else values.amax(0)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The ``x`` of all ranks, concatenated along ``dim``."""
        return torch.cat(self.exchange(x), dim)

    # The methods of a one-dimensional device mesh that the TP hooks use.

    def get_group(self) -> ThreadGroup:
        """Itself: the mesh has one dimension."""
        return self

    def get_local_rank(self) -> int:
        """The rank."""
        return self.rank

    def size(self) -> int:
        """The number of ranks."""
        return self._size


def run_ranks(size: int, function: Callable[[ThreadGroup], Any]) -> list[Any]:
    """Call ``function`` on ``size`` threads at once and return what each returned.

    Raises:
        Exception: the first one that a rank raised by itself; the other ranks, which wait for it, are released.
        PlanError: some ranks run fewer collectives than others.
    """
    barrier, slots = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(rank, size, barrier, slots))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # of the model's code, which may raise anything
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _TIMEOUT)
    if errors:
        raise errors[0]
    if barrier.broken or any(thread.is_alive() for thread in threads):
        raise PlanError("the simulated ranks do not run the same collectives.")
    return results
