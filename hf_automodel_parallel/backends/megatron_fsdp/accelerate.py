"""``Accelerator.prepare`` with ``backend="megatron_fsdp"``: the strategy, and answers that Accelerate expects from
FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...core.options import ParallelOptions
from ...errors import ConfigError, UnsupportedError
from ...strategies.base import ParallelizationStrategy
from ...strategies.default import DefaultParallelizationStrategy
from .options import MegatronOptions
from .sharding import MegatronModel, managed_by_megatron
from .strategy import MegatronFsdpStrategy

if TYPE_CHECKING:
    from accelerate import Accelerator


def megatron_strategy(
    accelerator: Accelerator, asked: ParallelOptions, usual: ParallelizationStrategy
) -> MegatronFsdpStrategy:
    """The strategy for a config with ``backend="megatron_fsdp"``.

    Args:
        accelerator: its plugin must not contradict.
        asked: the user's options.
        usual: the strategy that the model has with FSDP2.

    Raises:
        UnsupportedError: the model has a strategy of its own, which is written for FSDP2.
        ConfigError: the ``fsdp_plugin`` asks for something else than the options of megatron-fsdp.
    """
    if type(usual) is not DefaultParallelizationStrategy:
        raise UnsupportedError(
            f"backend='megatron_fsdp': this model is parallelised by {type(usual).__name__}, which is written for "
            f"FSDP2. Use backend='fsdp2'."
        )
    options = MegatronOptions.from_mapping(asked.megatron_fsdp)
    if accelerator.state.fsdp_plugin.reshard_after_forward is False and options.zero_dp_strategy == 3:
        raise ConfigError(
            "fsdp_plugin.reshard_after_forward=False keeps parameters gathered, zero_dp_strategy=3 of megatron_fsdp "
            "frees them. Use megatron_fsdp={'zero_dp_strategy': 2}, or leave reshard_after_forward out."
        )
    names = accelerator.torch_device_mesh.mesh_dim_names or ()  # type: ignore[union-attr]
    return MegatronFsdpStrategy(options, "dp_shard", "tp" if "tp" in names else None)


def watch(model: nn.Module) -> None:
    """Let Accelerate's calls on a model that megatron-fsdp manages do what they do with FSDP2."""
    managed = managed_by_megatron(model)
    if managed is None:
        return
    # Called by Accelerator.no_sync and accumulate.
    model.set_requires_gradient_sync = managed.set_gradient_sync  # type: ignore[assignment]


def owner_of(models: Iterable[nn.Module], parameters: list[Any]) -> MegatronModel | None:
    """The managed model among ``models`` that all of ``parameters`` belong to, or None."""
    for model in models:
        managed = managed_by_megatron(model)
        if managed is not None and parameters:
            known = {id(p) for p in managed.parameters.values()}
            if all(id(p) in known for p in parameters):
                return managed
    return None


def sharded_parameters(managed: MegatronModel) -> dict[int, nn.Parameter]:
    """Sharded parameter by the ``id`` of each object that somebody may hold for it."""
    sharded = managed.parameters
    raw = dict(managed.wrapper.raw_param)
    return {id(raw[name]): p for name, p in sharded.items()} | {id(p): p for p in sharded.values()}


def whole_state(managed: MegatronModel, keep: bool) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU of the ranks that ``keep`` it; collective."""
    state = managed.model.state_dict()
    return {name: value.detach().cpu() for name, value in state.items()} if keep else {}


def loading_whole(model: nn.Module) -> AbstractContextManager[None]:
    """Lets code that loads a checkpoint into ``model`` meet whole parameters, if megatron-fsdp manages it."""
    managed = managed_by_megatron(model)
    return nullcontext() if managed is None or managed.states is None else managed.states.shown_whole()
