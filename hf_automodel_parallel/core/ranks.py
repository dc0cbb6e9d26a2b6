"""Ranks that agree on errors and on values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..errors import PrepareError


@contextmanager
def raise_on_all_ranks(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on every rank; if any rank raises, all of them do, so that none waits for another one.

    Args:
        what: what is being done, for the message on the ranks that had no error of their own.
        group: the ranks that have to agree; None means all.

    Raises:
        PrepareError: another rank failed; its rank and message are quoted.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        rank, message = failed[0]
        raise PrepareError(f"{what} failed on rank {rank} (and {len(failed) - 1} others): {message}")


@torch.no_grad()
def broadcast_from_rank_zero(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite ``tensor`` with rank 0's value, through the device that the process group needs."""
    device = communication_device()
    moved = tensor.detach().to(device).contiguous()
    dist.broadcast(moved, group_src=0, group=group)
    tensor.copy_(moved)


def communication_device() -> torch.device:
    """Where the process group wants its tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
