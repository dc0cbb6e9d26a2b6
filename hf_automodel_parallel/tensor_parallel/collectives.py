"""The collectives of tensor parallelism, as autograd functions that torch.compile can trace.

Each takes a tensor that is a plain local tensor on every rank of ``group``. The pairs of forward and backward are those of
Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import compat

funcol = compat.functional_collectives()


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup, operation: str = "sum") -> torch.Tensor:
    """Sum (or "max") over ``group``, out of place, without autograd. Shape and dtype are kept."""
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), operation, group))


def _all_gather_last(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return compat.all_gather_dim(x.contiguous(), x.ndim - 1, group)


def _own_slice(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    width = x.shape[-1] // size
    return x.narrow(-1, rank * width, width).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
        ctx.rank, ctx.size = rank, size
        return _all_gather_last(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _own_slice(gradient, ctx.rank, ctx.size), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
        ctx.group = group
        return _own_slice(x, rank, size)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _all_gather_last(gradient, ctx.group), None, None, None


def copy_to_tp(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Hand a replicated activation to sharded consumers: identity forward, all-reduce backward.

    Costs nothing when no gradient flows to ``x``: it is then returned as it is.
    """
    return _Copy.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x


def reduce_from_tp(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Turn per-rank summands into the replicated sum: all-reduce forward, identity backward."""
    return _Reduce.apply(x, group)


def gather_from_tp(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """Turn shards of the last dim ``(..., n / size)`` into the replicated whole ``(..., n)``; backward takes the own slice."""
    return _Gather.apply(x, group, rank, size)


def split_to_tp(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """Take this rank's slice ``(..., n / size)`` of a replicated activation ``(..., n)``; backward all-gathers."""
    return _Split.apply(x, group, rank, size)
