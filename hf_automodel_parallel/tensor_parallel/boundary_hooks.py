"""The places where an activation enters or leaves a sharded region, as module hooks.

A hook object holds what it needs and is called by the module it is registered on, so class, name and ``forward`` of the
module stay what they are, and ``torch.compile`` traces through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from .collectives import copy_to_tp, gather_from_tp, reduce_from_tp, split_to_tp


class SharedInputs:
    """One copy boundary per activation, however many consumers read it.

    Siblings such as q, k and v read the *same tensor object*. Recognising it by identity shares the boundary exactly
    among the sharded consumers, whatever the architecture: whoever else reads the activation (a router, a residual)
    reads the original, so no gradient is counted twice. Cleared at the end of the layer's forward, so nothing outlives
    it.

    Attributes:
        length: under sequence parallelism, the tokens of the whole sequence while the layer runs on shares of it.
        regather: under sequence parallelism, what the layer gathers is gathered again in backward.
        told_compiler: the layer is compiled together with what tells the compiler to do that.
    """

    length: int | None = None
    regather = False
    told_compiler = False

    def __init__(self) -> None:
        self.known: list[tuple[torch.Tensor, int, torch.Tensor]] = []  # what is read, its version, its copy

    def copy(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """:func:`copy_to_tp`, once per tensor object."""
        known = self.copied(x)
        if known is not None:
            return known
        copied = copy_to_tp(x, group)
        return copied if copied is x else self.remember(x, copied)

    def copied(self, x: torch.Tensor) -> torch.Tensor | None:
        """What :meth:`remember` was told about ``x``, if that has not been changed in place since."""
        for source, version, copied in self.known:
            if source is x and version == _version(x):
                return copied
        return None

    def remember(self, x: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
        """Let all who read ``x`` share ``copied``, and return it."""
        self.known.append((x, _version(x), copied))
        return copied

    def clear(self) -> None:
        """Forget all activations."""
        self.known.clear()

    def resumed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` so that it finds, also when a checkpoint calls it again, the :attr:`length` of now."""
        return function


def _version(x: torch.Tensor) -> int:
    return 0 if torch.compiler.is_compiling() else compat.version_of(x)  # nothing that a graph may depend on


def replace_first(args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor) -> tuple[tuple[Any, ...], dict]:
    """The arguments with ``x`` in the place of :func:`first_tensor`."""
    if args:
        return (x, *args[1:]), kwargs
    key = _first_tensor_key(kwargs)
    return args, {**kwargs, key: x}


def _first_tensor_key(kwargs: dict[str, Any]) -> str:
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            return key
    raise TypeError("a tensor-parallel layer was called without a tensor argument")


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The activation among the arguments of a call: the first positional one, or the first tensor by keyword."""
    return args[0] if args else kwargs[_first_tensor_key(kwargs)]


class CopyInput:
    """Pre-hook of a column-wise layer: its input enters the region."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.shared: SharedInputs | None = None  # set where the layer lies in a region that clears it

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        copied = copy_to_tp(x, self.group) if self.shared is None else self.shared.copy(x, self.group)
        return replace_first(args, kwargs, copied)


class CopyAllInputs:
    """Pre-hook of sharded experts: every floating-point argument enters the region.

    Hidden states and routing weights both reach a sharded computation, so both gradients are sums over the ranks; the
    router behind the weights sees the whole gradient only if they have a boundary too.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def _copy(self, value: Any) -> Any:
        return copy_to_tp(value, self.group) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(self._copy, args)), {key: self._copy(value) for key, value in kwargs.items()}


class OwnHeads:
    """Pre-hook of a module that gets values for all heads (ALiBi) by keyword: each rank passes on those of its heads.

    Args:
        arguments: keyword -> (dimension, heads). The dimension runs over heads, or over sequences and, within each,
            heads.
    """

    def __init__(self, arguments: dict[str, tuple[int, int]], group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.arguments, self.group, self.rank, self.size = arguments, group, rank, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = {}
        for name, (dim, heads) in self.arguments.items():
            value = kwargs.get(name)
            if isinstance(value, torch.Tensor):
                width = heads // self.size
                by_head = copy_to_tp(value, self.group).unflatten(dim, (value.shape[dim] // heads, heads))
                own[name] = by_head.narrow(dim + 1, self.rank * width, width).flatten(dim, dim + 1)
        return args, {**kwargs, **own}


class SplitInput:
    """Pre-hook of a row-wise layer that reads a replicated activation: each rank takes its slice of the last dim."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = split_to_tp(first_tensor(args, kwargs), self.group, self.rank, self.size)
        return replace_first(args, kwargs, x)


class ScaleInput:
    """Pre-hook of a module whose equal results on all ranks are going to be summed over them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_first(args, kwargs, first_tensor(args, kwargs) / self.size)


class ReduceOutput:
    """Hook of a row-wise layer: sum the ranks' outputs, then add the bias, once.

    While the layer's forward runs, the region hides the bias from it (added on every rank it would count tp times) and
    leaves it here.
    """

    def __init__(self, group: dist.ProcessGroup, bias_owner: nn.Module | None) -> None:
        self.group = group
        self.bias_owner = bias_owner
        self.bias: torch.Tensor | None = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Summands of the ranks -> what the layer returns."""
        return reduce_from_tp(x, self.group)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output = map_tensor(output, self.reduce)
        if self.bias_owner is not None:
            bias = self.bias if self.bias is not None else self.bias_owner.bias
            output = output + (bias.to_local() if isinstance(bias, DTensor) else bias)
        return output


class GatherOutput:
    """Hook of a column-wise layer whose output is needed whole."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return map_tensor(output, lambda x: gather_from_tp(x, self.group, self.rank, self.size))


class CopyTail:
    """Hook of a projection whose last ``tail`` output features go to sharded heads without another boundary between.

    DeepSeek-style latent attention splits this output into a latent part, which reaches its own column-wise projection,
    and a rotary part, which is broadcast straight to the heads of each rank.
    """

    def __init__(self, group: dist.ProcessGroup, tail: int) -> None:
        self.group, self.tail = group, tail

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        head, tail = output.split([output.shape[-1] - self.tail, self.tail], dim=-1)
        return torch.cat([head, copy_to_tp(tail, self.group)], dim=-1)


class VocabularySlice:
    """Pre-hook and hook of an embedding sharded on the vocabulary: look up own rows, zero for others, sum over the
    ranks.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, rows: int) -> None:
        self.group, self.rows = group, rows
        self.start = rank * rows
        self.mask: torch.Tensor | None = None
        self.padding_idx: int | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Map token ids to rows of the slice and remember which ids are elsewhere."""
        local = first_tensor(args, kwargs) - self.start
        self.mask = (local < 0) | (local >= self.rows)
        self.padding_idx = module.padding_idx  # type: ignore[assignment]
        if self.padding_idx is not None:
            own = self.padding_idx - self.start
            module.padding_idx = own if 0 <= own < self.rows else None  # type: ignore[assignment]
        return replace_first(args, kwargs, local.masked_fill(self.mask, 0))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor | None) -> torch.Tensor | None:
        """Zero the rows of foreign ids and sum; called also when the forward raised, to restore the module."""
        mask, self.mask = self.mask, None
        module.padding_idx = self.padding_idx  # type: ignore[assignment]
        if output is None or mask is None:
            return output
        return reduce_from_tp(output.masked_fill(mask.unsqueeze(-1), 0), self.group)


def map_tensor(output: Any, function: Any) -> Any:
    """Apply ``function`` to a tensor output or to the first tensor of a tuple output."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return (function(output[0]), *output[1:])
    return output
