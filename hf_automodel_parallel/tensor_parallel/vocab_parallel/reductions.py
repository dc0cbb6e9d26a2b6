"""Handlers of :class:`ShardedLogits` for functions over the vocabulary: cross entropy, reductions of other losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ... import compat
from ..collectives import copy_to_tp, reduce_from_tp
from . import cross_entropy as loss
from .elementwise import dim_of
from .logits import HANDLERS, ShardedLogits, handles


def _is_last(dim: Any, logits: ShardedLogits) -> bool:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, logits.ndim - 1)


def _result_dtype(function: Any, logits: ShardedLogits, *args: Any, **kwargs: Any) -> torch.dtype:
    """The dtype of ``function``'s result for logits of this dtype; autocast may change it."""
    if not torch.is_autocast_enabled(logits.device.type):
        return kwargs.get("dtype") or logits.dtype
    return function(torch.zeros(1, 1, dtype=logits.dtype, device=logits.device), *args, **kwargs).dtype


def _cross_entropy(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = dict(zip(names, args, strict=False)) | kwargs
    logits, target = given.get("input"), given.get("target")
    reduction, smoothing = given.get("reduction", "mean"), given.get("label_smoothing", 0.0)
    if (
        not isinstance(logits, ShardedLogits)
        or not compat.is_plain_tensor(target)
        or any(given.get(name) is not None for name in ("weight", "size_average", "reduce"))
        or target.dtype != torch.long
        or target.device != logits.device
        or logits.ndim not in (1, 2)
        or target.shape != logits.shape[:-1]
        or reduction not in ("mean", "sum", "none")
        or not 0 <= smoothing <= 1
        or not logits.is_floating_point()
    ):
        return NotImplemented
    part = logits.stored()
    result = loss.cross_entropy(
        part.reshape(-1, part.shape[-1]),
        target.reshape(-1),
        logits.vocabulary,
        given.get("ignore_index", -100),
        reduction,
        smoothing,
    )
    dtype = _result_dtype(F.cross_entropy, logits, torch.zeros(1, dtype=torch.long, device=logits.device))
    return (result.reshape(target.shape) if reduction == "none" else result).to(dtype)


HANDLERS[F.cross_entropy] = _cross_entropy


@handles("logsumexp")
def _logsumexp(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0] if args else None
    dim = dim_of(args, kwargs, 1)
    if (
        not isinstance(logits, ShardedLogits)
        or not logits.is_floating_point()
        or not _is_last(dim, logits)
        or "out" in kwargs
    ):
        return NotImplemented
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    result = loss.logsumexp(logits.stored(), logits.vocabulary).to(_result_dtype(function, logits, dim=-1))
    return result.unsqueeze(-1) if keep else result


@handles("log_softmax", "softmax")
def _log_softmax(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0] if args else None
    dim = dim_of(args, kwargs, 1)
    if not isinstance(logits, ShardedLogits) or not logits.is_floating_point() or not _is_last(dim, logits):
        return NotImplemented
    dtype = next((a for a in args[2:] if isinstance(a, torch.dtype)), kwargs.get("dtype"))
    given = {} if dtype is None else {"dtype": dtype}
    wanted = _result_dtype(function, logits, dim=-1, **given)
    if not wanted.is_floating_point:
        return NotImplemented
    part = logits.stored()
    computing = loss.computing_dtype(torch.promote_types(part.dtype, wanted))
    part = part.to(computing)
    total = copy_to_tp(loss.logsumexp(part, logits.vocabulary), logits.vocabulary.group)
    result = part - total.unsqueeze(-1)
    return logits.like((result.exp() if function.__name__ == "softmax" else result).to(wanted))


@handles("gather")
def _gather(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    logits, dim, index = given.pop("input", None), given.pop("dim", None), given.pop("index", None)
    if (
        not isinstance(logits, ShardedLogits)
        or given
        or not _is_last(dim, logits)
        or not compat.is_plain_tensor(index)
        or index.shape[:-1] != logits.shape[:-1]
        or index.dtype != torch.long
    ):
        return NotImplemented
    return loss.select(logits.stored(), index, logits.vocabulary).to(logits.dtype)


@handles("sum")
def _sum(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0] if args else None
    if not isinstance(logits, ShardedLogits) or "out" in kwargs or not _is_last(dim_of(args, kwargs, 1), logits):
        return NotImplemented
    if any(isinstance(value, int) and not isinstance(value, bool) for value in args[2:]):
        return NotImplemented  # more dimensions
    return reduce_from_tp(function(logits.own(), *args[1:], **kwargs), logits.vocabulary.group)
