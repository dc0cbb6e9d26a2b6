"""Counted on the way through the operators: collectives by kind and mesh axis, and the memory that is alive."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..compat import TorchDispatchMode
from ..core.mesh import JOINED_AXES
from ..tensor_parallel.vocab_parallel.logits import ShardedLogits

_OPERATORS = {
    "all_reduce": (
        "_c10d_functional::all_reduce",
        "_c10d_functional::all_reduce_",
        "_c10d_functional::all_reduce_coalesced",
        "_c10d_functional::all_reduce_coalesced_",
        "c10d::allreduce_",
        "c10d::allreduce_coalesced_",
    ),
    "all_gather": (
        "_c10d_functional::all_gather_into_tensor",
        "_c10d_functional::all_gather_into_tensor_out",
        "_c10d_functional::all_gather_into_tensor_coalesced",
        "c10d::allgather_",
        "c10d::_allgather_base_",
        "c10d::allgather_coalesced_",
        "c10d::allgather_into_tensor_coalesced_",
    ),
    "reduce_scatter": (
        "_c10d_functional::reduce_scatter_tensor",
        "_c10d_functional::reduce_scatter_tensor_out",
        "_c10d_functional::reduce_scatter_tensor_coalesced",
        "c10d::reduce_scatter_",
        "c10d::_reduce_scatter_base_",
        "c10d::reduce_scatter_tensor_coalesced_",
    ),
    "broadcast": ("_c10d_functional::broadcast", "_c10d_functional::broadcast_", "c10d::broadcast_"),
    "all_to_all": ("_c10d_functional::all_to_all_single", "c10d::alltoall_", "c10d::alltoall_base_"),
}
#: Tensors around other tensors, whose operators run operators of these.
_WRAPPERS = (DTensor, ShardedLogits)
_BY_OPERATOR = {operator: kind for kind, operators in _OPERATORS.items() for operator in operators}


@dataclass
class Calls:
    """Collectives of one kind on one mesh axis.

    Attributes:
        count: number of calls.
        tensor_bytes: bytes of the full tensors: what is reduced, or what an all-gather returns.
        sent_bytes: bytes that each rank sends with ring algorithms; an all-reduce moves its tensor twice.
    """

    count: int = 0
    tensor_bytes: int = 0
    sent_bytes: int = 0


class Collectives(TorchDispatchMode):
    """Counts collectives by kind and mesh axis; one of a list of tensors counts once, with all their bytes.

    Args:
        mesh: the root mesh, for the names of the axes; None: all collectives are those of "all" ranks.

    Attributes:
        calls: (kind, axis) -> calls. The kind is "all_reduce", "all_gather", "reduce_scatter", "broadcast" or
            "all_to_all"; the axis that of the group, "all" for a group of none.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.calls: dict[tuple[str, str], Calls] = {}
        self._axes = {} if mesh is None else _axes_of(mesh)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, _WRAPPERS) for kind in types):
            return NotImplemented  # they run their collectives, which come here
        result = function(*args, **(kwargs or {}))
        kind = _BY_OPERATOR.get(function.name().partition(".")[0])
        if kind is None:
            self.seen(function, args, None)
            return result
        # The full tensors are the larger side, each side a tensor or a list of tensors.
        whole = max(sum(t.numel() * t.element_size() for t in tensors_in(side)) for side in (*args, result))
        axis, ranks = self._group(args)
        sent = whole * (ranks - 1) // ranks * (2 if kind == "all_reduce" else 1)
        calls = self.calls.setdefault((kind, axis), Calls())
        calls.count += 1
        calls.tensor_bytes += whole
        calls.sent_bytes += sent
        self.seen(function, args, (kind, axis, whole, sent))
        return result

    def seen(self, function: Any, args: Any, call: tuple[str, str, int, int] | None) -> None:
        """For subclasses: an operator has run; ``call`` of a collective is its kind, axis, full bytes, sent bytes."""

    def _group(self, args: Any) -> tuple[str, int]:
        """Name and size of the group that a collective operator is called with: an object, or its name in the
        functional ones.
        """
        for value in reversed(args):
            if isinstance(value, torch.ScriptObject):
                try:
                    group = dist.ProcessGroup.unbox(value)
                except RuntimeError:  # another object, such as the reduction's kind
                    continue
                return self._axes.get(group.group_name, ("all", group.size()))
            if isinstance(value, str) and value in self._axes:
                return self._axes[value]
        return "all", dist.get_world_size()


def _axes_of(mesh: DeviceMesh) -> dict[str, tuple[str, int]]:
    """Name of a process group -> the mesh axis, or joined axes, that it belongs to, and its size."""
    found: dict[str, tuple[str, int]] = {}
    for name in (*JOINED_AXES, *(mesh.mesh_dim_names or ())):
        try:
            group = mesh[name].get_group()
        except (KeyError, RuntimeError):  # no such joined axis
            continue
        found[group.group_name] = (name, group.size())
    return found


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


class Memory(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most in each phase.

    A storage that FSDP2 resizes holds an unsharded parameter: :attr:`gathered` counts those apart.

    Attributes:
        now: bytes alive.
        gathered: bytes of unsharded parameters alive; right from the second step on, because a storage is known after
            it was resized once.
        phase: name of the current phase.
        peaks: phase -> the most bytes in it.
        most_gathered: the most bytes of unsharded parameters since :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.gathered, self.most_gathered = 0, 0, 0
        self.peaks: dict[str, int] = {}
        self.phase = ""
        self._known: dict[int, tuple[Any, int]] = {}
        self._resized: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, _WRAPPERS) for kind in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        self.add(tensors_in(result))
        if function.name().startswith("_c10d_functional::wait_tensor"):
            # It returns its argument; a fake one is a new storage.
            for tensor in tensors_in(args):
                if id(tensor.untyped_storage()) in self._known and tensor is not result:
                    self._set(id(tensor.untyped_storage()), 0)
        return result

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of ``tensors``, each once."""
        for tensor in tensors:
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, ShardedLogits):
                continue  # the shape of the full logits, and no memory of its own
            storage = tensor.untyped_storage()
            key = id(storage)  # torch keeps the Python object as long as the memory
            if key not in self._known:
                self._known[key] = (weakref.ref(storage, lambda _, key=key: self._drop(key)), 0)  # type: ignore[misc]
            self._set(key, storage.nbytes())

    def restart(self) -> None:
        """Forget the peaks."""
        self.peaks, self.most_gathered = {}, self.gathered

    @contextlib.contextmanager
    def watching_sizes(self) -> Iterator[None]:
        """FSDP2 frees and allocates unsharded parameters by resizing their storages, which no operator shows."""
        resize, memory = torch.UntypedStorage.resize_, self

        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in memory._known:
                if id(storage) not in memory._resized:
                    memory._resized.add(id(storage))
                    memory.gathered += memory._known[id(storage)][1]
                memory._set(id(storage), storage.nbytes())
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resized):
            yield

    def _set(self, key: int, size: int) -> None:
        reference, before = self._known[key]
        self._known[key] = (reference, size)
        self.now += size - before
        if key in self._resized:
            self.gathered += size - before
            self.most_gathered = max(self.most_gathered, self.gathered)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def _drop(self, key: int) -> None:
        _, size = self._known.pop(key)
        self.now -= size
        if key in self._resized:
            self._resized.discard(key)
            self.gathered -= size
