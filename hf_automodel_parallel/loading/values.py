"""Where the values of a tensor come from, and how to get a part of them without the rest.

A small graph: tensors of files, given tensors, and operators on them. Cutting goes through the operators that only move
or cast numbers, down to the files; of any other operator the whole result is computed and then cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import compat
from .files import TensorFile

#: (first, count) per dimension.
LocalParamForward = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class Value:
    """What a tensor of this shape and dtype will be.

    Attributes:
        shape: of the whole.
        dtype: of the numbers.
    """

    shape: torch.Size
    dtype: torch.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> Value:
        return self  # never changes

    @property
    def whole(self) -> LocalParamForward:
        """The region that is everything."""
        return tuple((0, size) for size in self.shape)

    def read(self, region: LocalParamForward | None = None) -> torch.Tensor:
        """The numbers of ``region`` (None: all) on the CPU. May share memory with a mapped file or with a given
        tensor.
        """
        region = self.whole if region is None else region
        if any(count == 0 for _, count in region):
            return torch.empty([count for _, count in region], dtype=self.dtype)
        return self._read(region)

    def _read(self, region: LocalParamForward) -> torch.Tensor:
        raise NotImplementedError

    def files(self) -> list[FromFile]:
        """The tensors of files that take part."""
        return []


@dataclass(eq=False)
class FromFile(Value):
    """A tensor of a safetensors file."""

    file: TensorFile
    key: str

    def _read(self, region: LocalParamForward) -> torch.Tensor:
        return self.file.read(self.key, tuple(slice(first, first + count) for first, count in region))

    def files(self) -> list[FromFile]:
        return [self]


@dataclass(eq=False)
class Given(Value):
    """A tensor that is in memory."""

    tensor: torch.Tensor

    def _read(self, region: LocalParamForward) -> torch.Tensor:
        return _cut(self.tensor, region)


@dataclass(eq=False)
class Computed(Value):
    """The result of an operator, or the ``index``-th of its results.

    Attributes:
        operator: an operator of torch without side effects.
        args: its arguments, with a :class:`Value` in the place of each tensor that is not there yet.
        kwargs: the same by name.
        index: which result, None if there is one.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    index: int | None = None

    def _read(self, region: LocalParamForward) -> torch.Tensor:
        through = _THROUGH.get(self.operator)
        result = None if through is None else through(self, region)
        return _cut(self.compute(), region) if result is None else result

    def compute(self) -> torch.Tensor:
        """The whole result."""
        # Contiguous, as a deferred tensor says of itself; a view may rely on it.
        args, kwargs = compat.tree_map_only(Value, lambda value: value.read().contiguous(), (self.args, self.kwargs))
        result = self.operator(*args, **kwargs)
        return result if self.index is None else result[self.index]

    def files(self) -> list[FromFile]:
        inputs = [leaf for leaf in compat.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]
        return [leaf for value in inputs for leaf in value.files()]


def _cut(tensor: torch.Tensor, region: LocalParamForward) -> torch.Tensor:
    for dim, (first, count) in enumerate(region):
        if count != tensor.shape[dim]:
            tensor = tensor.narrow(dim, first, count)
    return tensor


# ---- operators that a region can be cut through ---------------------------------------------------------------------


def _same(value: Computed, region: LocalParamForward) -> torch.Tensor:
    return value.args[0].read(region)


def _cast(value: Computed, region: LocalParamForward) -> torch.Tensor:
    return value.args[0].read(region).to(value.dtype)


def _stack(value: Computed, region: LocalParamForward) -> torch.Tensor | None:
    tensors = value.args[0]
    if not all(isinstance(tensor, Value) for tensor in tensors):
        return None
    dim = _argument(value, 1, "dim", 0) % len(region)
    first, count = region[dim]
    inner = region[:dim] + region[dim + 1 :]
    return torch.stack([tensor.read(inner) for tensor in tensors[first : first + count]], dim)


def _cat(value: Computed, region: LocalParamForward) -> torch.Tensor | None:
    tensors = value.args[0]
    if not all(isinstance(tensor, Value) and len(tensor.shape) == len(region) for tensor in tensors):
        return None
    dim = _argument(value, 1, "dim", 0) % len(region)
    first, count = region[dim]
    parts, start = [], 0
    for tensor in tensors:
        begin, end = max(first, start), min(first + count, start + tensor.shape[dim])
        if begin < end:
            parts.append(tensor.read((*region[:dim], (begin - start, end - begin), *region[dim + 1 :])))
        start += tensor.shape[dim]
    return torch.cat(parts, dim)


def _transpose(value: Computed, region: LocalParamForward) -> torch.Tensor:
    a, b = (dim % len(region) for dim in value.args[1:3])
    inner = list(region)
    inner[a], inner[b] = inner[b], inner[a]
    return value.args[0].read(tuple(inner)).transpose(a, b)


def _select(value: Computed, region: LocalParamForward) -> torch.Tensor:
    source, dim, index = value.args
    dim %= len(source.shape)
    inner = (*region[:dim], (index % source.shape[dim], 1), *region[dim:])
    return source.read(inner).squeeze(dim)


def _slice(value: Computed, region: LocalParamForward) -> torch.Tensor | None:
    source, dim = value.args[0], _argument(value, 1, "dim", 0)
    dim %= len(region)
    start, step = _argument(value, 2, "start", None) or 0, _argument(value, 4, "step", 1)
    if step != 1:
        return None
    start = max(0, start + source.shape[dim]) if start < 0 else start
    return source.read(_moved(region, dim, start))


def _split(value: Computed, region: LocalParamForward) -> torch.Tensor:
    source, sizes, dim = value.args[0], value.args[1], _argument(value, 2, "dim", 0) % len(region)
    index: int = value.index  # type: ignore[assignment]
    start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
    return source.read(_moved(region, dim, start))


def _moved(region: LocalParamForward, dim: int, by: int) -> LocalParamForward:
    first, count = region[dim]
    return (*region[:dim], (first + by, count), *region[dim + 1 :])


def _argument(value: Computed, position: int, name: str, default: Any) -> Any:
    return value.args[position] if len(value.args) > position else value.kwargs.get(name, default)


_aten = torch.ops.aten
#: Operator -> the numbers of a region of its result; None where it has to be computed as a whole.
_THROUGH: dict[Any, Callable[[Computed, LocalParamForward], torch.Tensor | None]] = {
    _aten.alias.default: _same,
    _aten.detach.default: _same,
    _aten.clone.default: _same,
    compat.cast_operator(): _cast,
    _aten.stack.default: _stack,
    _aten.cat.default: _cat,
    _aten.transpose.int: _transpose,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
}
