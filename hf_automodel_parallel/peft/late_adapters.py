"""Adapters that are added to a model after it was sharded.

PEFT builds the new layers as in one process: while it does, it is shown stand-ins of the sharded weights that have
their whole shapes and no memory. Then the new parameters are made equal on all ranks, get their places on the tp axis,
and form one more FSDP2 unit per layer, called around the layer's forward (a :class:`~.fsdp_dtypes.ParamGroupModule`),
because a unit that exists cannot take more parameters.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..core.consistency import check_same_structure, synchronize_rng
from ..core.model_view import ModelView
from ..core.ranks import broadcast_from_rank_zero, raise_on_all_ranks
from ..core.swap import swapped_parameters
from ..errors import UnsupportedError
from ..fsdp.dtype_groups import ParamGroupModule, companions, separate_unit
from ..fsdp.root_gradients import RootGradients
from ..fsdp.shard import check_packed_parameters, fsdp_units, unit_options
from ..plan.analysis.sequence_parallel import carry_over
from ..plan.resolve import resolve
from ..tensor_parallel.dropout_rng import (
    draws_random_numbers,
    install_sharded_dropout,
    refuse_compiled_dropout,
    synchronize_at_first_forward,
)
from .operations import check_no_views

if TYPE_CHECKING:
    from ..strategies.context import ParallelizeContext

#: Initialisations that do not read the weight below the adapter.
_BLIND_INITS = (True, False, "gaussian", "orthogonal")


def adding(
    model: nn.Module, context: ParallelizeContext, original: Callable[..., Any], done: Callable[[], None]
) -> Callable[..., Any]:
    """``PeftModel.add_adapter`` for a sharded model.

    Args:
        model: the prepared ``PeftModel``.
        context: how it was sharded.
        original: its own method.
        done: called when the new parameters are in place.
    """

    @functools.wraps(original)
    def add_adapter(
        adapter_name: str, peft_config: Any, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
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
                # By identity: the parameters of a layer that PEFT wraps get other names.
                known = {id(parameter): parameter for parameter in model.parameters()}
                _check(adapter_name, peft_config, low_cpu_mem_usage)
                _check_job(context)
                original(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
                names = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
                _check_new(model, context, names)
            check_same_structure(model, group=context.group)
        except Exception:  # on every rank, also where PEFT had no objection
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


def _check(name: str, config: Any, low_cpu_mem_usage: bool) -> None:
    """Refuse what needs the values of the weights below, or puts parameters elsewhere than into the new adapter's
    layers.
    """
    given = {
        "peft_type": (str(getattr(config.peft_type, "value", config.peft_type)), ("LORA",)),
        "init_lora_weights": (getattr(config, "init_lora_weights", True), _BLIND_INITS),
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
                f"{shown} here): it needs whole weights or parameters outside of the new adapter, or leaves no values "
                f"to shard. Add this adapter before accelerator.prepare and switch to it with set_adapter()."
            )


def _check_job(context: ParallelizeContext) -> None:
    """Refuse where the new adapter could not get what the others got."""
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
    """Let PEFT call its own methods meanwhile, and not those that are bound on the prepared model for users."""
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
    """A parameter of the full shape of a sharded one, on its device, whose elements share one number."""
    if not isinstance(parameter, DTensor):
        return None
    zeros = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return nn.Parameter(zeros, parameter.requires_grad)


def _copy_requires_grad(parameter: DTensor, shown: torch.Tensor) -> None:
    parameter.requires_grad_(shown.requires_grad)


def _check_new(model: nn.Module, context: ParallelizeContext, names: list[str]) -> None:
    """Everything that ``prepare`` would refuse, for the parameters that are new."""
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
    model: nn.Module, context: ParallelizeContext, replaced: dict[nn.Module, nn.Module], names: list[str]
) -> None:
    new = set(names)
    for name in names:
        broadcast_from_rank_zero(model.get_parameter(name))
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if context.tensor_parallel is not None:
        for old, wrapper in replaced.items():
            context.tensor_parallel.move_boundaries(old, wrapper)
        spec = resolve(model, context.plan, context.tensor_parallel.mesh.size())  # type: ignore[arg-type]
        carry_over(context.spec, spec, names)  # type: ignore[arg-type]
        context.spec = spec
        context.tensor_parallel.grow(model, context.spec, names, context.device)
        install_sharded_dropout(model, context.spec, context.tensor_parallel.mesh)
        if draws_random_numbers(model):
            synchronize_rng(context.tensor_parallel.mesh)
            synchronize_at_first_forward(model, context.tensor_parallel.mesh)
    before = companions(model)
    by_unit: dict[tuple[nn.Module, torch.dtype], list[nn.Module]] = defaultdict(list)
    for name, owner in zip(names, owners, strict=True):
        members = by_unit[_unit_around(model, name), model.get_parameter(name).dtype]
        if owner not in members:
            members.append(owner)
    for (unit, dtype), members in by_unit.items():
        others = {p for name, p in model.named_parameters() if name not in new or p.dtype != dtype}
        options = unit_options(context.dp_mesh, context.options)
        options["ignored_params"] = others | context.options.ignored_parameters
        # Said explicitly: FSDP2 takes a unit that comes late for a root, which it would not free after its forward.
        separate_unit(unit, members, **options, reshard_after_forward=context.options.reshard_after_forward)
    if (
        context.structure is not None
        and context.structure.towers
        and context.options.towers != "layers"
        and context.dp_mesh.size() > 1
    ):
        RootGradients(model, context.dp_mesh, [unit for unit in companions(model) if unit not in before])
    if context.tensor_parallel is not None:
        context.tensor_parallel.partial.resolve()


def _unit_around(model: nn.Module, name: str) -> nn.Module:
    """The innermost FSDP2 unit with a forward of its own around the parameter ``name``."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, FSDPModule) and not isinstance(module, ParamGroupModule):
            return module
    return model
