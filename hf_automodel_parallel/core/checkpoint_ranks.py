"""Ranks that save and load together: errors on one become errors on all, before any of them waits for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import CheckpointError

T = TypeVar("T")


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def everyone_tells(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The ``value`` of each rank; collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def rank_zero_tells(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's ``value`` on all ranks; collective."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


@contextmanager
def agreed(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on every rank; if it raises on any of them, all raise.

    Such blocks may be nested, and code that is not ours may stand between them: a rank that fails leaves them all with
    its first error and takes part in exactly one exchange on the way; the others learn of it at their next exchange,
    whichever that is, and leave without another one. So between two of these blocks there must be no collective that a
    failing rank leaves out.

    Args:
        what: what is being done, for the ranks that had no error of their own.
        group: the ranks that do it; None means all.

    Raises:
        CheckpointError: another rank failed; its rank and message are quoted.
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:
        if getattr(caught, "everyone_knows", False):
            raise
        error = caught
    messages = everyone_tells(None if error is None else _message(error), group)
    if error is not None:
        error.everyone_knows = True  # type: ignore[attr-defined]
        raise error
    failed = [(number, message) for number, message in enumerate(messages) if message is not None]
    if failed:
        number, message = failed[0]
        others = f" (and {len(failed) - 1} others)" if len(failed) > 1 else ""
        raise known_to_all(CheckpointError(f"{what} failed on rank {number}{others}: {message}"))


def known_to_all(error: CheckpointError) -> CheckpointError:
    """Mark an error that all ranks raise, so that no block around tells them again."""
    error.everyone_knows = True  # type: ignore[attr-defined]
    return error


def from_dcp(error: CheckpointException, what: str) -> CheckpointError:
    """What went wrong inside of DCP, which gathers the errors of all ranks and raises a ``BaseException`` on each."""
    number, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, CheckpointError) and len(error.failures) == world_size():
        return known_to_all(CheckpointError(str(cause)))
    return known_to_all(CheckpointError(f"{what} failed on rank {number}: {_message(cause)}"))


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
