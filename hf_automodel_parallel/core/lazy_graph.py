"""A lazy graph of tensors: the operators that compute a tensor from its sources, recorded without values.

The libraries convert entire state dicts: transformers converts the weights of an architecture when it loads and saves,
PEFT selects and renames the weights of an adapter. Loading and export run that code on meta tensors, record the
operators here, and compute single results later. There are two evaluators. :class:`Evaluator` pushes a slice of the
result down to the leaves, so that a rank reads only its slices of the files. :class:`StreamingEvaluator` fetches full
leaves, because each fetch is a collective, and frees each leaf after the last result that needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import compat
from ..compat import TorchDispatchMode, tree_leaves, tree_map_only
from ..errors import UnsupportedError

#: A rectangular slice of a tensor: (first index, count) for each dimension.
Region = tuple[tuple[int, int], ...]

_aten = torch.ops.aten
_GATHER = "Gather the weights: save_pretrained(directory, state_dict=accelerator.get_state_dict(model))."


# ---- nodes -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """A tensor without values: its full shape, its dtype and, in subclasses, the source of its values."""

    shape: torch.Size
    dtype: torch.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self  # immutable

    @property
    def inputs(self) -> list[Node]:
        """The nodes that are direct arguments of this one."""
        return []

    def subgraph(self) -> list[Node]:
        """This node and all nodes that it depends on, each once, in the order of their first use."""
        found: dict[Node, None] = {}
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            if node not in found:
                found[node] = None
                stack.extend(reversed(node.inputs))
        return list(found)


class Leaf(Node):
    """A node that is a source: it has no inputs."""

    def read(self, region: Region) -> torch.Tensor:
        """The values of ``region`` on the CPU; may share memory with a mapped file or a given tensor."""
        raise NotImplementedError


@dataclass(eq=False)
class Given(Leaf):
    """A tensor in memory."""

    tensor: torch.Tensor

    def read(self, region: Region) -> torch.Tensor:
        return _cut(self.tensor, region)


@dataclass(eq=False)
class Named(Leaf):
    """An entry of a state dict; :class:`StreamingEvaluator` fetches its full tensor by name."""

    name: str


class _Unknown(Leaf):
    """A meta tensor that was neither declared nor recorded. Its evaluation raises."""


@dataclass(eq=False)
class Operation(Node):
    """One result of an operator.

    Attributes:
        operator: a torch operator without side effects. Its result must not depend on the strides of its arguments,
            because it is evaluated on contiguous tensors.
        args: its positional arguments, with a :class:`Node` in place of each recorded tensor.
        kwargs: its keyword arguments, likewise.
        index: the index of this result if the operator returns several; None if it returns one.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None

    @classmethod
    def results(
        cls, operator: Any, args: Any, kwargs: Any, result: torch.Tensor | Sequence[torch.Tensor]
    ) -> list[Operation]:
        """Return a node for each tensor in ``result``. Only shapes and dtypes of ``result`` are read, not values."""
        if isinstance(result, torch.Tensor):
            return [cls(result.shape, result.dtype, operator, args, kwargs)]
        return [cls(one.shape, one.dtype, operator, args, kwargs, index) for index, one in enumerate(result)]

    @property
    def inputs(self) -> list[Node]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Node)]

    def run(self, values: Callable[[Node], torch.Tensor]) -> torch.Tensor:
        """Run the operator on the full ``values`` of its inputs and return the full result."""
        args, kwargs = tree_map_only(Node, values, (self.args, self.kwargs))
        result = self.operator(*args, **kwargs)
        return result if self.index is None else result[self.index]


