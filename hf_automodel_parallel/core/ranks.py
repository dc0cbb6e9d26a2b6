"""Collectives of Python values and small tensors: raise on all ranks, compare a value on all ranks, broadcast rank 0's.

What takes a ``group`` is collective over it. In a process without a process group the collectives of Python values
return at once; those of tensors need one. For a barrier with a timeout see
:mod:`~hf_automodel_parallel.core.rendezvous`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ..errors import AutoParallelError, PrepareError

T = TypeVar("T")
X = TypeVar("X", bound=BaseException)


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in ``group`` (None: all processes), 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks of ``group`` (None: all processes), 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The ``value`` of each rank, in the order of ranks, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_tensors(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The ``tensor`` of each rank, stacked, as (world size, *shape) on all ranks, on the process group's device."""
    mine = tensor.to(communication_device())
    everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone)


def broadcast_object(value: T, group: dist.ProcessGroup | None = None, source: int = 0) -> T:
    """Rank ``source``'s (a rank of ``group``) value on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=source, group=group)
    return box[0]


@torch.no_grad()
def broadcast_from_rank_zero(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite ``tensor`` with rank 0's value, through the device that the process group needs."""
    device = communication_device()
    moved = tensor.detach().to(device).contiguous()
    dist.broadcast(moved, group_src=0, group=group)
    tensor.copy_(moved)


def communication_device() -> torch.device:
    """The device of tensors in collectives of the default process group."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Difference(NamedTuple, Generic[T]):
    """Ranks whose value is not rank 0's; the same on all ranks.

    Attributes:
        ranks: all ranks with a value other than rank 0's, ascending.
        reference: rank 0's value.
        other: the value of ``ranks[0]``.
    """

    ranks: list[int]
    reference: T
    other: T


def difference(value: T, group: dist.ProcessGroup | None = None) -> Difference[T] | None:
    """Compare ``value`` (picklable, with ``==``) on all ranks of ``group``; None if it is equal."""
    everyone = gather_objects(value, group)
    ranks = [number for number, theirs in enumerate(everyone) if theirs != everyone[0]]
    return Difference(ranks, everyone[0], everyone[ranks[0]]) if ranks else None


# ---- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def raise_on_all_ranks(
    what: str, group: dist.ProcessGroup | None = None, raises: type[AutoParallelError] = PrepareError
) -> Iterator[None]:
    """Run the block on every rank; if it raises on any of them, all raise, so that no rank waits for another one.

    Such blocks may be nested, and code of other libraries may stand between them. A rank that fails takes part in
    exactly one exchange on its way out: that of the innermost block. The other ranks learn of the error at the end of
    their next block, be it that one or one further out, and leave without another exchange. If their next collective
    is another one, they wait in it forever: so between two of these blocks there must be no collective that a failing
    rank leaves out.

    Args:
        what: what is being done, for the message on the ranks that had no error of their own.
        group: the ranks that run the block; None means all.
        raises: class of the error on those ranks.

    Raises:
        AutoParallelError: ``raises``, if another rank failed; its rank and message are quoted.
    """
    error: BaseException | None = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as caught:  # DCP's CheckpointException does not derive from Exception
        if _known_on(caught, group):
            raise
        error = caught
    messages = gather_objects(None if error is None else error_text(error, raises), group)
    if error is not None:
        raise known_to_all(error, group)
    failed = [(number, message) for number, message in enumerate(messages) if message is not None]
    if failed:
        number, message = failed[0]
        more = len(failed) - 1
        others = f" (and {more} {'other' if more == 1 else 'others'})" if more else ""
        raise known_to_all(raises(f"{what} failed on rank {number}{others}: {message}"), group)


def known_to_all(error: X, group: dist.ProcessGroup | None = None) -> X:
    """Mark an error that all ranks of ``group`` raise, so that no :func:`raise_on_all_ranks` around exchanges it."""
    error.known_on_ranks = _members(group)  # type: ignore[attr-defined]
    return error


def error_text(error: BaseException, plain: type[AutoParallelError]) -> str:
    """The message of ``error`` for another rank; with its class, unless that is ``plain``."""
    return str(error) if isinstance(error, plain) else f"{type(error).__name__}: {error}"


def _known_on(error: BaseException, group: dist.ProcessGroup | None) -> bool:
    return _members(group) <= getattr(error, "known_on_ranks", frozenset())


def _members(group: dist.ProcessGroup | None) -> frozenset[int]:
    if not dist.is_initialized():
        return frozenset({0})
    return frozenset(dist.get_process_group_ranks(group or dist.group.WORLD))
