"""Input and output hooks of sharded modules, where activations change their placement on the tp axis.

The hooks are objects with the group and the rank, registered on the modules. So class, name and ``forward`` of a module
do not change, and ``torch.compile`` traces through the hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.forward_stack import ForwardWrapper
from .collectives import copy_to_tp, gather_from_tp, reduce_from_tp, split_to_tp


class SharedInputs:
    """One copy to TP per activation, for all column-wise layers that read it.

    Siblings such as q, k and v read the *same tensor object*. It is recognised by identity, so that exactly the sharded
    consumers use the copy, in every architecture. A router or a residual reads the original, so no gradient is counted
    twice. Cleared at the end of the layer's forward, so that no activation is kept alive.

    Attributes:
        known: (activation, its version, its copy).
        length: under sequence parallelism, number of tokens of the full sequence while the layer works on shards.
        regather: under sequence parallelism, activations that the layer all-gathers are re-all-gathered in backward.
        compiler_regathers: the layer is compiled with the policy that makes the compiler re-all-gather them.
    """

    length: int | None = None
    regather = False
    compiler_regathers = False

    def __init__(self) -> None:
        self.known: list[tuple[torch.Tensor, int, torch.Tensor]] = []

    def copy(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """:func:`copy_to_tp`, once per tensor object."""
        known = self.copied(x)
        if known is not None:
            return known
        copied = copy_to_tp(x, group)
        return copied if copied is x else self.remember(x, copied)

    def copied(self, x: torch.Tensor) -> torch.Tensor | None:
        """The copy of ``x``, None if there is none or ``x`` has been changed in place since."""
        for source, version, copied in self.known:
            if source is x and version == activation_version(x):
                return copied
        return None

    def remember(self, x: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
        """Keep ``copied`` for later consumers of ``x``, and return it."""
        self.known.append((x, activation_version(x), copied))
        return copied

    def clear(self) -> None:
        """Forget all activations."""
        self.known.clear()

    def resumed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with the current :attr:`length`, also when a checkpoint calls it again in backward."""
        return function


class SharedInputsForward(ForwardWrapper):
    """The forward of a module, which clears ``shared`` at its end."""

    def __init__(self, shared: SharedInputs) -> None:
        self.shared = shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.inner(*args, **kwargs)
        finally:
            self.shared.clear()


def activation_version(x: torch.Tensor) -> int:
    """The number of in-place changes of ``x``; 0 where it cannot be known."""
    return 0 if torch.compiler.is_compiling() else compat.version_of(x)  # a compiled graph cannot depend on versions


def replace_first(args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor) -> tuple[tuple[Any, ...], dict]:
    """The arguments with ``x`` instead of :func:`first_tensor`."""
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
    """Input hook of a column-wise layer: copy to TP."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.shared: SharedInputs | None = None  # set inside of a layer, whose forward clears it

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        copied = copy_to_tp(x, self.group) if self.shared is None else self.shared.copy(x, self.group)
        return replace_first(args, kwargs, copied)


class CopyAllInputs:
    """Input hook of sharded experts: copy every floating-point argument to TP.

    Hidden states and routing weights both reach a sharded computation, so both gradients are sums over the ranks; the
    router gets a complete gradient only if its weights are copied too.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def _copy(self, value: Any) -> Any:
        return copy_to_tp(value, self.group) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(self._copy, args)), {key: self._copy(value) for key, value in kwargs.items()}


class OwnHeads:
    """Input hook of a module that gets values for all heads (ALiBi) by keyword: slice out those of this rank's heads.

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
                # Copied to TP first: the gradient of each rank covers its own heads only, and is zero for the others.
                by_head = copy_to_tp(value, self.group).unflatten(dim, (value.shape[dim] // heads, heads))
                own[name] = by_head.narrow(dim + 1, self.rank * width, width).flatten(dim, dim + 1)
        return args, {**kwargs, **own}


class SplitInput:
    """Input hook of a row-wise layer that reads a replicated activation: scatter its last dimension."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = split_to_tp(first_tensor(args, kwargs), self.group, self.rank, self.size)
        return replace_first(args, kwargs, x)


class ScaleInput:
    """Input hook of a module whose replicated results will be summed over the ranks: divide by their number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_first(args, kwargs, first_tensor(args, kwargs) / self.size)


class ReduceOutput:
    """Output hook of a row-wise layer: all-reduce, then add the bias, once.

    While the layer's forward runs, the local-parameter scope hides the bias from it (added on every rank it would count
    tp times) and leaves it here.
    """

    def __init__(self, group: dist.ProcessGroup, bias_owner: nn.Module | None) -> None:
        self.group = group
        self.bias_owner = bias_owner
        self.bias: torch.Tensor | None = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Reduce the Partial output ``x``."""
        return reduce_from_tp(x, self.group)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output = map_tensor(output, self.reduce)
        if self.bias_owner is not None:
            bias = self.bias if self.bias is not None else self.bias_owner.bias
            output = output + (bias.to_local() if isinstance(bias, DTensor) else bias)
        return output


class GatherOutput:
    """Output hook of a column-wise layer whose output is needed in full: all-gather the last dimension."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return map_tensor(output, lambda x: gather_from_tp(x, self.group, self.rank, self.size))


class CopyTail:
    """Output hook of a projection whose last ``tail`` features go straight to sharded heads: copy those to TP.

    DeepSeek-style latent attention splits this output into latent features, which go through a column-wise projection
    with an input hook of its own, and rotary features, which are broadcast to the heads of each rank.
    """

    def __init__(self, group: dist.ProcessGroup, tail: int) -> None:
        self.group, self.tail = group, tail

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        head, tail = output.split([output.shape[-1] - self.tail, self.tail], dim=-1)
        return torch.cat([head, copy_to_tp(tail, self.group)], dim=-1)


class VocabularySlice:
    """Input and output hook of an embedding sharded on the vocabulary.

    Each rank looks up the ids of its rows and takes zero for the others; the all-reduce sums them.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, rows: int) -> None:
        self.group, self.rows = group, rows
        self.start = rank * rows
        self.mask: torch.Tensor | None = None
        self.padding_idx: int | None = None
        self.given: torch.Tensor | None = None  # the ids of the last call

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Map token ids to rows of the slice, and remember which ids are on other ranks."""
        self.given = first_tensor(args, kwargs)
        local = self.given - self.start
        self.mask = (local < 0) | (local >= self.rows)
        self.padding_idx = module.padding_idx  # type: ignore[assignment]
        # F.embedding gives no gradient to the row padding_idx, so it must be the local row, or None on other ranks.
        if self.padding_idx is not None:
            own = self.padding_idx - self.start
            module.padding_idx = own if 0 <= own < self.rows else None  # type: ignore[assignment]
        # Any row of the slice will do for ids of other ranks: after() zeroes what is looked up for them.
        return replace_first(args, kwargs, local.masked_fill(self.mask, 0))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor | None) -> torch.Tensor | None:
        """Zero the rows of ids on other ranks, and all-reduce; also after an error, to restore the module."""
        mask, self.mask = self.mask, None
        module.padding_idx = self.padding_idx  # type: ignore[assignment]
        if output is None or mask is None:
            return output
        return reduce_from_tp(output.masked_fill(mask.unsqueeze(-1), 0), self.group)


def map_tensor(output: Any, function: Any) -> Any:
    """Apply ``function`` to a tensor output or to the first tensor of a tuple output."""
    if isinstance(output, torch.Tensor):
        return function(output)
    # Attention and MoE blocks return further values (weights, a cache, router logits), which stay as they are.
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return (function(output[0]), *output[1:])
    return output