# ---- recording -------------------------------------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """A dispatch mode that records every operator on declared meta tensors.

    It uses plain meta tensors instead of a tensor subclass, because the libraries compare storages when they save: tied
    weights and views of one storage stay recognisable.
    """

    def __init__(self) -> None:
        super().__init__()
        # id(tensor) -> (tensor, node). The tensor is kept alive, because Python reuses the id of a deleted object.
        self._nodes: dict[int, tuple[torch.Tensor, Node]] = {}

    def declare(self, shapes: Mapping[str, tuple[Iterable[int], torch.dtype]]) -> dict[str, torch.Tensor]:
        """Return a state dict of meta tensors with these shapes and dtypes; each becomes a :class:`Named` leaf."""
        state: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            tensor = state[name] = torch.empty(tuple(shape), dtype=dtype, device="meta")
            self._nodes[id(tensor)] = (tensor, Named(tensor.shape, dtype, name))
        return state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(id(x) in self._nodes for x in inputs):
            return result
        if func._schema.is_mutable:
            raise UnsupportedError(
                f"saving: {func} writes in place to a weight that is being converted, which cannot be done tensor by "
                f"tensor. {_GATHER}"
            )
        # The operator is evaluated on contiguous tensors, where the recorded strides would address other values.
        if func is _aten.as_strided.default and not inputs[0].is_contiguous():
            raise UnsupportedError(f"saving: {func} of a weight that is not contiguous cannot be recorded. {_GATHER}")
        nodes = tree_map_only(torch.Tensor, self.node, (args, kwargs))
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        for output, node in zip(outputs, Operation.results(func, nodes[0], nodes[1], result), strict=True):
            # An operator may return its input itself; the tensor then keeps its node.
            if not any(output is x for x in inputs):
                self._nodes[id(output)] = (output, node)
        return result

    def node(self, tensor: torch.Tensor) -> Node:
        """Return the node of ``tensor``. The node of a tensor that was not declared or recorded cannot be evaluated."""
        _, node = self._nodes.get(id(tensor), (None, None))
        return _Unknown(tensor.shape, tensor.dtype) if node is None else node

    def names(self, tensor: torch.Tensor) -> list[str]:
        """Return the names of the state dict entries that ``tensor`` depends on, in the order of their first use."""
        return [node.name for node in self.node(tensor).subgraph() if isinstance(node, Named)]


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Evaluator:
    """Evaluates regions of nodes without a cache.

    Operators that only move or cast values pass the region on to their inputs, down to the leaves. Any other operator
    runs on its full inputs, and the region is sliced from its result.
    """

    def read(self, node: Node, region: Region | None = None) -> torch.Tensor:
        """Return the values of ``region`` of ``node`` (None: all of it) on the CPU; may share memory with a leaf."""
        region = tuple((0, size) for size in node.shape) if region is None else region
        if any(count == 0 for _, count in region):
            return torch.empty([count for _, count in region], dtype=node.dtype)
        if not isinstance(node, Operation):
            return self._leaf(node, region)
        push = _PUSHED_DOWN.get(node.operator)
        result = None if push is None else push(node, region, self.read)
        return _cut(self._full(node), region) if result is None else result

    def _leaf(self, leaf: Any, region: Region) -> torch.Tensor:
        return leaf.read(region)

    def _full(self, operation: Operation) -> torch.Tensor:
        return operation.run(lambda node: self.read(node).contiguous())


class StreamingEvaluator(Evaluator):
    """Evaluates a known list of results one by one; fetches each leaf once and frees it after its last use.

    Args:
        results: all nodes that will be computed; a node that is computed n times is listed n times.
        fetch: name -> full tensor in the declared dtype. May be a collective.
    """

    def __init__(self, results: Iterable[Node], fetch: Callable[[str], torch.Tensor]) -> None:
        self._uses = Counter(node for result in results for node in result.subgraph())
        self._fetch = fetch
        self._kept: dict[Node, torch.Tensor] = {}

    def compute(self, result: Node) -> torch.Tensor:
        """Return the full value of ``result``.

        Raises:
            UnsupportedError: ``result`` depends on a tensor that was not declared.
        """
        value = self.read(result)
        for node in result.subgraph():
            self._uses[node] -= 1
            if self._uses[node] <= 0:
                self._kept.pop(node, None)
        return value

    def _leaf(self, leaf: Node, region: Region) -> torch.Tensor:
        if not isinstance(leaf, Named):
            raise UnsupportedError(
                f"saving: a weight is computed from a tensor that does not belong to the state dict. {_GATHER}"
            )
        if leaf not in self._kept:
            self._kept[leaf] = self._fetch(leaf.name)
        return _cut(self._kept[leaf], region)

    def _full(self, operation: Operation) -> torch.Tensor:
        if operation not in self._kept:
            self._kept[operation] = super()._full(operation)
        return self._kept[operation]


def read(node: Node, region: Region | None = None) -> torch.Tensor:
    """Return the values of ``region`` of ``node`` (None: all of it) on the CPU; nothing is cached."""
    return Evaluator().read(node, region)


def assemble(leaf: Named, results: Mapping[str, Node], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Invert the graph: return the full tensor of a leaf from the values of all results that are computed from it.

    Operators that only rearrange values return views of the leaf, once copies and casts are skipped. So each value is
    written into its view.

    Args:
        leaf: the leaf.
        results: key -> node. Each depends on this leaf only; together they contain all of it.
        values: key -> value of that node.

    Returns:
        A new tensor of the leaf's shape, in the dtype of the first value.

    Raises:
        UnsupportedError: the results do not contain each value of the leaf exactly once, or an operator computes
            instead of rearranging.
    """

    def view(node: Node) -> torch.Tensor:
        if not isinstance(node, Operation):
            return full
        copies = node.operator in (_aten.clone.default, compat.cast_operator())
        return view(node.args[0]) if copies else node.run(view)

    full = torch.empty(leaf.shape, dtype=next(iter(values.values())).dtype)
    for key, value in values.items():
        target = view(results[key])
        # Another storage means that an operator returned new values, so writing into them would not reach the leaf.
        if target.untyped_storage().data_ptr() != full.untyped_storage().data_ptr():
            raise UnsupportedError(f"{leaf.name} is computed, not rearranged, in the files of this architecture.")
        target.copy_(value)
    if sum(value.numel() for value in values.values()) != full.numel():
        raise UnsupportedError(f"the files of this architecture do not hold all of {leaf.name}.")
    return full


