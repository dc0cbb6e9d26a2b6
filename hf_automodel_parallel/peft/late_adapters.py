"""Adapters that are added to a model after it was sharded.

PEFT builds the new layers as in one process; meanwhile the sharded weights are replaced by tensors of their full shape
and almost no memory. Then the new parameters are broadcast from rank 0, sharded over the tp axis, and form one extra
FSDP param group per layer (:class:`~..fsdp.dtype_groups.ParamGroupModule`), because an FSDP unit cannot take more
parameters.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..core.consistency import check_same_structure, synchronize_rng
from ..core.model_structure import ModelStructure
from ..core.model_view import ModelView
from ..core.ranks import broadcast_from_rank_zero, raise_on_all_ranks
from ..core.sharding_spec import Plan, ShardingSpec
from ..core.swap import swapped_parameters
from ..errors import UnsupportedError
from ..fsdp.dtype_groups import ParamGroupModule, extra_groups, separate_unit
from ..fsdp.encoder_placement import RootGradients
from ..fsdp.one_rank import WithoutUnits
from ..fsdp.options import ShardingOptions
from ..fsdp.replicas import ReplicaGradients, make_replicas, move_replicas
from ..fsdp.shard import check_packed_parameters, fsdp_units, unit_options, without_units_inside
from ..plan.analysis.sequence_parallel import carry_over
from ..plan.resolve import resolve
from ..tensor_parallel.apply import TensorParallelState, grow_local_parameters
from ..tensor_parallel.dropout_rng import (
    draws_random_numbers,
    install_sharded_dropout,
    refuse_compiled_dropout,
    synchronize_at_first_forward,
)
from .operations import check_no_views

#: Values of ``init_lora_weights`` that do not read the weight below the adapter.
_INITS_WITHOUT_BASE_WEIGHT = (True, False, "gaussian", "orthogonal")


class ShardedAs(Protocol):
    """How the model was sharded: the fields of the strategy's context that new parameters need.

    Attributes:
        plan: the tensor-parallel plan; None without one, or if the strategy does not set it.
        spec: ``plan`` resolved for the model; replaced by one that includes the new parameters.
        tensor_parallel: the state of tensor parallelism, None without it.
        structure: layers, modality encoders and ends of the model.
        fsdp: behaviour of FSDP2; its ``replicated_adapters`` are replaced.
        replicas: averages the gradients of adapters that are replicated over the data-parallel ranks, None without.
        compile_options: options of ``torch.compile`` for the layers, None for eager.
        device: device of this rank.
        tp_mesh, cp_mesh: the axis, None when it has one rank.
        dp_mesh: the axes that FSDP2 works on.
        group: the ranks that hold this model; None means all.
    """

    plan: Plan | None
    spec: ShardingSpec | None
    tensor_parallel: TensorParallelState | None
    structure: ModelStructure | None
    fsdp: ShardingOptions
    replicas: ReplicaGradients | None
    compile_options: dict[str, Any] | None
    device: torch.device

    @property
    def tp_mesh(self) -> DeviceMesh | None: ...
    @property
    def cp_mesh(self) -> DeviceMesh | None: ...
    @property
    def dp_mesh(self) -> DeviceMesh: ...
    @property
    def group(self) -> dist.ProcessGroup | None: ...


def adding(
    model: nn.Module, context: ShardedAs, original: Callable[..., Any], done: Callable[[], None]
) -> Callable[..., Any]:
    """``PeftModel.add_adapter`` for a sharded model.

    Args:
        model: the prepared ``PeftModel``.
        context: how it was sharded; its ``spec`` is replaced.
        original: the model's own method.
        done: called when the new parameters are sharded.

    Returns:
        A function with the signature of ``original``. Collective over the ranks that hold the model. It raises
        UnsupportedError for adapters that cannot be added to shards, and then leaves the model as it was.
    """

    @functools.wraps(original)
    def add_adapter(
        adapter_name: str, peft_config: Any, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        # After a forward some units (the root) are still unsharded.
        for unit in fsdp_units(model):
            unit.reshard()
        inner = ModelView.of(model).inner
        before = dict(inner.named_modules(remove_duplicate=False))
        is_new = adapter_name not in model.peft_config  # type: ignore[operator]
        try:
            with (
                raise_on_all_ranks("add_adapter", context.group),
                _peft_own_methods(model),
                swapped_parameters(model, _blank, _copy_requires_grad),
            ):
                # By identity, because PEFT's wrappers rename the parameters of a layer.
                known = {id(parameter): parameter for parameter in model.parameters()}
                _check_config(adapter_name, peft_config, low_cpu_mem_usage)
                _check_sharding(context)
                original(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
                names = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
                _check_new(model, context, names)
            check_same_structure(model, group=context.group)
        except Exception:  # on every rank: one that failed made all of them raise
            if is_new and adapter_name in model.peft_config:  # type: ignore[operator]
                type(model).delete_adapter(model, adapter_name)  # type: ignore[attr-defined]
            raise
        replaced = {
            old: new
            for name, new in inner.named_modules(remove_duplicate=False)
            if (old := before.get(name)) is not None and old is not new
        }
        _shard_new_parameters(model, context, replaced, names)
        done()

    return add_adapter


def _check_config(name: str, config: Any, low_cpu_mem_usage: bool) -> None:
    """Raise for options that need the values of the base weights, or that add parameters outside of the new layers."""
    given = {
        "peft_type": (str(getattr(config.peft_type, "value", config.peft_type)), ("LORA",)),
        "init_lora_weights": (getattr(config, "init_lora_weights", True), _INITS_WITHOUT_BASE_WEIGHT),
        "use_dora": (bool(getattr(config, "use_dora", False)), (False,)),
        "modules_to_save": (getattr(config, "modules_to_save", None) or None, (None,)),
        "trainable_token_indices": (getattr(config, "trainable_token_indices", None) or None, (None,)),
        "target_parameters": (getattr(config, "target_parameters", None) or None, (None,)),
        "bias": (getattr(config, "bias", "none"), ("none",)),
        "low_cpu_mem_usage": (low_cpu_mem_usage, (False,)),
    }
    for field, (value, possible) in given.items():
        if value not in possible:
            shown = ", ".join(map(repr, possible))
            raise UnsupportedError(
                f"add_adapter({name!r}) after accelerator.prepare: {field}={value!r} is not possible ({field} may be "
                f"{shown} here): it needs full weights or parameters outside of the new adapter, or leaves no values "
                f"to shard. Add this adapter before accelerator.prepare and switch to it with set_adapter()."
            )


def _check_sharding(context: ShardedAs) -> None:
    """Raise if the new adapter cannot be sharded like the others."""
    remedy = "Add this adapter before the model is sharded and switch to it with set_adapter()."
    if context.tp_mesh is not None and context.plan is None:
        raise UnsupportedError(
            "add_adapter: the model was sharded by a strategy with a flow of its own, whose plan is not known. "
            f"{remedy}"
        )
    if context.cp_mesh is not None:
        raise UnsupportedError(f"add_adapter is not available under context parallelism (cp_size > 1). {remedy}")


@contextmanager
def _peft_own_methods(model: nn.Module) -> Iterator[None]:
    """A context in which PEFT calls its own methods, and not the ones that are bound to the prepared model."""
    owners: list[Any] = [model, getattr(model, "base_model", None), ModelView.of(model).inner]
    bound = [
        (owner, name, owner.__dict__.pop(name))
        for owner in owners
        if owner is not None
        for name in _INTERNAL
        if name in owner.__dict__
    ]
    try:
        yield
    finally:
        for owner, name, method in bound:
            owner.__dict__[name] = method


_INTERNAL = ("inject_adapter", "set_adapter", "set_requires_grad")


def _blank(name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """A zero parameter with the full shape of a sharded one, on its device, whose elements use one number's memory."""
    if not isinstance(parameter, DTensor):
        return None
    zeros = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return nn.Parameter(zeros, parameter.requires_grad)


