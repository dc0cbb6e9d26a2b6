"""The ranks of a tp axis as threads of one process: the same boundaries and regions, without processes and without
DTensors.

A plan can so be compared with the whole model anywhere, before any process group does anything, in a fraction of a
second on a small model. Only the collectives are others (they meet at a barrier), and a parameter is its local part at
rest, too.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.sharding_spec import REPLICATED, ShardingSpec
from ..errors import PlanError
from ..tensor_parallel.thread_group import _PATIENCE, ThreadGroup


def run_ranks(size: int, function: Callable[[ThreadGroup], Any]) -> list[Any]:
    """Call ``function`` on ``size`` threads at once and return what each returned.

    Raises:
        Exception: the first one that a rank raised by itself; the others, which wait for it, are released.
    """
    barrier, slots = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(rank, size, barrier, slots))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # of the model's code, which may raise anything
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _PATIENCE)
    if errors:
        raise errors[0]
    if barrier.broken or any(thread.is_alive() for thread in threads):
        raise PlanError("the ranks of the miniature do not make the same collectives.")
    return results


def parallel_copy(model: nn.Module, spec: ShardingSpec, layers: list[str], mesh: ThreadGroup) -> nn.Module:
    """A copy of ``model`` that is one rank of ``mesh``: local parameters, boundaries and regions.

    Args:
        model: the whole model on the CPU; only read.
        spec: its resolved plan, without parts that run on an engine of torch's, and without sequence parallelism.
        layers: names of the layers, each one region.
        mesh: the rank.

    Raises:
        PlanError: a part of the plan runs on another engine.
    """
    from ..core.shard_layout import local_slice
    from ..tensor_parallel.apply import (
        TensorParallelState,
        install_boundary,
        install_head_arguments,
        install_local_parameters,
    )
    from ..tensor_parallel.grad_sync import PartialGradients
    from ..tensor_parallel.head_counts import set_local_counts

    foreign = [name for name, module in spec.modules.items() if module.native_style is not None]
    if foreign:
        raise PlanError(f"{foreign[0]} has a style that only processes can run, so it cannot be tried on threads.")
    result = copy.deepcopy(model)
    axis: Any = mesh
    state = TensorParallelState(axis, PartialGradients(axis), local=True)
    for name, module in spec.modules.items():
        install_boundary(result, name, module, state)
    install_head_arguments(result, spec, state)
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for owner_name, owner in result.named_modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            name = f"{owner_name}.{key}" if owner_name else key
            place = spec.parameters.get(name, REPLICATED)
            if id(parameter) not in made:
                part = local_slice(parameter.detach(), place, mesh.rank, mesh.size())
                made[id(parameter)] = (parameter, nn.Parameter(part, parameter.requires_grad))
            owner._parameters[key] = made[id(parameter)][1]
            state.place(owner, name, place)
    for name, attributes in spec.head_counts.items():
        set_local_counts(result.get_submodule(name), attributes, mesh.size())
    install_local_parameters(result, [result.get_submodule(name) for name in layers], state, {})
    return result
