"""Counting collectives, by kind and by the ranks that take part.

Two counters, because neither sees everything (measured with torch 2.13 and gloo):

* `CollectiveCounter` and `count_collectives` watch the dispatcher, where a collective still carries its process group,
  so tensor-parallel traffic can be told from data-parallel traffic. ``CommDebugMode`` of torch watches the same place
  but throws the group away. They see eager c10d calls, functional collectives and what DTensor and FSDP2 issue, in
  forward and backward. They must **not** surround compiled code: with any dispatch mode active, Dynamo (backend
  "aot_eager" and "inductor" alike) runs the function eagerly, so that eager collectives are counted, *and* from then
  on it skips the function for good: later calls outside the mode stay eager until ``torch.compiler.reset()``.
* `count_collectives_profiler` counts the c10d operators the profiler records. Functional collectives end in one as
  well, from eager as from compiled code, and compiled code stays compiled. Tracing runs no c10d operator, so the call
  that compiles is counted correctly too. The profiler does not record the group, and it slows the call down.

Collectives on Python objects count as the tensor collectives they consist of (``all_gather_object``: two all-gathers).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_automodel_parallel.accelerate_plugin.prepared import prepared

C10D_OPERATORS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_coalesced_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "c10d::alltoall_": "all_to_all",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::reduce_": "reduce",
    "c10d::gather_": "gather",
    "c10d::scatter_": "scatter",
    "c10d::barrier": "barrier",
    "c10d::send": "send",
    "c10d::recv_": "recv",
}

FUNCTIONAL_OPERATORS = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_reduce_coalesced": "all_reduce",
    "_c10d_functional::all_reduce_coalesced_": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::all_gather_into_tensor_out": "all_gather",
    "_c10d_functional::all_gather_into_tensor_coalesced": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::reduce_scatter_tensor_out": "reduce_scatter",
    "_c10d_functional::reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_c10d_functional::broadcast": "broadcast",
    "_c10d_functional::broadcast_": "broadcast",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_dtensor::shard_dim_alltoall": "all_to_all",
}

_ALL_OPERATORS = C10D_OPERATORS | FUNCTIONAL_OPERATORS


@dataclass
class CollectiveCounts:
    """Collectives this rank took part in. `by_ranks` maps the global ranks of a group to the counts by kind. `largest`
    has the number of elements of the largest tensor in a collective of a kind.
    """

    by_ranks: dict[tuple[int, ...], Counter[str]] = field(default_factory=dict)
    largest: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def total(self) -> Counter[str]:
        return sum(self.by_ranks.values(), Counter())

    def on(self, group: dist.ProcessGroup | DeviceMesh) -> Counter[str]:
        """The counts of a group or of a one-dimensional mesh; groups of the same ranks are not told apart."""
        if isinstance(group, DeviceMesh):
            group = group.get_group()
        return self.by_ranks.get(tuple(dist.get_process_group_ranks(group)), Counter())


class CollectiveCounter(TorchDispatchMode):
    """A context in which collectives are added up in `counts`."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.counts = CollectiveCounts()

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # DTensor then issues its collectives on plain tensors, in this mode
        kind = _ALL_OPERATORS.get(func.name())
        if kind is not None:
            ranks = tuple(dist.get_process_group_ranks(_group_of_call(func, args, kwargs)))
            self.counts.by_ranks.setdefault(ranks, Counter())[kind] += 1
        result = func(*args, **kwargs)
        if kind is not None:
            sizes = [x.numel() for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            self.counts.largest[kind] = max([self.counts.largest[kind], *sizes])
        return result


def _group_of_call(func: Any, args: tuple, kwargs: dict[str, Any]) -> dist.ProcessGroup:
    names = [argument.name for argument in func._schema.arguments]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    group = arguments["process_group"] if "process_group" in names else arguments["group_name"]
    return _resolve_process_group(group) if isinstance(group, str) else dist.ProcessGroup.unbox(group)


def count_collectives(fn: Callable[[], Any]) -> CollectiveCounts:
    """The collectives of one call of `fn`, which must not run compiled code (see the module's docstring)."""
    with CollectiveCounter() as counter:
        fn()
    return counter.counts


def count_collectives_profiler(fn: Callable[[], Any]) -> Counter[str]:
    """The collectives of one call of `fn` by kind, whether its code is compiled or not."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fn()
    counts: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key in C10D_OPERATORS:
            counts[C10D_OPERATORS[event.key]] += event.count
    return counts


@contextmanager
def flush_deferred(model: nn.Module) -> Iterator[None]:
    """A context in which Partial gradients, and those of replicas, wait, as in the backwards of a step but the last."""
    context = prepared(model).context
    waiting = [] if context.tensor_parallel is None else [context.tensor_parallel.partial]
    waiting += [] if context.replicas is None else [context.replicas]
    for part in waiting:
        part.deferred = True
    yield
    for part in waiting:
        part.deferred = False
