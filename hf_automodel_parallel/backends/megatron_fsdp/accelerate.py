"""``Accelerator.prepare`` with ``backend="megatron_fsdp"``: the strategy, the methods that Accelerate calls on an FSDP2
model, and the check that an optimizer is element-wise.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...core.options import ParallelOptions
from ...errors import ConfigError, UnsupportedError
from ...optim.sharding_check import TOLERANCE, like_on, run_steps, uneven_numbers
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
        accelerator: the Accelerator; its ``fsdp_plugin`` must not contradict ``asked``.
        asked: the user's options.
        usual: the strategy of the model with FSDP2.

    Raises:
        UnsupportedError: the model has a family strategy, which is written for FSDP2.
        ConfigError: the ``fsdp_plugin`` contradicts the options of megatron-fsdp.
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
    """Give a model that megatron-fsdp manages the FSDP2 methods that Accelerate calls; other models are unchanged."""
    managed = managed_by_megatron(model)
    if managed is None:
        return
    # Called by Accelerator.no_sync and accumulate.
    model.set_requires_gradient_sync = managed.set_gradient_sync  # type: ignore[assignment]


def owner_of(models: Iterable[nn.Module], parameters: list[Any]) -> MegatronModel | None:
    """The model among ``models`` that megatron-fsdp manages and that has all ``parameters``; None if there is none."""
    for model in models:
        managed = managed_by_megatron(model)
        if managed is not None and parameters:
            known = {id(p) for p in managed.parameters.values()}
            if all(id(p) in known for p in parameters):
                return managed
    return None


def sharded_parameters(managed: MegatronModel) -> dict[int, nn.Parameter]:
    """``id`` of a parameter object -> sharded parameter; for the sharded objects and for those used in forward."""
    sharded = managed.parameters
    raw = dict(managed.wrapper.raw_param)
    return {id(raw[name]): p for name, p in sharded.items()} | {id(p): p for p in sharded.values()}


def full_state_dict(managed: MegatronModel, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict with full tensors, on the CPU of ranks with ``keep``; empty on the others. Collective."""
    state = managed.model.state_dict()
    return {name: value.detach().cpu() for name, value in state.items()} if keep else {}


def loading_full_tensors(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which ``model`` has full parameters, for code that loads a checkpoint into it. Collective.

    Does nothing if megatron-fsdp does not manage ``model``.
    """
    managed = managed_by_megatron(model)
    return nullcontext() if managed is None or managed.states is None else managed.states.full_parameters()


# ---- is an optimizer element-wise? No DTensor operator is right on megatron-fsdp's uneven shards -------------------


_STEPS = 3


def check_elementwise(
    optimizers: list[torch.optim.Optimizer], names: list[list[list[str]]], shapes: dict[str, torch.Size]
) -> None:
    """Raise unless every optimizer computes the same on two chunks of a parameter as on the full one. Not collective.

    Args:
        optimizers: the user's optimizers.
        names: ``names[optimizer][group][i]``, names of their parameters.
        shapes: full shape of each parameter, by name.

    Raises:
        UnsupportedError: an optimizer needs a statistic over the full parameter (a norm, a factored moment).
        PrepareError: the check cannot run the optimizer.
    """
    with torch.random.fork_rng(devices=[]):
        for optimizer, groups in zip(optimizers, names, strict=True):
            kinds = [sorted({len(shapes[name]) for name in group}) for group in groups]
            _check_one(optimizer, kinds)


def _check_one(optimizer: torch.optim.Optimizer, kinds: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small tensors with the same numbers of dimensions, because an optimizer may decide by them.
    shapes = [(48,) + (16,) * (ndim - 1) for group in kinds for ndim in group]
    if not shapes:
        return
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[uneven_numbers(shape, generator) for shape in shapes] for _ in range(_STEPS)]

    def cut(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part.clone() for tensor in tensors for part in (tensor[:11], tensor[11:])]

    full = [nn.Parameter(value.clone()) for value in values]
    run_steps(like_on(optimizer, kinds, full), full, gradients)
    parts = [nn.Parameter(part) for part in cut(values)]
    doubled = [[ndim for ndim in group for _ in range(2)] for group in kinds]
    run_steps(like_on(optimizer, doubled, parts), parts, [cut(step) for step in gradients])
    for index, (value, expected) in enumerate(zip(values, full, strict=True)):
        result = torch.cat([part.detach() for part in parts[2 * index : 2 * index + 2]])
        update = (expected.detach() - value).norm().item()
        if not (expected.detach() - result).norm().item() <= TOLERANCE * update + 1e-6 * value.norm().item():
            raise UnsupportedError(
                f"{type(optimizer).__name__} needs a statistic over whole parameters, which megatron-fsdp cuts at any "
                f"row. Use an element-wise optimizer (AdamW, SGD, Adagrad, RMSprop, Lion, ...), or backend='fsdp2'. If "
                f"you know better, set check_optimizer=False."
            )
