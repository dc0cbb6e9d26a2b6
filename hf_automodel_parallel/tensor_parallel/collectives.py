"""The collectives of tensor parallelism, as autograd functions that torch.compile can trace.

Each takes a tensor that is a plain local tensor on every rank of ``group``. The pairs of forward and backward are those
of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import TensorWeakRef

from .. import compat
from .thread_group import ThreadGroup

funcol = compat.functional_collectives()


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup, operation: str = "sum") -> torch.Tensor:
    """Sum (or "max") over ``group``, out of place, without autograd. Shape and dtype are kept."""
    if isinstance(group, ThreadGroup):
        return group.all_reduce(x, operation)
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), operation, group))


def _all_gather_last(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if isinstance(group, ThreadGroup):
        return group.all_gather(x, x.ndim - 1)
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
    """Turn shards of the last dim ``(..., n / size)`` into the replicated whole ``(..., n)``; backward takes the own
    slice.
    """
    return _Gather.apply(x, group, rank, size)


def split_to_tp(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """Take this rank's slice ``(..., n / size)`` of a replicated activation ``(..., n)``; backward all-gathers."""
    return _Split.apply(x, group, rank, size)


# ---- along the sequence (dimension 1)
# ------------------------------------------------------------------------------------
#
# Every rank's share has ceil(length / size) tokens. What is missing at the end is padded in here and cut in here, so
# nobody else meets it. Activations are padded with their last token, which is as harmless to a norm as any other token;
# gradients with zeros, so that padding contributes to no parameter.


def _pad(x: torch.Tensor, size: int, zeros: bool = False) -> torch.Tensor:
    missing = -x.shape[1] % size
    if missing == 0:
        return x
    last = x[:, -1:].expand(x.shape[0], missing, *x.shape[2:])
    return torch.cat([x, torch.zeros_like(last) if zeros else last], dim=1)


def _all_gather_tokens(x: torch.Tensor, group: dist.ProcessGroup, length: int) -> torch.Tensor:
    whole = compat.all_gather_dim(x.contiguous(), 1, group)
    return whole if whole.shape[1] == length else whole[:, :length].contiguous()


def _reduce_scatter_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return compat.reduce_scatter_dim(x.contiguous(), 1, group)


def _own_tokens(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    tokens = x.shape[1] // size
    return x.narrow(1, rank * tokens, tokens).contiguous()


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int, length: int) -> torch.Tensor:
        ctx.rank, ctx.size = rank, size
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # all that reaches it may have gone to the share directly
        return _all_gather_tokens(x, group, length)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None, None]:  # type: ignore[override]
        if gradient is None:
            return None, None, None, None, None
        return _own_tokens(_pad(gradient, ctx.size, zeros=True), ctx.rank, ctx.size), None, None, None, None


class _PartialView(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, share: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup, size: int
    ) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _reduce_scatter_tokens(_pad(gradient, ctx.size, zeros=True), ctx.group), None, None, None


class _WatchedView(torch.autograd.Function):
    """:class:`_PartialView` that is connected with ``whole`` as well, for the case that somebody looks at its
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, share: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup, size: int, *seen: TensorWeakRef
    ) -> torch.Tensor:
        ctx.group, ctx.size, ctx.seen = group, size, seen
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        unused = (None,) * (2 + len(ctx.seen))
        if any(x is not None and is_watched(x) for x in (reference() for reference in ctx.seen)):
            return None, all_reduce(gradient, ctx.group), *unused
        return _reduce_scatter_tokens(_pad(gradient, ctx.size, zeros=True), ctx.group), None, *unused


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        return _reduce_scatter_tokens(_pad(x, size), group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _all_gather_tokens(gradient, ctx.group, ctx.length), None, None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        return _own_tokens(_pad(x, size), rank, size)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _all_gather_tokens(gradient, ctx.group, ctx.length), None, None, None


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int, length: int) -> torch.Tensor:
    """Turn shares ``(batch, ceil(length / size), ...)`` into the whole ``(batch, length, ...)``, for consumers whose
    gradient is the same on all ranks: backward takes the own share."""
    return _GatherSequence.apply(x, group, rank, size, length)


def is_gathered(x: torch.Tensor) -> bool:
    """True if ``x`` is, unchanged, what :func:`gather_sequence` returned."""
    return type(x.grad_fn).__name__ == f"{_GatherSequence.__name__}Backward"


def partial_view(share: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
    """``whole``, as gathered from ``share``, for consumers whose gradients are summands: backward reduce-scatters.

    No communication and no memory in forward.
    """
    if not (torch.is_grad_enabled() and share.requires_grad):
        return whole.detach()
    return _PartialView.apply(share, whole.detach(), group, size)


def watched_view(
    share: torch.Tensor, whole: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup, size: int
) -> torch.Tensor:
    """:func:`partial_view` of ``x``, a plain view of ``whole``, for a ``whole`` that the model's caller can see.

    If one of the two is watched by the time of the backward, the gradient takes the way through them, complete.
    """
    if not (torch.is_grad_enabled() and share.requires_grad):
        return x.detach()
    seen = [TensorWeakRef(tensor) for tensor in ((whole,) if x is whole else (whole, x))]
    return _WatchedView.apply(share, x, group, size, *seen)


#: Packages whose hooks on a gradient of an activation ask whether one comes, and do not look at it.
_INDIFFERENT = (__name__.partition(".")[0], "torch.distributed.fsdp")


def is_watched(x: torch.Tensor) -> bool:
    """True if somebody has put a hook on the gradient of ``x``, or wants it kept."""
    return x.retains_grad or any(
        not str(getattr(hook, "__module__", "")).startswith(_INDIFFERENT) for hook in compat.gradient_hooks(x)
    )


def scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
    """Turn per-rank summands ``(batch, length, ...)`` into shares ``(batch, ceil(length / size), ...)`` of their sum:
    reduce-scatter forward, all-gather backward."""
    return _ScatterSequence.apply(x, group, size)


def split_sequence(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """Take this rank's share ``(batch, ceil(length / size), ...)`` of a replicated activation ``(batch, length, ...)``;
    backward all-gathers."""
    return _SplitSequence.apply(x, group, rank, size)
