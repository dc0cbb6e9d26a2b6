"""``megatron_fsdp_strategy_parallelize``: tensor parallelism first, then megatron-fsdp, then the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..adapters import check_trainable_as_shards
from ..config import PLAN_SOURCES
from ..errors import UnsupportedError
from ..layers import dissect
from ..optimizer import check_optimizers, switch_parameters
from ..plan.layers import check_peft_method
from ..plan.resolve import resolve
from ..plan.selection import select_plan
from ..plan.spec import ShardingSpec
from ..plan.validate import validate
from ..quantization import quantization_method
from ..strategies.default import refuse_fused_loss, refuse_sharded
from ..synchronize import agreement, check_same_structure, equalize_parameters, synchronize_rng
from ..tensor_parallel.apply import TensorParallelState, apply_tensor_parallel, install_regions
from ..tensor_parallel.random import (
    draws_random_numbers,
    install_own_numbers,
    install_sharded_dropout,
    synchronize_at_first_forward,
)
from . import engine
from .mesh import layout_of
from .options import MegatronOptions
from .sharding import shard_with_megatron
from .units import unit_classes

logger = logging.getLogger(__name__)


def megatron_fsdp_strategy_parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer | None = None,
    megatron_fsdp_unit_modules: Sequence[str | type[nn.Module]] | None = None,
    tp_shard_plan: Mapping[str, Any] | str | None = None,
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
    """Apply tensor parallelism, then megatron-fsdp, to ``model`` and, if given, ``optimizer``. Every rank calls it alike.

    Args:
        model: a Hugging Face model, plain or PEFT-wrapped, the same on every rank.
        device_mesh: named axes. Ranks of a ``cp`` axis shard and reduce together with those of ``dp_shard_dim``; those of a
            ``dp_replicate`` axis hold copies (HSDP).
        optimizer: keeps its groups and settings and gets the sharded parameters.
        tp_shard_plan: a plan in any form that ``AutoParallelismConfig(tp_plan=...)`` takes. None: one is selected as everywhere,
            the model's own first; with tp ranks there is always one, or an error.
        dp_shard_dim: axis to shard over (a flattened one such as ``dp_cp`` too).
        tp_dim: axis of tensor parallelism.
        megatron_fsdp_unit_modules, zero_dp_strategy, init_fsdp_with_meta_device, grad_reduce_in_fp32, preserve_fp32_weights,
        overlap_grad_reduce, overlap_param_gather, check_for_nan_in_grad, average_in_collective, disable_bucketing,
        calculate_per_token_loss, keep_fp8_transpose_cache, nccl_ub, fsdp_double_buffer: see :class:`.options.MegatronOptions`.

    Returns:
        ``(model, optimizer)``. The model is the ``MegatronFSDP`` around the given one; with one data-parallel rank it is the
        given one, tensor parallel and unwrapped, with a warning, as in the reference. The optimizer is the given one, or None.

    Raises:
        AutoParallelError: on all ranks, before anything is changed: an option, axis, class or plan that cannot be honoured.
    """
    with agreement("megatron_fsdp_strategy_parallelize"):
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
        engine.load()
        tp_size = _size(device_mesh, tp_dim)
        check_model(model, options, tp_size)
        units = unit_classes(model, options.megatron_fsdp_unit_modules)
        names = check_optimizers(model, [optimizer])[0] if optimizer is not None else []
        spec = None
        if tp_size > 1:
            check_peft_method(model)
            spec = resolve(model, select_plan(model, tp_shard_plan, PLAN_SOURCES), tp_size)
            validate(model, spec, tp_size)
    with agreement("megatron_fsdp_strategy_parallelize"):
        layout = layout_of(device_mesh, dp_shard_dim, tp_dim)
    if device_mesh.size() == dist.get_world_size():  # else other ranks hold another part of the model
        check_same_structure(model, spec)
        equalize_parameters(model)
    device = device_of(device_mesh)
    before = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in before.items()}
    state = tensor_parallelize(model, spec, layout.tp_mesh, device)
    if layout.data_size == 1:
        logger.warning(
            "the axis %r of the device mesh has one rank, so megatron-fsdp is not used: the model is returned unwrapped", dp_shard_dim
        )
        model.to(device)
        _finish(model, state)
        if optimizer is not None:
            switch_parameters(optimizer, names, model, before)
            if state is not None:
                optimizer.register_step_pre_hook(lambda *_: state.partial.flush())
        return model, optimizer
    managed = shard_with_megatron(model, layout, options, units, spec, shapes, device, optimizer is not None, state)
    _finish(model, state)
    if optimizer is not None:
        managed.adopt(optimizer, names, before)
    return managed.wrapper, optimizer


def check_model(model: nn.Module, options: MegatronOptions, tp_size: int) -> None:
    """Raise everything that makes ``model`` one that cannot be sharded here."""
    refuse_sharded(model)
    check_trainable_as_shards(model)
    if quantization_method(model) is not None:
        raise UnsupportedError(
            "megatron-fsdp has no place for quantised weights: it takes bytes for float8. Use backend='fsdp2', or the model "
            "without quantization_config."
        )
    scalars = [name for name, p in model.named_parameters() if p.ndim == 0]
    if scalars:
        raise UnsupportedError(
            f"{', '.join(scalars[:4])}: parameters without dimensions cannot be sharded. Give them the shape (1,)."
        )
    if tp_size > 1:
        refuse_fused_loss(model)
    meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if meta and not options.init_fsdp_with_meta_device:
        raise UnsupportedError(
            f"{len(meta)} parameters have no values ({meta[0]}, ...): the model is on the meta device. Load it on the CPU, or use "
            f"init_fsdp_with_meta_device=True if its modules can initialise themselves."
        )
    if meta:
        _check_resettable(model, tp_size)


def _check_resettable(model: nn.Module, tp_size: int) -> None:
    if tp_size > 1:
        raise UnsupportedError(
            "init_fsdp_with_meta_device=True with tensor parallelism: each rank would initialise its shard on its own, and replicated "
            "parameters differently. Build the model on the CPU, or use tp=1."
        )
    unable = [
        f"{name or type(module).__name__} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(p.device.type == "meta" for p in module.parameters(recurse=False))
        and not (hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters"))
    ]
    if unable:
        raise UnsupportedError(
            f"init_fsdp_with_meta_device=True: {len(unable)} modules have no reset_parameters() to initialise themselves with: "
            f"{', '.join(unable[:4])}. Add the method, or build the model on the CPU."
        )


def tensor_parallelize(
    model: nn.Module, spec: ShardingSpec | None, mesh: DeviceMesh | None, device: torch.device
) -> TensorParallelState | None:
    """Shard ``model`` over the tp axis ``mesh``; nothing for an axis of one rank."""
    if spec is None or mesh is None:
        return None
    synchronize_rng(mesh)
    state = apply_tensor_parallel(model, spec, mesh, device)
    install_sharded_dropout(model, spec, mesh)
    if draws_random_numbers(model):
        install_own_numbers(model, spec, mesh, device, state.hook)
        synchronize_at_first_forward(model, mesh)
    return state


def _finish(model: nn.Module, state: TensorParallelState | None) -> None:
    if state is not None:
        install_regions(model, dissect(model).layers, state, {})


def device_of(mesh: DeviceMesh) -> torch.device:
    """Where this rank of ``mesh`` computes."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def _size(mesh: DeviceMesh, name: str) -> int:
    names = tuple(mesh.mesh_dim_names or ())
    return mesh.shape[names.index(name)] if name in names else 1
