"""Where an operator leaves the dimension along which a tensor holds one rank's shard of features (or heads).

An operator that combines entries along this dimension, or moves them, computes something else on a shard. Views rename
the dimension: (tokens, features) -> (tokens, heads, width) -> (heads, tokens, width). What is not known is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from .operator_trace import argument_of


@dataclass(frozen=True)
class FeatureShard:
    """One rank's shard of features along a dimension.

    Attributes:
        dim: the dimension, counted from the end (negative).
        outer: this many other entries are in the dimension, outside of the sharded ones: a batch in (batch x heads).
        blocks: this many shards stand one behind the other (a packed projection), each of features of its own.
    """

    dim: int = -1
    outer: int = 1
    blocks: int = 1


#: Arguments with the dimensions along which an operator combines entries.
_ALONG = ("dim", "normalized_shape", "axis")
#: Operators that combine entries along dimensions, which are gone then.
_REDUCES = frozenset(
    "sum mean var var_mean std std_mean amax amin max min argmax argmin norm linalg_vector_norm logsumexp prod "
    "kthvalue median".split()
)
#: Operators that combine entries along dimensions, which are still there.
_COMBINES = frozenset(
    "softmax _softmax log_softmax _log_softmax cumsum cumprod sort topk native_layer_norm _fused_rms_norm".split()
)
_MOVES = frozenset(["roll", "flip"])
_CUTS = frozenset("select slice split split_with_sizes unbind unsafe_split unsafe_split_with_sizes".split())
_VIEWS = frozenset("view _unsafe_view reshape _reshape_alias".split())
#: Operators, beside pointwise ones, with the shape and the features of their input.
_KEEPS = frozenset("clone _to_copy detach alias copy_ native_dropout expand".split())


class CombinesShards(Exception):
    """An operator combines or moves entries along the sharded dimension."""


def shard_after(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shards: list[tuple[torch.Tensor, FeatureShard]]
) -> Callable[[torch.Tensor], FeatureShard | None]:
    """A function that returns the shard of an output of an operator; None if it cannot be told.

    Args:
        name: name of the operator without overload.
        func: the operator.
        args: its arguments.
        kwargs: the same.
        shards: its inputs that are sharded, with their shards; at least one.

    Raises:
        CombinesShards: the outputs are not those of one process.
    """
    x, shard = shards[0]
    alike = all(other == shard for _, other in shards)
    if torch.Tag.pointwise in func.tags or name in _KEEPS:
        return lambda y: shard if alike and _size(y, shard) == _size(x, shard) else None
    if name in _VIEWS:
        return lambda y: shard_of_view(tuple(x.shape), tuple(y.shape), shard)
    found: FeatureShard | None = None
    dim = argument_of(func, "dim", args, kwargs)
    at = dim % x.ndim - x.ndim if isinstance(dim, int) and x.ndim else 0
    if name in _REDUCES or name in _COMBINES:
        found = _combined(name, func, args, kwargs, x, shard)
    elif name in _MOVES:
        dims = argument_of(func, "dims", args, kwargs) or range(x.ndim)
        if any(d % x.ndim - x.ndim == shard.dim for d in dims) and shard.outer == shard.blocks == 1:
            raise CombinesShards("moves")
        found = shard
    elif name in _CUTS and at == shard.dim:
        found = _cut(name, func, args, kwargs, x, shard)
    elif name in _CUTS:
        found = replace(shard, dim=shard.dim + (at > shard.dim)) if name in ("select", "unbind") else shard
    elif name == "cat":
        found = shard if alike and len(shards) == len(args[0]) and at != shard.dim else None
    elif name == "permute":
        dims = [d % x.ndim for d in argument_of(func, "dims", args, kwargs)]
        found = replace(shard, dim=dims.index(shard.dim + x.ndim) - x.ndim)
    elif name in ("transpose", "t"):
        first, second = (-2, -1) if name == "t" else (d % x.ndim - x.ndim for d in args[1:3])
        found = replace(shard, dim={first: second, second: first}.get(shard.dim, shard.dim))
    elif name == "unsqueeze":
        found = replace(shard, dim=shard.dim - (shard.dim + x.ndim < dim % (x.ndim + 1)))
    elif name == "squeeze":
        dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        gone = [d % x.ndim for d in dims if x.shape[d] == 1 and d % x.ndim > shard.dim + x.ndim]
        found = replace(shard, dim=shard.dim + len(gone))
    elif name == "bmm":
        found = _product(args, shards)
    return lambda y: found


def _size(x: torch.Tensor, shard: FeatureShard) -> int:
    return x.shape[shard.dim] if x.ndim >= -shard.dim else 0


def _cut(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor, shard: FeatureShard
) -> FeatureShard | None:
    """A part along the sharded dimension: of a shard it is another part than of all features."""
    size = x.shape[shard.dim]
    if name == "slice":
        start, end = argument_of(func, "start", args, kwargs) or 0, argument_of(func, "end", args, kwargs)
        if start == 0 and (end is None or end >= size) and argument_of(func, "step", args, kwargs) in (None, 1):
            return shard
    if shard.outer > 1 or shard.blocks > 1:
        return None
    raise CombinesShards("takes a part of")


def _combined(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor, shard: FeatureShard
) -> FeatureShard | None:
    dims = next((d for d in (argument_of(func, key, args, kwargs) for key in _ALONG) if d is not None), None)
    if name in ("native_layer_norm", "_fused_rms_norm"):
        dims = list(range(-len(argument_of(func, "normalized_shape", args, kwargs) or [0]), 0))
    # An operator without dimensions combines all entries.
    dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    along = {d % x.ndim - x.ndim for d in dims}
    if shard.dim in along:
        if shard.outer > 1:
            return None
        raise CombinesShards("combines")
    if name in _COMBINES or argument_of(func, "keepdim", args, kwargs):
        return shard
    return replace(shard, dim=shard.dim + sum(d > shard.dim for d in along))


def _product(args: tuple[Any, ...], shards: list[tuple[torch.Tensor, FeatureShard]]) -> FeatureShard | None:
    """The shard of a batched product, (n, rows, inner) x (n, inner, columns)."""
    if len(shards) == 2:
        return shards[0][1] if shards[0][1] == shards[1][1] and shards[0][1].dim == -3 else None
    x, shard = shards[0]
    rows_or_columns = -2 if x is args[0] else -1
    return shard if shard.dim == rows_or_columns else None  # along the inner dimension: a sum of this rank's part


def shard_of_view(before: tuple[int, ...], after: tuple[int, ...], shard: FeatureShard) -> FeatureShard | None:
    """The shard of a tensor of shape ``before`` that is viewed as ``after``; None if it cannot be told."""
    place = shard.dim + len(before)
    outside = prod(before[:place]) * shard.outer  # entries outside of the sharded ones, in the order of the memory
    passed = 1
    for index, size in enumerate(after):
        if passed == outside and size == 1:
            return None  # one head, or a dimension that was inserted?
        if passed * size > outside:
            if outside % passed or size % (outside // passed):
                return None
            split = size // (outside // passed) < prod(before[place:]) // shard.outer and shard.blocks > 1
            return None if split else replace(shard, dim=index - len(after), outer=outside // passed)
        passed *= size
    return None
