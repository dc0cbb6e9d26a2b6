"""How FSDP2 behaves on one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy


@dataclass
class ShardingOptions:
    """How FSDP2 behaves, collected from the config, the ``fsdp_plugin`` and ``mixed_precision``.

    Attributes:
        mp_policy: dtypes of unsharded parameters and reduced gradients.
        offload_policy: keep shards on the CPU or not.
        reshard_after_forward: reshard a unit after its forward.
        forward_prefetch: number of units to all-gather ahead in forward.
        backward_prefetch: number of units to all-gather ahead in backward.
        ignored_parameters: parameters that FSDP2 does not manage.
        minimum_unit_size: make units of modules with at least this many parameters instead of layers (size-based
            policy), or None.
        own_dtype: names of parameters that compute in their stored dtype under every ``mp_policy``.
        fully_shard_fn: called in place of torch's ``fully_shard``, with its arguments; None for torch's.
        towers: where the parameters of modality encoders are kept, see
            :data:`~..core.modality_encoders.PLACEMENTS`; None for the first of these.
        read_by_other_modules: names of parameters that forwards of other modules read; they stay with the root.
        replicated_adapters: names of the adapters that each data-parallel rank has a replica of, outside of FSDP2.
        cast_between_layers: cast the inputs of layers to ``param_dtype``, too, not only the inputs of the model.
    """

    mp_policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload_policy: OffloadPolicy = field(default_factory=OffloadPolicy)
    reshard_after_forward: bool = True
    forward_prefetch: int = 1
    backward_prefetch: int = 2
    ignored_parameters: set[nn.Parameter] = field(default_factory=set)
    minimum_unit_size: int | None = None
    own_dtype: frozenset[str] = frozenset()
    read_by_other_modules: frozenset[str] = frozenset()
    fully_shard_fn: Callable[..., Any] | None = None
    cast_between_layers: bool = True
    towers: str | None = None
    replicated_adapters: frozenset[str] = frozenset()

    def compute_dtype(self, name: str) -> torch.dtype | None:
        """The dtype to which the replicated parameter ``name`` is cast for compute, as FSDP2 casts others; None: none.

        Not a parameter without dimensions, which computes in its own dtype.
        """
        managed = name in self.replicated_adapters and name not in self.own_dtype
        return self.mp_policy.param_dtype if managed else None

    def shard_device(self, device: torch.device) -> torch.device:
        """Where shards are between steps: the CPU with FSDP2's CPU offload, else ``device``, where a rank computes."""
        return torch.device("cpu") if type(self.offload_policy) is CPUOffloadPolicy else device


def on_device(kind: str) -> torch.device:
    """The device of ``kind`` ("cpu", "cuda") that this process computes on."""
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def without_pinning(policy: OffloadPolicy, device: torch.device) -> OffloadPolicy:
    """``policy`` without the pinned memory that training on the CPU cannot have."""
    return CPUOffloadPolicy(pin_memory=False) if device.type == "cpu" and type(policy) is CPUOffloadPolicy else policy
