"""FSDP2: which modules become units, in which order, with which policy.

A *unit* is a module (or several) that FSDP2 unshards around its forward and reduces together; torch calls its
parameters a param group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from .. import compat
from ..core.model_structure import ModelStructure, references
from ..core.sharding_spec import ShardingSpec
from ..errors import UnsupportedError
from .dtype_groups import ParamGroupModule, extra_groups, shard_unit
from .encoder_placement import keep_ranks_in_step, replicated_parameters
from .given_tensors import GivenTensors
from .one_rank import WithoutUnits, manage_without_units, nothing_to_shard
from .options import ShardingOptions, on_device
from .replicas import ReplicaGradients, make_replicas, move_replicas, replicas


def shard_data_parallel(
    model: nn.Module, structure: ModelStructure, mesh: DeviceMesh, options: ShardingOptions
) -> ReplicaGradients | None:
    """Apply FSDP2 (1-D mesh) or HSDP (2-D mesh: replicate, shard) to ``model``, in place.

    With tensor parallelism alone there are no units where FSDP2 would change nothing (:mod:`.one_rank`).

    The units are: each layer; the embedding; final norm and head together, because a loss may read the head's weight
    after the norm has run; the root with the rest, including modality encoders unless ``options.towers`` says
    otherwise. The last layer and the head are not resharded after forward, because backward starts with them. A layer
    that shares parameters with modules outside of it cannot be a unit and stays with the root. A tied embedding and
    head form one unit.

    Args:
        model: parameters are plain tensors or DTensors on the tp axis; all on the right device or on meta.
        structure: its layers, embedding and head.
        mesh: the data-parallel axes.
        options: see :class:`ShardingOptions`.

    Returns:
        What averages the gradients of the parameters that FSDP2 does not manage; None without such, or on one rank.
    """
    if nothing_to_shard(model, mesh, options):
        manage_without_units(model, mesh)
        return None
    unmanaged = replicas(model, options.replicated_adapters)
    if unmanaged:
        ignored = options.ignored_parameters | move_replicas(unmanaged.values(), mesh)
        options = dataclasses.replace(options, ignored_parameters=ignored)
    if replicated := replicated_parameters(structure, options):
        for parameter in replicated:  # FSDP2 does not move parameters that it ignores
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(on_device(mesh.device_type))
        options = dataclasses.replace(options, ignored_parameters=options.ignored_parameters | replicated)
    nothing_managed = options.ignored_parameters.issuperset(model.parameters())
    outermost: dict[str, Any] = {
        **unit_options(mesh, options),
        "agree": True,
        "own_dtype": [p for name, p in model.named_parameters() if name in options.own_dtype],
    }
    # The policy's output dtype is for the output of the model; its code decides the output dtype of layers.
    cast = options.mp_policy.cast_forward_inputs and options.cast_between_layers
    inside = dataclasses.replace(options.mp_policy, output_dtype=None, cast_forward_inputs=cast)
    common = {**outermost, "mp_policy": inside}
    reshard = options.reshard_after_forward
    # With a size-based policy the units may lie inside of layers; they are made further below.
    units = separable(model, wanted_units(structure, options)) if options.minimum_unit_size is None else []
    for layer in units:
        shard_unit(layer, **common, reshard_after_forward=reshard and layer is not units[-1])
    read = {id(p) for name, p in model.named_parameters() if name in options.read_by_other_modules}

    def alone(module: nn.Module) -> bool:
        return not any(id(p) in read for p in module.parameters())

    tail = list(structure.head) if all(map(alone, structure.head)) else []
    embedding = structure.embedding if structure.embedding is not None and alone(structure.embedding) else None
    if embedding is not None and structure.tied:
        tail = [embedding, *tail]
    elif embedding is not None and separable(model, [embedding]):
        shard_unit(embedding, **common, reshard_after_forward=reshard)
    tail = tail if _separable_together(model, tail) else separable(model, tail)
    if tail:
        shard_unit(tail, **common, reshard_after_forward=False)
    if options.minimum_unit_size is not None:
        in_root = [] if options.towers == "layers" else [*structure.towers, *structure.skipped]
        _shard_large_modules(
            model, options.minimum_unit_size, in_root, alone, {**common, "reshard_after_forward": reshard}
        )
    # With modality encoders in the root, RootGradients finds the gradients of all ranks instead: usage parameters would
    # fill in zeros for an entire encoder that no rank has run.
    outermost["agree"] = not structure.towers or options.towers == "layers"
    shard_unit(model, **outermost, reshard_after_forward=False)
    slots = make_replicas(model, unmanaged, mesh)
    for unit in fsdp_units(model):
        GivenTensors(unit)
    _prepare_first_call(model)
    _restore_class_names(model)
    set_prefetch([unit for unit in units if isinstance(unit, FSDPModule)], reshard, options)
    if structure.towers and mesh.size() > 1:
        keep_ranks_in_step(model, structure, mesh, options.towers)
    if outermost["agree"] and mesh.size() > 1:
        # A unit whose input needs no gradient is reduced when backward reaches it, or else at the end, after the root.
        # Backward may reach it on some ranks only, so all ranks reduce it before the root.
        compat.before_reduction(model, lambda: compat.reduce_all_but((model, *extra_groups(model))))
    if not slots or mesh.size() == 1:
        return None
    gradients = ReplicaGradients(_with_param_groups(fsdp_units(model)), slots, mesh, options.mp_policy.reduce_dtype)
    if nothing_managed:
        gradients.watch_outputs(model)
    return gradients


def _prepare_first_call(model: nn.Module) -> None:
    """Initialise all of FSDP2 when the first unit is called, and outside of ``torch.inference_mode()``.

    A script may call a part of the model first (the embedding, for inputs_embeds; the decoder, for a loss of its own),
    which would initialise itself as a root. Inside of inference mode FSDP2 would make its unsharded parameters, once,
    as inference tensors, which can never be part of a training forward.
    """
    done: list[bool] = []

    def initialize(*_: Any) -> None:
        if done or torch.compiler.is_compiling():
            return
        done.append(True)
        with torch.inference_mode(False):
            compat.initialize_fsdp(model)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                for member in _with_param_groups(fsdp_units(model)):
                    member.unshard()
                    member.reshard()

    for unit in fsdp_units(model):
        unit.register_forward_pre_hook(initialize, prepend=True)  # type: ignore[attr-defined]


def wanted_units(structure: ModelStructure, options: ShardingOptions) -> list[nn.Module]:
    """The layers that should be units of their own; the others stay with the root."""
    return structure.layers if options.towers == "layers" else structure.main_layers


def unit_options(mesh: DeviceMesh, options: ShardingOptions) -> dict[str, Any]:
    """Arguments of ``fully_shard`` that all units of a model have in common."""
    return {
        "mesh": mesh,
        "mp_policy": options.mp_policy,
        "offload_policy": options.offload_policy,
        "ignored_params": options.ignored_parameters or None,
        "shard_placement_fn": functools.partial(data_parallel_placement, size=mesh.size(mesh.ndim - 1)),
        "fully_shard_fn": options.fully_shard_fn or fully_shard,
    }


def _restore_class_names(model: nn.Module) -> None:
    """Give FSDP2's classes the name of the class that they extend.

    Libraries decide by class names: for "FSDPLlamaForCausalLM" the Trainer would not shift the labels for label
    smoothing.
    """
    for unit in fsdp_units(model):
        cls = type(unit)
        original = next((base for base in cls.__bases__ if base is not FSDPModule), cls)
        cls.__name__, cls.__qualname__ = original.__name__, original.__qualname__


def data_parallel_placement(parameter: nn.Parameter, size: int) -> Shard | None:
    """FSDP2's dimension for ``parameter``: 0, except where tp already shards dimension 0 in packed blocks.

    DTensor cannot describe packed blocks and a second sharding of the same dimension: an all-gather would return the
    rows in a wrong order.
    """
    if not isinstance(parameter, DTensor):
        return None
    if not any(compat.is_strided_shard(p) and p.dim == 0 for p in parameter.placements):  # type: ignore[attr-defined]
        return None
    return Shard(_dimension_beside_packed(tuple(parameter.shape), size, "a parameter"))


def _dimension_beside_packed(shape: tuple[int, ...], size: int, name: str) -> int:
    """The first dimension after 0 that ``size`` divides."""
    for dim in range(1, len(shape)):
        if shape[dim] % size == 0:
            return dim
    packed = f"{name} of shape {shape} packs several projections and is sharded over tp on dimension 0, and "
    if len(shape) == 1:
        raise UnsupportedError(
            f"{packed}has no other dimension for FSDP2. Name its layer in the plan instead of it, or leave it out."
        )
    raise UnsupportedError(
        f"{packed}none of its other dimensions divides by dp_shard_size={size}. Choose another dp_shard_size, or "
        f"another LoRA rank if it is an adapter's."
    )


def check_packed_parameters(shapes: dict[str, torch.Size], spec: ShardingSpec, size: int) -> None:
    """Raise :class:`UnsupportedError` if FSDP2 over ``size`` ranks has no dimension for a packed parameter of
    ``spec``.
    """
    for name in spec.packed():
        if spec.parameters[name].dim == 0 and name in shapes:
            _dimension_beside_packed(tuple(shapes[name]), size, name)


def separable(model: nn.Module, candidates: list[nn.Module]) -> list[nn.Module]:
    """Those of ``candidates`` whose parameters do not belong to modules outside of them as well."""
    counts = references(model) if candidates else Counter()
    return [module for module in candidates if _holds_its_parameters_alone([module], counts)]


def _separable_together(model: nn.Module, group: list[nn.Module]) -> bool:
    return _holds_its_parameters_alone(group, references(model))


def _holds_its_parameters_alone(group: list[nn.Module], counts: Counter[int]) -> bool:
    """True if nothing outside of ``group`` refers to a parameter in it, or to a module in it that has parameters.

    That also finds a module with several names, of which ``named_modules`` would list only one.
    """
    inside: Counter[int] = Counter()
    roots = set(group)
    for module in {m for root in group for m in root.modules()}:
        inside.update(id(p) for p in module._parameters.values() if p is not None)
        holding = (m for m in module._modules.values() if m is not None and any(True for _ in m.parameters()))
        inside.update(id(m) for m in holding if m not in roots)
    return bool(inside) and all(counts[key] == count for key, count in inside.items())


def _shard_large_modules(
    model: nn.Module,
    minimum: int,
    in_root: list[nn.Module],
    alone: Callable[[nn.Module], bool],
    common: dict[str, Any],
) -> None:
    units = [*in_root, *(unit for unit in model.modules() if isinstance(unit, FSDPModule))]
    done = {id(inner) for unit in units for inner in unit.modules()}
    for module in reversed(list(model.modules())[1:]):  # FSDP2 wants inner modules first
        if id(module) in done or not compat.has_implemented_forward(module):
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > minimum and alone(module) and separable(model, [module]):
            shard_unit(module, **common)


def without_units_inside(layers: list[nn.Module]) -> list[nn.Module]:
    """Those of ``layers`` that FSDP2 unshards at once: no module inside of them is a unit of its own."""

    def is_unit(module: nn.Module) -> bool:
        return isinstance(module, FSDPModule) and not isinstance(module, ParamGroupModule)

    return [layer for layer in layers if not any(is_unit(m) for m in layer.modules() if m is not layer)]


def set_prefetch(units: list[FSDPModule], reshard: bool, options: ShardingOptions) -> None:
    """All-gather the next units while one computes; in backward only if units are resharded after forward."""
    for index, unit in enumerate(units):
        ahead = _with_param_groups(units[index + 1 : index + 1 + options.forward_prefetch])
        if ahead:
            unit.set_modules_to_forward_prefetch(ahead)
        behind = _with_param_groups(units[max(0, index - options.backward_prefetch) : index][::-1])
        if behind and reshard:
            unit.set_modules_to_backward_prefetch(behind)


def _with_param_groups(units: list[FSDPModule]) -> list[FSDPModule]:
    return [member for unit in units for member in (unit, *extra_groups(unit))]  # type: ignore[arg-type,misc]


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """The modules of ``model`` that are FSDP units, the root first; none where one rank alone has the data."""
    return [
        module for module in model.modules() if isinstance(module, FSDPModule) and not isinstance(module, WithoutUnits)
    ]


#: Units inside of :func:`unshard_fsdp2_model`.
_HELD: weakref.WeakSet[Any] = weakref.WeakSet()


def free_gathered(model: nn.Module) -> None:
    """Reshard all units below ``model``, except inside of :func:`unshard_fsdp2_model`."""
    for unit in fsdp_units(model):
        if unit not in _HELD:
            unit.reshard()


@contextlib.contextmanager
def unshard_fsdp2_model(model: nn.Module) -> Iterator[None]:
    """Unshard all FSDP2 units below ``model``, and reshard them at the end.

    For several forwards without gradients (log-probabilities of a policy), or to read parameters: one all-gather for
    each unit. Under tensor parallelism parameters stay DTensors on the tp axis, and forwards use the local shards as
    usual. Collective: all ranks have to enter, and each needs memory for all parameters (its tp shards of them).

    No forward inside reshards a unit. At the end every unit is resharded, also if an all-gather or the body raised, and
    from then on units are resharded after forward as before.

    Args:
        model: any module; without FSDP2 units, or within another such context, nothing happens.
    """
    units = [unit for unit in fsdp_units(model) if unit not in _HELD]
    with contextlib.ExitStack() as stack:  # runs all of these, even if one of them fails
        for unit in units:
            stack.callback(unit.reshard)
            stack.callback(compat.keep_gathered_after_forward(unit))
            stack.callback(_HELD.discard, unit)
            _HELD.add(unit)
        try:
            for unit in units:
                unit.unshard()
            yield
        except BaseException:
            compat.forget_unfinished_forward(units)
            raise


def sharded_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """``id`` of each parameter object, sharded or unsharded, -> the sharded one; all units are resharded.

    After a forward without a backward, units that are not resharded after forward show their unsharded parameters. An
    optimizer that is created then (Trainer: evaluate before train) holds those, and would train the wrong objects.
    """
    shown = dict(model.named_parameters(remove_duplicate=False))
    for unit in fsdp_units(model):
        unit.reshard()
    sharded = dict(model.named_parameters(remove_duplicate=False))
    return {id(p): sharded[name] for name, p in shown.items()} | {id(p): p for p in sharded.values()}


def upcast_trainable(model: nn.Module) -> list[str]:
    """Store trainable parameters in float32 under mixed precision (FSDP2 casts them for compute), as Accelerate does.

    Returns:
        Names of the parameters that were in a lower precision.
    """
    changed = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)
            changed.append(name)
    return changed
