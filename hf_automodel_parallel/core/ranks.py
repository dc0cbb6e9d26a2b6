"""Collectives on Python objects and small tensors: gather, compare, broadcast, and raise on all ranks.

In a process without a process group the functions on objects return immediately; those on tensors need a process group.
For a barrier with a timeout see :mod:`~hf_automodel_parallel.core.rendezvous`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ..errors import AutoParallelError, PrepareError
from .error_report import print_once

T = TypeVar("T")
X = TypeVar("X", bound=BaseException)


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in ``group`` (None: all processes), 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks of ``group`` (None: all processes), 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """All-gather ``value`` (picklable). Returns the values in the order of ranks. Collective over ``group``."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_tensors(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """All-gather ``tensor``, of equal shape and dtype on all ranks. Collective over ``group``.

    Returns:
        (world size, *shape), on :func:`communication_device`.
    """
    mine = tensor.to(communication_device())
    gathered = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    return torch.stack(gathered)


def broadcast_object(value: T, group: dist.ProcessGroup | None = None, source: int = 0) -> T:
    """Return the ``value`` (picklable) of rank ``source`` of ``group`` on all ranks. Collective over ``group``."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=source, group=group)
    return box[0]


@torch.no_grad()
def broadcast_from_rank_zero(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite ``tensor`` in place with rank 0's value. Collective over ``group``.

    ``tensor`` may be on any device and need not be contiguous; it is copied to :func:`communication_device` and back.
    """
    device = communication_device()
    moved = tensor.detach().to(device).contiguous()
    dist.broadcast(moved, group_src=0, group=group)
    tensor.copy_(moved)


def communication_device() -> torch.device:
    """The device that the default process group needs: the current CUDA device for NCCL, else the CPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Difference(NamedTuple, Generic[T]):
    """The result of :func:`difference`, the same on all ranks: the ranks whose value differs from rank 0's.

    Attributes:
        ranks: all ranks with a value other than rank 0's, ascending.
        reference: rank 0's value.
        other: the value of ``ranks[0]``.
    """

    ranks: list[int]
    reference: T
    other: T


def difference(value: T, group: dist.ProcessGroup | None = None) -> Difference[T] | None:
    """Compare ``value`` (picklable, with ``==``) across ``group``; None if all are equal. Collective over ``group``."""
    gathered = gather_objects(value, group)
    ranks = [number for number, theirs in enumerate(gathered) if theirs != gathered[0]]
    return Difference(ranks, gathered[0], gathered[ranks[0]]) if ranks else None


# ---- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def raise_on_all_ranks(
    what: str, group: dist.ProcessGroup | None = None, raises: type[AutoParallelError] = PrepareError
) -> Iterator[None]:
    """Run the block on all ranks. If it raises on one rank, it raises on all, so that no rank waits for another one.

    The blocks may be nested, also with code of other libraries in between. A failing rank takes part in exactly one
    exchange: that of the innermost block. The other ranks receive the error at the end of their next block, the same
    one or one further out, and raise without another exchange. If their next collective is a different one, they wait
    in it forever: between two of these blocks there must be no collective that a failing rank skips.

    Args:
        what: the operation, for the message on ranks that had no error of their own.
        group: the ranks that run the block; None means all.
        raises: class of the error on those ranks.

    Raises:
        AutoParallelError: of class ``raises``, if another rank failed; the message quotes its rank and message.
    """
    error: BaseException | None = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        # The process is exiting; it must not wait in an exchange for ranks that have not been interrupted.
        raise
    except BaseException as caught:  # DCP's CheckpointException does not derive from Exception
        if _known_on(caught, group):
            raise
        error = caught
    messages = gather_objects(None if error is None else error_text(error, raises), group)
    failed = [(number, message) for number, message in enumerate(messages) if message is not None]
    if error is not None:
        raise known_to_all(error, group, failed[0][0])
    if failed:
        number, message = failed[0]
        more = len(failed) - 1
        others = f" (and {more} {'other' if more == 1 else 'others'})" if more else ""
        raise known_to_all(raises(f"{what} failed on rank {number}{others}: {message}"), group, number)


def known_to_all(error: X, group: dist.ProcessGroup | None = None, source: int = 0) -> X:
    """Mark ``error`` as raised on all ranks of ``group``: enclosing :func:`raise_on_all_ranks` do not exchange it.

    If nobody catches it, rank ``source`` of ``group`` prints it, for all of them.
    """
    # With the ranks that knew it before: blocks around may be of other groups.
    error.known_on_ranks = getattr(error, "known_on_ranks", frozenset()) | _members(group)  # type: ignore[attr-defined]
    if dist.is_initialized() and _members(None) <= _members(group):
        print_once(error, source)
    return error


def error_text(error: BaseException, plain: type[AutoParallelError]) -> str:
    """The message of ``error`` for another rank, with the name of its class unless it is a ``plain``."""
    return str(error) if isinstance(error, plain) else f"{type(error).__name__}: {error}"


def _known_on(error: BaseException, group: dist.ProcessGroup | None) -> bool:
    return _members(group) <= getattr(error, "known_on_ranks", frozenset())


def _members(group: dist.ProcessGroup | None) -> frozenset[int]:
    if not dist.is_initialized():
        return frozenset({0})
    return frozenset(dist.get_process_group_ranks(group or dist.group.WORLD))
