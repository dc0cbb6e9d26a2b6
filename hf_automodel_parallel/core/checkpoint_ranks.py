"""Errors and values of ranks that save and load together."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import CheckpointError
from .ranks import broadcast_object as rank_zero_tells
from .ranks import error_text, known_to_all, raise_on_all_ranks, rank, world_size
from .ranks import gather_objects as everyone_tells

__all__ = ["agreed", "everyone_tells", "from_dcp", "known_to_all", "rank", "rank_zero_tells", "world_size"]


def agreed(what: str, group: dist.ProcessGroup | None = None) -> AbstractContextManager[None]:
    """:func:`raise_on_all_ranks` with a :class:`CheckpointError`."""
    return raise_on_all_ranks(what, group, CheckpointError)


def from_dcp(error: CheckpointException, what: str) -> CheckpointError:
    """What went wrong inside of DCP, which gathers the errors of all ranks and raises a ``BaseException`` on each."""
    number, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, CheckpointError) and len(error.failures) == world_size():
        return known_to_all(CheckpointError(str(cause)))
    return known_to_all(CheckpointError(f"{what} failed on rank {number}: {error_text(cause, CheckpointError)}"))
