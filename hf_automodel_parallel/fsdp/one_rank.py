"""Tensor parallelism alone: one data-parallel rank, for which FSDP2 has nothing to shard, to gather or to reduce.

On an axis of one rank FSDP2 would copy gradients into a buffer that it reduces with nobody, and run its hooks around
each unit. So the parameters stay what tensor parallelism has made of them, DTensors on the tp axis, and the root gets
the interface of an ``FSDPModule`` without units: callers (Accelerate's ``no_sync``, TRL's weight sync) need not ask
whether FSDP2 is there.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from .. import compat
from ..errors import UnsupportedError
from .options import ShardingOptions, on_device


def nothing_to_shard(model: nn.Module, mesh: DeviceMesh, options: ShardingOptions) -> bool:
    """True if FSDP2 over the data-parallel ``mesh`` would change neither a value nor a dtype nor a device.

    All parameters of ``model`` are DTensors on the tp axis. On one rank, too, FSDP2 casts parameters, inputs, outputs
    and accumulated gradients (each dtype of a policy), offloads to the CPU, and has to be called by a caller's own
    ``fully_shard_fn``.
    """
    policy = options.mp_policy
    return (
        mesh.size() == 1
        and (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (None, None, None)
        and type(options.offload_policy) is OffloadPolicy
        and options.fully_shard_fn is None
        and not options.ignored_parameters
        and all(isinstance(p, DTensor) for p in model.parameters())
    )


def manage_without_units(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give ``model`` what FSDP2 would have given it, apart from units: buffers on the device, and its interface."""
    device = on_device(mesh.device_type)
    for buffer in model.buffers():
        if not buffer.is_meta:
            buffer.data = buffer.to(device)  # the same object, which several modules may hold
    cls = type(model)
    model.__class__ = type(cls.__name__, (WithoutUnits, cls), {"__module__": cls.__module__})


class WithoutUnits(FSDPModule):
    """The interface of an ``FSDPModule`` for a module without FSDP units.

    Methods that say when FSDP2 shards, gathers or reduces have nothing to do. Those that would change what is reduced,
    and those of a later torch, raise.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An object of the class that was extended, as for ``FSDPModule``: where a module container is sliced."""
        original = next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))
        made = original.__new__(original)
        made.__init__(*args, **kwargs)  # type: ignore[misc]
        return made

    _apply, _get_fsdp_state = compat.apply_without_units, compat.state_without_units

    def unshard(self, async_op: bool = False) -> Any:
        """Parameters are never sharded over data-parallel ranks; the handle has nothing to wait for."""
        return types.SimpleNamespace(wait=_do_nothing) if async_op else None


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


#: Methods of ``FSDPModule`` that say when something happens, and with which buffers and streams.
_ABOUT_TIME = {
    "reshard",
    "reset_iter_state",
    "set_allocate_memory_from_process_group_for_comm",
    "set_force_sum_reduction_for_comms",
    "set_is_last_backward",
    "set_modules_to_backward_prefetch",
    "set_modules_to_forward_prefetch",
    "set_post_optim_event",
    "set_reduce_scatter_max_input_buffers",
    "set_requires_all_reduce",
    "set_requires_gradient_sync",
    "set_reshard_after_backward",
    "set_reshard_after_forward",
    "set_separate_reduce_scatter_group",
    "set_symm_mem_for_comm",
    "set_unshard_in_backward",
}


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError(
            f"{name}() on a model with tensor parallelism alone: FSDP2 reduces nothing there, so the call would have "
            f"no effect. Leave it out, or change the gradients between accelerator.backward and optimizer.step."
        )

    return refuse


for _name in vars(FSDPModule):
    if not _name.startswith("_") and _name not in vars(WithoutUnits):
        setattr(WithoutUnits, _name, _do_nothing if _name in _ABOUT_TIME else _refusal(_name))
