"""What trainers ask of the logits of each token, computed by a head of which each rank has a slice of the vocabulary.

:mod:`.cross_entropy` works on logits that the head's forward has computed. Here the projection is part of the function,
so that logits exist for one chunk of tokens at a time, forward and backward. The ranks exchange up to two numbers for
each token to find the maximum, and up to five to sum; backward all-reduces the gradient of the hidden states once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..collectives import all_reduce
from .cross_entropy import Vocabulary, computing_dtype

#: Bytes that the float32 logits of one chunk may take where the user gives no number of rows. More than for logits that
#: are there already: each chunk reads the whole slice of the head, and adds to the whole of its gradient.
DEFAULT_CHUNK_BYTES = 256 * 2**20

#: The statistics besides the log-probabilities. Only log-probabilities and entropy have gradients.
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class Logits:
    """What the logits are: ``softcap(scale (hidden @ weight.T + bias)) / temperature``.

    Attributes:
        vocabulary: how the classes are sharded.
        classes: of the full vocabulary.
        temperature: divides the logits.
        softcap: ``cap tanh(x / cap)``; None: no soft-capping.
        scale: multiplies what the head returns.
    """

    vocabulary: Vocabulary
    classes: int
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def of(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(rows, H) and this rank's (width, H), (width,), of one dtype -> (rows, width) in the computing dtype."""
        product = hidden @ weight.t()
        if bias is not None:
            product += bias
        x = product.to(computing_dtype(product.dtype))
        if self.scale != 1.0:
            x *= self.scale
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x if self.temperature == 1.0 else x.div_(self.temperature)

    def through(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of :meth:`of`'s product from that of its result ``x``; both are overwritten."""
        if self.softcap is not None:
            squared = x.mul_(self.temperature / self.softcap).square_()  # of the hyperbolic tangent
            gradient.addcmul_(gradient, squared, value=-1.0)
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient.mul_(factor)


def token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    logits: Logits,
    outputs: Sequence[str] = OPTIONAL,
) -> tuple[torch.Tensor | None, ...]:
    """Log-probabilities, and the statistics of :data:`OPTIONAL` named in ``outputs``; two small all-reduces.

    Under autocast the projection is in its dtype, else in the dtype of ``hidden``; all else in float32. Gradients are
    accumulated in float32. That of ``hidden`` takes one all-reduce.

    Args:
        hidden: (rows, H), equal on all ranks.
        weight: (width, H), this rank's rows of the head; of any floating dtype.
        bias: (width,) or None.
        target: (rows,), long, in [0, classes), equal on all ranks.
        logits: what the head computes.
        outputs: names in :data:`OPTIONAL`.

    Returns:
        Each (rows,), equal on all ranks, None if not asked for: log-probability of the target and entropy of the
        distribution, float32 (float64 for float64); and without gradients the log of the sum of the squared
        probabilities, the mean of the logits over the vocabulary, and whether the target is the first one with the
        highest logit.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _TokenStatistics.apply(hidden, weight, bias, target, logits, frozenset(outputs), dtype)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        logits: Logits,
        outputs: frozenset[str],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, ...]:
        v, rows, width = logits.vocabulary, len(hidden), len(weight)
        local, mine = v.own(target, width)
        index = local.masked_fill(~mine, 0)
        wide = computing_dtype(dtype)
        lowest = torch.finfo(wide).min
        # before: the highest logit in front of the target
        top, before = torch.full((2, rows), lowest, dtype=wide, device=hidden.device)
        sums = torch.zeros(5, rows, dtype=wide, device=hidden.device)
        exponentials, squares, weighted, mean, hit = sums
        low, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for part in v.chunks(rows, width, DEFAULT_CHUNK_BYTES):
            x = logits.of(hidden[part].to(dtype), low, low_bias)
            # Finite, also where all of the slice is -inf: the exponentials are then 0, not nan.
            top[part] = x.amax(-1).clamp_(min=lowest)
            hit[part] = x.gather(-1, index[part, None]).squeeze(-1).masked_fill_(~mine[part], 0)
            if "mean_logits" in outputs:
                mean[part] = x.sum(-1)
            if "is_top1" in outputs:
                behind = torch.arange(width, device=x.device) >= local[part, None]
                before[part] = x.masked_fill(behind, lowest).amax(-1)
            powers = (x - top[part, None]).exp_()
            exponentials[part] = powers.sum(-1)
            if "entropy" in outputs:
                weighted[part] = x.clamp_(min=lowest).mul_(powers).sum(-1)  # 0 of a logit of -inf, not nan
            if "log_sum_sq_probs" in outputs:
                squares[part] = powers.square_().sum(-1)
        if rows:
            highest, before = all_reduce(torch.stack([top, before]), v.group, "max")
            # From this rank's maximum to that of the row: only then do the sums of the ranks add up.
            shift = (top - highest).exp_()
            exponentials *= shift
            weighted *= shift
            squares *= shift.square_()
            exponentials, squares, weighted, mean, hit = all_reduce(sums, v.group)
        else:
            highest = top
        total = exponentials.log().add_(highest)
        entropy = total - weighted / exponentials if "entropy" in outputs else None
        log_squares = squares.log() - 2 * exponentials.log() if "log_sum_sq_probs" in outputs else None
        mean_logits = mean / logits.classes if "mean_logits" in outputs else None
        is_top1 = (hit >= highest) & (hit > before) if "is_top1" in outputs else None
        ctx.logits, ctx.dtype = logits, dtype
        ctx.save_for_backward(hidden, weight, bias, index, mine, total, entropy)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in (log_squares, mean_logits, is_top1) if x is not None))
        return hit - total, entropy, log_squares, mean_logits, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_hit: Any, for_entropy: Any, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, weight, bias, index, mine, total, entropy = ctx.saved_tensors
        logits, dtype = ctx.logits, ctx.dtype
        with_hidden, with_weight, with_bias = ctx.needs_input_grad[:3]
        rows, width = len(hidden), len(weight)
        lowest = torch.finfo(total.dtype).min
        if for_hit is None:
            for_hit = torch.zeros_like(total)

        def zeros(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros(like.shape, dtype=total.dtype, device=like.device)

        of_hidden = zeros(hidden) if with_hidden else None
        of_weight = zeros(weight) if with_weight else None
        of_bias = zeros(bias) if with_bias else None
        low, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for part in logits.vocabulary.chunks(rows, width, DEFAULT_CHUNK_BYTES):
            states = hidden[part].to(dtype)
            x = logits.of(states, low, low_bias)
            log_p = x - total[part, None]
            if for_entropy is None:
                gradient = log_p.exp_().mul_(-for_hit[part, None])
            else:
                p = log_p.exp()
                # Finite times p first: 0 of a logit of -inf, whatever the factors are.
                gradient = log_p.clamp_(min=lowest).add_(entropy[part, None]).mul_(p)
                gradient.mul_(-for_entropy[part, None]).addcmul_(p, for_hit[part, None], value=-1.0)
            gradient.scatter_add_(-1, index[part, None], for_hit[part].masked_fill(~mine[part], 0)[:, None])
            gradient = logits.through(gradient, x).to(dtype)
            if of_hidden is not None:
                of_hidden[part] = _product(gradient, low, total.dtype)
            if of_weight is not None:
                of_weight += _product(gradient.t(), states, total.dtype)
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=total.dtype)
        if of_hidden is not None and rows:
            of_hidden = all_reduce(of_hidden, logits.vocabulary.group)
        results = ((of_hidden, hidden), (of_weight, weight), (of_bias, bias))
        return (*(None if x is None else x.to(like.dtype) for x, like in results), None, None, None, None)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` in ``dtype``, not rounded to a narrower dtype of ``a`` and ``b``: sums of it would be biased."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
