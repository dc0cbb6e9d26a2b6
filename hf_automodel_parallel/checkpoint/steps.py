"""Errors of saving and loading: an error on one rank raises on all ranks.

At the end of a :func:`checkpoint_step` the ranks exchange whether they failed, so no rank waits in a later collective.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..core.ranks import error_text, known_to_all, raise_on_all_ranks, world_size
from ..errors import CheckpointError


def checkpoint_step(what: str, group: dist.ProcessGroup | None = None) -> AbstractContextManager[None]:
    """:func:`raise_on_all_ranks` whose error on the other ranks is a :class:`CheckpointError`."""
    return raise_on_all_ranks(what, group, CheckpointError)


def from_dcp(error: CheckpointException, what: str) -> CheckpointError:
    """The cause of DCP's ``CheckpointException``, which DCP raises on every rank with the failures of all ranks."""
    number, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, CheckpointError) and len(error.failures) == world_size():
        return known_to_all(CheckpointError(str(cause)))
    return known_to_all(CheckpointError(f"{what} failed on rank {number}: {error_text(cause, CheckpointError)}"))
