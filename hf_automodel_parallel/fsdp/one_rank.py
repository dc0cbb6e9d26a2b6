"""Tensor parallelism alone: one data-parallel rank, for which FSDP2 has nothing to shard, to gather or to reduce.

On an axis of one rank FSDP2 would copy gradients into a buffer that it reduces with nobody, and run its hooks around
each unit. So the parameters stay what tensor parallelism has made of them, DTensors on the tp axis, and the root gets
the interface of an ``FSDPModule`` without units: callers (Accelerate's ``no_sync``, TRL's weight sync) need not ask
whether FSDP2 is there.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from .options import ShardingOptions, on_device


def nothing_to_shard(model: nn.Module, mesh: DeviceMesh, options: ShardingOptions) -> bool:
    """True if FSDP2 over the data-parallel ``mesh`` would change neither a value nor a dtype nor a device.

    All parameters of ``model`` are DTensors on the tp axis. FSDP2's casts (mixed precision) and its offload to the CPU
    do something on one rank, too, and a caller's own ``fully_shard_fn`` has to be called.
    """
    low = options.mp_policy.param_dtype
    return (
        mesh.size() == 1
        and type(options.offload_policy) is OffloadPolicy
        and options.fully_shard_fn is None
        and not options.ignored_parameters
        and (low is None or all(p.dtype == low for p in model.parameters() if p.is_floating_point()))
        and options.mp_policy.output_dtype in (None, low)
        and all(isinstance(p, DTensor) for p in model.parameters())
    )


def manage_without_units(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give ``model`` what FSDP2 would have given it, apart from units: buffers on the device, and its interface."""
    device = on_device(mesh.device_type)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    cls = type(model)
    model.__class__ = type(cls.__name__, (WithoutUnits, cls), {"__module__": cls.__module__})


class WithoutUnits(FSDPModule):
    """The interface of an ``FSDPModule`` for a module without FSDP units: there is nothing to do in any method."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An object of the class that was extended, as for ``FSDPModule``: where a module container is sliced."""
        original = next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))
        made = original.__new__(original)
        made.__init__(*args, **kwargs)  # type: ignore[misc]
        return made

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """``Module.to`` and its kind; the one of ``FSDPModule`` asks for the state of units."""
        return super(FSDPModule, self)._apply(*args, **kwargs)  # type: ignore[misc]

    def unshard(self, async_op: bool = False) -> Any:
        """Parameters are never sharded over data-parallel ranks; the handle has nothing to wait for."""
        return _Done() if async_op else None

    def _get_fsdp_state(self) -> Any:
        """What ``torch.distributed.fsdp.register_fsdp_forward_method`` asks for: it wraps ``generate`` for many."""
        return types.SimpleNamespace(
            _pre_forward=lambda _, args, kwargs: (args, kwargs), _post_forward=lambda _, args, output: output
        )


class _Done:
    def wait(self) -> None:
        """Return at once."""


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


for _name, _method in list(vars(FSDPModule).items()):
    if not _name.startswith("_") and callable(_method) and _name not in vars(WithoutUnits):
        setattr(WithoutUnits, _name, _do_nothing)