def _copy_requires_grad(parameter: DTensor, shown: torch.Tensor) -> None:
    parameter.requires_grad_(shown.requires_grad)


def _check_new(model: nn.Module, context: ShardedAs, names: list[str]) -> None:
    """Raise for new parameters that ``prepare`` would refuse, too."""
    others = [name for name in names if ".lora_" not in name]
    if others:
        raise UnsupportedError(
            f"the new adapter brings {others[0]} along, a copy of a layer of the model (a head, modules_to_save), "
            f"whose values are shards by now. Add this adapter before accelerator.prepare."
        )
    check_no_views(model)
    if context.tp_mesh is None:
        return
    sequence = context.spec.sequence if context.spec is not None else None
    layers = {name.partition(".lora_")[0] for name in names}
    blocks = sorted(layers & {*sequence.blocks, sequence.tail}) if sequence is not None else []
    if blocks:
        raise UnsupportedError(
            f"{blocks[0]} gathers the sequence itself (sequence_parallel=True), so that an adapter cannot be put "
            f"around it any more. Add this adapter before the model is sharded."
        )
    spec = resolve(model, context.plan, context.tp_mesh.size())  # type: ignore[arg-type]
    check_packed_parameters({name: p.shape for name, p in model.named_parameters()}, spec, context.dp_mesh.size(-1))
    if context.compile_options is not None:
        refuse_compiled_dropout(model, spec)


