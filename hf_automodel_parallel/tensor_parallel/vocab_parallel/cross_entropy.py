"""Cross entropy and its relatives on logits that are sharded over the vocabulary.

No rank ever holds a full row. For each row the ranks exchange three numbers: its maximum, the sum of its exponentials,
and the logit of its target. The gradient needs no more than these: softmax minus one-hot, on the own slice of the
vocabulary (Megatron-LM, Shoeybi et al., 2019, arXiv:1909.08053, section 3). Rows are processed in chunks, so that
float32 logits exist for one chunk only, and backward recomputes the softmax instead of saving it (the idea of Liger's
chunked loss, Hsu et al., 2024, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ... import compat
from ..collectives import all_reduce

#: Bytes that the float32 logits of one chunk may take where the user gives no number of rows.
DEFAULT_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Vocabulary:
    """How the last dimension is sharded.

    Attributes:
        group: the ranks that hold the slices, in order.
        rank, size: this rank's coordinate in the group, and the number of ranks.
        chunk_rows: rows (tokens) whose logits are in float32 at a time; None: as many as fit in 64 MiB.
        start: first class of this rank's slice; None: the slices are equally wide.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    chunk_rows: int | None = None
    start: int | None = None

    def chunks(self, rows: int, width: int, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Iterator[slice]:
        """Slices over ``rows`` rows of logits of ``width`` classes; none where the slice is empty."""
        if width == 0:
            return iter(())
        step = self.chunk_rows or max(1, chunk_bytes // (4 * width))
        return (slice(start, start + step) for start in range(0, rows, step))

    def own(self, index: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the own slice, of ``width`` classes; negative or too large for those in other slices. And a mask
        of those in the own slice.
        """
        local = index - (self.rank * width if self.start is None else self.start)
        return local, (local >= 0) & (local < width)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of maxima, sums and losses inside: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _own(index: torch.Tensor, width: int, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in the own slice (0 for those in other slices), and a mask of those in the own slice."""
    local, mine = vocabulary.own(index, width)
    return local.masked_fill(~mine, 0), mine


class _RowStatistics(torch.autograd.Function):
    """(rows, width) -> log of the sum of exponentials, logit of the target, sum of the logits: each (rows,),
    replicated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor | None,
        with_sum: bool,
        vocabulary: Vocabulary,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        dtype = computing_dtype(logits.dtype)
        rows, width = logits.shape
        index, mine = _own(target, width, vocabulary) if target is not None else (None, None)
        top = logits.new_empty(rows, dtype=dtype)
        # One tensor for all sums, so that they take one all-reduce.
        sums = logits.new_empty(1 + (target is not None) + with_sum, rows, dtype=dtype)
        for part in vocabulary.chunks(rows, width):
            x = logits[part].to(dtype)
            # Finite, also where all of the slice is masked with -inf: the exponentials are then 0, not nan.
            top[part] = x.amax(-1).clamp_(min=torch.finfo(dtype).min)
            if index is not None and mine is not None:
                sums[1, part] = x.gather(-1, index[part, None]).squeeze(-1).masked_fill_(~mine[part], 0)
            if with_sum:
                sums[-1, part] = x.sum(-1)
            sums[0, part] = (x - top[part, None]).exp_().sum(-1)
        highest = all_reduce(top, vocabulary.group, "max")
        # From this rank's maximum to that of the row: only then do the sums of the ranks add up.
        sums[0] *= (top - highest).exp_()
        sums = all_reduce(sums, vocabulary.group)
        total = sums[0].log().add_(highest)
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(logits, total, index, mine)
        ctx.set_materialize_grads(False)
        return total, sums[1] if target is not None else None, sums[-1] if with_sum else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, for_total: Any, for_target: Any, for_sum: Any
    ) -> tuple[torch.Tensor | None, None, None, None]:
        logits, total, index, mine = ctx.saved_tensors
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if for_target is not None:
            for_target = for_target.masked_fill(~mine, 0)
        for part in ctx.vocabulary.chunks(*logits.shape):
            x = logits[part].to(total.dtype)
            if for_total is None:
                x = torch.zeros_like(x)
            else:
                # The softmax, recomputed: saving it would take the memory of all logits in float32.
                x = (x - total[part, None]).exp_().mul_(for_total[part, None])
            if for_target is not None:
                x.scatter_add_(-1, index[part, None], for_target[part, None])
            if for_sum is not None:
                x += for_sum[part, None]
            result[part] = x
        return result, None, None, None


class _Select(torch.autograd.Function):
    """(rows, width) and positions in the full vocabulary (rows, k) -> the logits there (rows, k), replicated."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, positions: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
        index, mine = _own(positions, logits.shape[-1], vocabulary)
        ctx.save_for_backward(index, mine)
        ctx.shape = logits.shape
        return all_reduce(logits.gather(-1, index).masked_fill_(~mine, 0), vocabulary.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        index, mine = ctx.saved_tensors
        result = gradient.new_zeros(ctx.shape)
        return result.scatter_add_(-1, index, gradient.masked_fill(~mine, 0)), None, None


def _check_bounds(index: torch.Tensor, classes: int) -> None:
    """Fail for a class that does not exist, as torch does in one process: at once on CPU, else asynchronously."""
    if compat.is_fake(index):
        return
    if index.device.type == "cpu":
        wrong = index[(index < 0) | (index >= classes)]
        if wrong.numel():
            raise IndexError(f"Target {wrong[0].item()} is out of bounds: the logits have {classes} classes.")
    else:
        # An index kernel asserts on the device, like torch's own loss. Reading a value here would wait for the device.
        torch.zeros(1, device=index.device).expand(classes).gather(0, index.reshape(-1))


def logsumexp(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Log of the sum of exponentials over the full vocabulary; two small all-reduces.

    Args:
        logits: (..., V / size), this rank's slice, of any floating dtype.
        vocabulary: how the last dimension is sharded.

    Returns:
        (...), float32 (float64 for float64), equal on all ranks.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    return _RowStatistics.apply(flat, None, False, vocabulary)[0].reshape(logits.shape[:-1])


def select(logits: torch.Tensor, positions: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """``logits.gather(-1, positions)`` on the full vocabulary; one small all-reduce.

    Args:
        logits: (..., V / size), this rank's slice.
        positions: (..., k), long, in [0, V), equal on all ranks.

    Returns:
        (..., k), dtype of the logits, equal on all ranks.

    Raises:
        IndexError: a position is out of bounds (on CPU; elsewhere the device asserts).
    """
    width = logits.shape[-1]
    _check_bounds(positions, width * vocabulary.size)
    flat = positions.reshape(-1, positions.shape[-1])
    return _Select.apply(logits.reshape(-1, width), flat, vocabulary).reshape(positions.shape)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocabulary: Vocabulary,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """:func:`torch.nn.functional.cross_entropy` with class indices; two small all-reduces forward, none backward.

    The first takes the maxima of the rows, the second the sums (exponentials, target, and with smoothing the logits).

    Args:
        logits: (rows, V / size), this rank's slice, of any floating dtype.
        target: (rows,), long, in [0, V) or ``ignore_index``, equal on all ranks.
        vocabulary: how the last dimension is sharded.
        ignore_index: target of rows that do not count.
        reduction: "mean" (over the rows that count), "sum" or "none".
        label_smoothing: fraction of the target's probability that is distributed over all classes.

    Returns:
        A scalar, or (rows,) for "none"; float32 (float64 for float64), equal on all ranks.

    Raises:
        IndexError: a target is out of bounds (on CPU; elsewhere the device asserts).
    """
    classes = logits.shape[-1] * vocabulary.size
    ignored = target == ignore_index
    target = target.masked_fill(ignored, 0)
    _check_bounds(target, classes)
    total, hit, everything = _RowStatistics.apply(logits, target, label_smoothing > 0, vocabulary)
    loss = total - (hit if label_smoothing == 0 else (1 - label_smoothing) * hit)
    if everything is not None:
        loss = loss - (label_smoothing / classes) * everything
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum()
