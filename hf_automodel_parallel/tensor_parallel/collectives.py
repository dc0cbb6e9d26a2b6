"""The collectives of tensor parallelism, as autograd functions that torch.compile can trace.

Each takes a tensor that is a plain local tensor on every rank of ``group``. The pairs of forward and backward are those
of Megatron-LM: f is :func:`copy_to_tp`, g is :func:`reduce_from_tp` (Shoeybi et al., 2019, arXiv:1909.08053,
section 3), and the same along the sequence (Korthikanti et al., 2022, arXiv:2205.05198, section 4.2).
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
    # Process groups take contiguous memory only; activations are often views (of heads, of a slice of the sequence).
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), operation, group))


def _all_gather_last(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if isinstance(group, ThreadGroup):
        return group.all_gather(x, x.ndim - 1)
    return compat.all_gather_dim(x.contiguous(), x.ndim - 1, group)


def _own_slice(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    # Contiguous, because a view would keep the full tensor alive for as long as the slice is saved.
    width = x.shape[-1] // size
    return x.narrow(-1, rank * width, width).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        # An object of its own: consumers of the copy are told from those of the original by identity (SharedInputs).
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
    """Copy a replicated activation to sharded consumers (Megatron's f): identity forward, all-reduce backward.

    Without a gradient for ``x`` it is returned as it is.
    """
    return _Copy.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x


def reduce_from_tp(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Partial -> Replicate (Megatron's g): all-reduce forward, identity backward."""
    return _Reduce.apply(x, group)


def gather_from_tp(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """Shard ``(..., n / size)`` -> Replicate ``(..., n)``: all-gather of the last dim, backward takes the own slice."""
    return _Gather.apply(x, group, rank, size)


def split_to_tp(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """Replicate ``(..., n)`` -> Shard ``(..., n / size)``: this rank's slice of the last dim, backward all-gathers."""
    return _Split.apply(x, group, rank, size)


class _ColumnsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
        ctx.group, ctx.size, ctx.rows = group, size, len(x)
        count = -(-len(x) // size)
        parts = _all_to_all(_padded_rows(x, count * size), group).view(size, count, x.shape[1])
        own = max(0, min(count, len(x) - rank * count))
        return parts[:, :own].transpose(0, 1).reshape(own, size * x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        count = -(-ctx.rows // ctx.size)
        parts = _padded_rows(gradient, count).view(count, ctx.size, -1).transpose(0, 1).contiguous()
        return _all_to_all(parts.flatten(0, 1), ctx.group)[: ctx.rows], None, None, None


def _padded_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x))).contiguous()


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    result = torch.empty_like(x)
    dist.all_to_all_single(result, x, group=group)
    return result


def columns_to_rows(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """A matrix sharded by columns, ``(rows, n / size)`` -> the same sharded by rows, ``(ceil(rows / size), n)``.

    The last ranks have fewer rows if ``size`` does not divide them. One all-to-all, and one in backward.
    """
    return _ColumnsToRows.apply(x, group, rank, size)


# ---- along the sequence (dimension 1) --------------------------------------------------------------------------------
#
# Every rank's sequence shard has ceil(length / size) tokens. Padding at the end is added and removed in this section
# only. Activations are padded with their last token, which a norm can divide by like any other; gradients with zeros,
# so that padding contributes to no parameter.


def _pad(x: torch.Tensor, size: int, zeros: bool = False) -> torch.Tensor:
    missing = -x.shape[1] % size
    if missing == 0:
        return x
    last = x[:, -1:].expand(x.shape[0], missing, *x.shape[2:])
    return torch.cat([x, torch.zeros_like(last) if zeros else last], dim=1)


def _all_gather_tokens(x: torch.Tensor, group: dist.ProcessGroup, length: int) -> torch.Tensor:
    full = compat.all_gather_dim(x.contiguous(), 1, group)
    return full if full.shape[1] == length else full[:, :length].contiguous()


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
            ctx.set_materialize_grads(False)  # partial_view() may have taken the entire gradient to the shard
        return _all_gather_tokens(x, group, length)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None, None, None]:
        if gradient is None:
            return None, None, None, None, None
        return _own_tokens(_pad(gradient, ctx.size, zeros=True), ctx.rank, ctx.size), None, None, None, None


class _PartialView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, full: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        # full has no history here (partial_view detaches it), so the gradient reaches the graph through shard alone.
        return full.view_as(full)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _reduce_scatter_tokens(_pad(gradient, ctx.size, zeros=True), ctx.group), None, None, None


class _WatchedView(torch.autograd.Function):
    """:class:`_PartialView` that is connected with ``full`` as well, in case the user looks at its gradient."""

    @staticmethod
    def forward(
        ctx: Any, shard: torch.Tensor, full: torch.Tensor, group: dist.ProcessGroup, size: int, *seen: TensorWeakRef
    ) -> torch.Tensor:
        ctx.group, ctx.size, ctx.seen = group, size, seen
        return full.view_as(full)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # Asked in backward, because hooks are registered after forward. The references are weak, because the tensors'
        # own graph holds this node.
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
    """Sequence shards ``(batch, ceil(length / size), ...)`` -> the full sequence ``(batch, length, ...)``, for
    consumers whose gradient is replicated: backward takes the own shard."""
    return _GatherSequence.apply(x, group, rank, size, length)


def is_gathered(x: torch.Tensor) -> bool:
    """True if ``x`` is, unchanged, what :func:`gather_sequence` returned."""
    return type(x.grad_fn).__name__ == f"{_GatherSequence.__name__}Backward"


def partial_view(shard: torch.Tensor, full: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
    """``full``, as gathered from ``shard``, for consumers whose gradients are Partial: backward reduce-scatters.

    No communication and no memory in forward.
    """
    if not (torch.is_grad_enabled() and shard.requires_grad):
        return full.detach()
    return _PartialView.apply(shard, full.detach(), group, size)


def watched_view(
    shard: torch.Tensor, full: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup, size: int
) -> torch.Tensor:
    """:func:`partial_view` of ``x``, a plain view of ``full``, for a ``full`` that the model returns to its caller.

    If one of the two is watched (:func:`is_watched`) at the time of the backward, the gradient is all-reduced and flows
    through them.
    """
    if not (torch.is_grad_enabled() and shard.requires_grad):
        return x.detach()
    seen = [TensorWeakRef(tensor) for tensor in ((full,) if x is full else (full, x))]
    return _WatchedView.apply(shard, x, group, size, *seen)


#: Packages whose hooks on the gradient of an activation only note that it has arrived.
_INDIFFERENT = (__name__.partition(".")[0], "torch.distributed.fsdp")


def is_watched(x: torch.Tensor) -> bool:
    """True if the gradient of ``x`` has a hook of the user, or is retained."""
    return x.retains_grad or any(
        not str(getattr(hook, "__module__", "")).startswith(_INDIFFERENT) for hook in compat.gradient_hooks(x)
    )


def scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
    """Partial ``(batch, length, ...)`` -> sequence shards ``(batch, ceil(length / size), ...)`` of the sum:
    reduce-scatter forward, all-gather backward."""
    return _ScatterSequence.apply(x, group, size)


def split_sequence(x: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
    """Replicate ``(batch, length, ...)`` -> this rank's sequence shard ``(batch, ceil(length / size), ...)``; backward
    all-gathers."""
    return _SplitSequence.apply(x, group, rank, size)