def _shard_new_parameters(
    model: nn.Module, context: ShardedAs, replaced: dict[nn.Module, nn.Module], names: list[str]
) -> None:
    # As the adapters before them.
    replicated = context.replicas is not None and bool(context.fsdp.replicated_adapters)
    if replicated:
        context.fsdp.replicated_adapters |= set(names)
    # Each rank has drawn the new values from its own random state.
    for name in names:
        broadcast_from_rank_zero(model.get_parameter(name))
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if context.tensor_parallel is not None:
        for old, wrapper in replaced.items():
            context.tensor_parallel.move_hooks(old, wrapper)
        spec = resolve(model, context.plan, context.tensor_parallel.mesh.size())  # type: ignore[arg-type]
        # Sequence parallelism is not derived again; it is taken from the old spec.
        carry_over(context.spec, spec, names)  # type: ignore[arg-type]
        context.spec = spec
        if replicated:
            context.tensor_parallel.compute_dtypes |= {
                (owner, name.rpartition(".")[2]): dtype
                for name, owner in zip(names, owners, strict=True)
                if (dtype := context.fsdp.compute_dtype(name)) is not None
            }
        context.tensor_parallel.grow(model, context.spec, names, context.device)
        install_sharded_dropout(model, context.spec, context.tensor_parallel.mesh)
        if draws_random_numbers(model):
            synchronize_rng(context.tensor_parallel.mesh)
            synchronize_at_first_forward(model, context.tensor_parallel.mesh)
    if replicated:
        _replicate(model, context, names)
    elif not isinstance(model, WithoutUnits):
        _make_param_groups(model, context, names, owners)
    if context.tensor_parallel is not None:
        context.tensor_parallel.partial.resolve()


def _replicate(model: nn.Module, context: ShardedAs, names: list[str]) -> None:
    """The other adapters are replicated over the data-parallel ranks, and so are the new ones."""
    move_replicas(map(model.get_parameter, names), context.dp_mesh)
    slots = make_replicas(model, names, context.dp_mesh)
    added = {model.get_parameter(name) for name in names}
    partial: set[nn.Parameter] = set()
    if context.tensor_parallel is not None:
        partial = context.tensor_parallel.partial.hand_over(added)
    else:
        layers = context.structure.layers if context.structure is not None else []
        dtypes = {name: context.fsdp.compute_dtype(name) for name in names}
        grow_local_parameters(model, without_units_inside(layers), dtypes)
    context.replicas.add(slots, partial)  # type: ignore[union-attr]


def _make_param_groups(model: nn.Module, context: ShardedAs, names: list[str], owners: list[nn.Module]) -> None:
    """One param group for each unit and dtype, because FSDP2 reduces a group in one dtype."""
    new, before = set(names), extra_groups(model)
    by_unit: dict[tuple[nn.Module, torch.dtype], list[nn.Module]] = defaultdict(list)
    for name, owner in zip(names, owners, strict=True):
        members = by_unit[_unit_around(model, name), model.get_parameter(name).dtype]
        if owner not in members:
            members.append(owner)
    for (unit, dtype), members in by_unit.items():
        others = {p for name, p in model.named_parameters() if name not in new or p.dtype != dtype}
        options = unit_options(context.dp_mesh, context.fsdp)
        options["ignored_params"] = others | context.fsdp.ignored_parameters
        # Explicitly: FSDP2 takes a unit that is added later for a root, which it does not reshard after forward.
        separate_unit(unit, members, **options, reshard_after_forward=context.fsdp.reshard_after_forward)
    if (
        context.structure is not None
        and context.structure.towers
        and context.fsdp.towers != "layers"
        and context.dp_mesh.size() > 1
    ):
        RootGradients(model, context.dp_mesh, [unit for unit in extra_groups(model) if unit not in before])


def _unit_around(model: nn.Module, name: str) -> nn.Module:
    """The innermost FSDP unit around the parameter ``name``, extra param groups apart."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, FSDPModule) and not isinstance(module, ParamGroupModule):
            return module
    return model
