"""``megatron_fsdp_strategy_parallelize``: tensor parallelism first, then megatron-fsdp, then the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ...core.mesh import MeshAxes
from ...core.options import GivenPlan, ParallelOptions
from ...core.ranks import raise_on_all_ranks
from ...fsdp.options import on_device
from ...optim.handoff import check_optimizers
from ...peft.late_adapters import adding
from ...peft.operations import manage_adapters
from ...strategies.context import ParallelizeContext
from .options import MegatronOptions
from .sharding import managed_by_megatron
from .strategy import MegatronFsdpStrategy


def megatron_fsdp_strategy_parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer | None = None,
    megatron_fsdp_unit_modules: Sequence[str | type[nn.Module]] | None = None,
    tp_shard_plan: GivenPlan = None,
    zero_dp_strategy: int = 3,
    init_fsdp_with_meta_device: bool = False,
    grad_reduce_in_fp32: bool = False,
    preserve_fp32_weights: bool = False,
    overlap_grad_reduce: bool = True,
    overlap_param_gather: bool = True,
    check_for_nan_in_grad: bool = True,
    average_in_collective: bool = False,
    disable_bucketing: bool = False,
    calculate_per_token_loss: bool = False,
    keep_fp8_transpose_cache: bool = False,
    nccl_ub: bool = False,
    fsdp_double_buffer: bool = False,
    dp_shard_dim: str = "dp",
    tp_dim: str = "tp",
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Apply tensor parallelism, then megatron-fsdp, to ``model`` and, if given, ``optimizer``. Collective.

    Args:
        model: a Hugging Face model, plain or PEFT-wrapped, the same on every rank.
        device_mesh: named axes. Ranks of a ``cp`` axis shard and reduce together with those of ``dp_shard_dim``; those
            of a ``dp_replicate`` axis hold replicas (HSDP).
        optimizer: keeps its groups and settings and gets the sharded parameters.
        tp_shard_plan: a plan in any form that ``AutoParallelismConfig(tp_plan=...)`` takes. None: one is selected, the
            model's own first; with more than one tp rank it is an error if there is none.
        dp_shard_dim: axis to shard over (a flattened one such as ``dp_cp`` too).
        tp_dim: axis of tensor parallelism.
        megatron_fsdp_unit_modules, zero_dp_strategy, init_fsdp_with_meta_device, grad_reduce_in_fp32,
        preserve_fp32_weights, overlap_grad_reduce, overlap_param_gather, check_for_nan_in_grad, average_in_collective,
        disable_bucketing, calculate_per_token_loss, keep_fp8_transpose_cache, nccl_ub, fsdp_double_buffer: see
        :class:`.options.MegatronOptions`.

    Returns:
        ``(model, optimizer)``. The model is the ``MegatronFSDP`` around the given one; with one data-parallel rank it
        is the given one, with a warning and without megatron-fsdp, as in the reference. The optimizer is the given one,
        or None.

    Raises:
        AutoParallelError: an option, axis, class or plan is not supported; on all ranks, before anything is changed.
    """
    with raise_on_all_ranks("megatron_fsdp_strategy_parallelize"):
        options = MegatronOptions(
            megatron_fsdp_unit_modules=megatron_fsdp_unit_modules,  # type: ignore[arg-type]
            zero_dp_strategy=zero_dp_strategy,
            init_fsdp_with_meta_device=init_fsdp_with_meta_device,
            grad_reduce_in_fp32=grad_reduce_in_fp32,
            preserve_fp32_weights=preserve_fp32_weights,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
            check_for_nan_in_grad=check_for_nan_in_grad,
            average_in_collective=average_in_collective,
            disable_bucketing=disable_bucketing,
            calculate_per_token_loss=calculate_per_token_loss,
            keep_fp8_transpose_cache=keep_fp8_transpose_cache,
            nccl_ub=nccl_ub,
            fsdp_double_buffer=fsdp_double_buffer,
        )
        strategy = MegatronFsdpStrategy(options, dp_shard_dim, tp_dim, optimizer is not None)
        context = ParallelizeContext(
            model=model,
            mesh=device_mesh,
            device=on_device(device_mesh.device_type),
            axes=MeshAxes(shard=dp_shard_dim, tp=tp_dim),
            options=ParallelOptions(tp_plan=tp_shard_plan),
            sums_after_backward=True,
        )
        strategy.plan(context)
        names = check_optimizers(model, [optimizer])[0] if optimizer is not None else []
    before = dict(model.named_parameters())
    strategy.compare_ranks(context)
    strategy.carry_out(context)
    if optimizer is not None:
        strategy.switch_optimizer(context, optimizer, names, before)
    managed = managed_by_megatron(context.model)
    if managed is None:  # one data-parallel rank, so FSDP2 manages the model
        manage_adapters(
            model,
            context.tensor_parallel,
            on_unload=lambda plain: None,
            add=lambda original: adding(model, context, original, done=lambda: None),
        )
    return (context.model if managed is None else managed.wrapper), optimizer