def _cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    for dim, (first, count) in enumerate(region):
        if count != tensor.shape[dim]:
            tensor = tensor.narrow(dim, first, count)
    return tensor


# ---- operators that a region is pushed through -----------------------------------------------------------------------

Read = Callable[[Node, Region], torch.Tensor]


def _same(node: Operation, region: Region, read: Read) -> torch.Tensor:
    return read(node.args[0], region)


def _cast(node: Operation, region: Region, read: Read) -> torch.Tensor:
    return read(node.args[0], region).to(node.dtype)


def _stack(node: Operation, region: Region, read: Read) -> torch.Tensor | None:
    tensors = node.args[0]
    if not all(isinstance(tensor, Node) for tensor in tensors):
        return None
    dim = _argument(node, 1, "dim", 0) % len(region)
    first, count = region[dim]
    inner = region[:dim] + region[dim + 1 :]
    return torch.stack([read(tensor, inner) for tensor in tensors[first : first + count]], dim)


def _cat(node: Operation, region: Region, read: Read) -> torch.Tensor | None:
    tensors = node.args[0]
    if not all(isinstance(tensor, Node) and len(tensor.shape) == len(region) for tensor in tensors):
        return None
    dim = _argument(node, 1, "dim", 0) % len(region)
    first, count = region[dim]
    chunks, start = [], 0
    for tensor in tensors:
        begin, end = max(first, start), min(first + count, start + tensor.shape[dim])
        if begin < end:
            chunks.append(read(tensor, (*region[:dim], (begin - start, end - begin), *region[dim + 1 :])))
        start += tensor.shape[dim]
    return torch.cat(chunks, dim)


def _transpose(node: Operation, region: Region, read: Read) -> torch.Tensor:
    a, b = (dim % len(region) for dim in node.args[1:3])
    inner = list(region)
    inner[a], inner[b] = inner[b], inner[a]
    return read(node.args[0], tuple(inner)).transpose(a, b)


def _select(node: Operation, region: Region, read: Read) -> torch.Tensor:
    source, dim, index = node.args
    dim %= len(source.shape)
    inner = (*region[:dim], (index % source.shape[dim], 1), *region[dim:])
    return read(source, inner).squeeze(dim)


def _slice(node: Operation, region: Region, read: Read) -> torch.Tensor | None:
    source, dim = node.args[0], _argument(node, 1, "dim", 0)
    dim %= len(region)
    start, step = _argument(node, 2, "start", None) or 0, _argument(node, 4, "step", 1)
    if step != 1:
        return None
    start = max(0, start + source.shape[dim]) if start < 0 else start
    return read(source, _shifted(region, dim, start))


def _split(node: Operation, region: Region, read: Read) -> torch.Tensor:
    source, sizes, dim = node.args[0], node.args[1], _argument(node, 2, "dim", 0) % len(region)
    index: Any = node.index  # an operator with several results has one node for each
    start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
    return read(source, _shifted(region, dim, start))


def _shifted(region: Region, dim: int, by: int) -> Region:
    first, count = region[dim]
    return (*region[:dim], (first + by, count), *region[dim + 1 :])


def _argument(node: Operation, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


#: Operator -> function that reads a region of its result from its inputs; None means: compute the full result instead.
_PUSHED_DOWN: dict[Any, Callable[[Operation, Region, Read], torch.Tensor | None]] = {
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
