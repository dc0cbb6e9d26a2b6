"""Counted, not timed: collectives and the bytes that a rank sends, and what a forward keeps for its backward."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
_OPERATORS = {
    "all_reduce": ("_c10d_functional::all_reduce", "c10d::allreduce_"),
    "all_gather": ("_c10d_functional::all_gather_into_tensor", "c10d::allgather_", "c10d::_allgather_base_"),
    "reduce_scatter": (
        "_c10d_functional::reduce_scatter_tensor",
        "c10d::reduce_scatter_",
        "c10d::_reduce_scatter_base_",
    ),
}
_BY_OPERATOR = {operator: kind for kind, operators in _OPERATORS.items() for operator in operators}


class Collectives(TorchDispatchMode):
    """Counts collectives by kind, and the bytes that each rank sends (ring algorithms: an all-reduce moves its tensor
    twice).
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kind = _BY_OPERATOR.get(function.name().partition(".")[0])
        if kind is not None:
            whole = max((t.numel() * t.element_size() for t in _tensors((args, result))), default=0)
            ranks = _group_size(args)
            self.count[kind] += 1
            self.bytes[kind] += whole * (ranks - 1) // ranks * (2 if kind == "all_reduce" else 1)
        return result

    def figures(self) -> dict[str, Any]:
        """Per kind the number, and the bytes of all of them."""
        return {**{kind: self.count[kind] for kind in KINDS}, "bytes": sum(self.bytes.values())}


def _group_size(args: Any) -> int:
    """Of the group that a collective operator is called with: an object, or the name in the functional ones."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value).size()
            except RuntimeError:  # another object, such as the reduction's kind
                continue
    for value in reversed(args):
        if isinstance(value, str) and value not in _REDUCTIONS:
            group: dist.ProcessGroup = torch._C._distributed_c10d._resolve_process_group(value)
            return group.size()
    return dist.get_world_size()


_REDUCTIONS = ("sum", "avg", "max", "min", "product")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


class Storages(TorchDispatchMode):
    """Knows every storage that operators allocate, to say what is alive of them later.

    Saved-tensor hooks would not do: those of ``sequence_parallel_regather`` and of checkpoints hide what they keep from
    others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = _local(tensor).untyped_storage()
            self._seen[id(storage)] = weakref.ref(storage)  # torch keeps the Python object as long as the memory
        return result

    def alive(self, apart_from: Iterable[torch.Tensor]) -> int:
        """Bytes of those that are still alive, without the ones of the given tensors."""
        gc.collect()
        known = {_local(tensor).untyped_storage().data_ptr() for tensor in apart_from}
        alive = [storage for reference in self._seen.values() if (storage := reference()) is not None]
        return sum(storage.nbytes() for storage in alive if storage.data_ptr() not in known)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
