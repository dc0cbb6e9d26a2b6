"""FSDP2 units whose parameters differ in dtype: several param groups.

FSDP2 all-gathers and reduces all parameters of a param group in one dtype. A unit that mixes them (a float32 ``A_log``
or router bias among bfloat16 weights, trainable adapters of another precision) becomes several groups here, one per
dtype, that are unsharded and resharded together. The largest is the unit's own. Each other one belongs to a
:class:`ParamGroupModule`, a module without parameters of its own that is called around the unit's forward, so it does
not matter which module owns a parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from .. import compat
from ..core.forward_stack import Forward, ForwardSlot, ForwardStack, ForwardWrapper
from ..core.model_view import ModelView, plan_name
from ..errors import UnsupportedError
from .unused_gradients import shard_counting

_NAME = "companion_{}"


class ParamGroupModule(nn.Module):
    """An extra FSDP param group of a unit: parameters of another dtype, or added after sharding.

    FSDP2 looks for the owners of parameters below the modules it is given, so while this module is sharded the unit is
    its child. Afterwards it is a child of the unit (without parameters, so no name changes), where FSDP2 finds it for
    ``no_sync``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.around: Forward | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the unit's own forward, while this group is unsharded."""
        return self.around(*args, **kwargs)  # type: ignore[misc]


class GroupedForward(ForwardWrapper):
    """A forward that is called through the module of an extra param group."""

    as_method = False

    def __init__(self, group: ParamGroupModule) -> None:
        self.group = group

    def wrap(self, inner: Forward) -> Forward:
        """Wrap ``inner``."""
        self.group.around = inner
        return super().wrap(inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.group(*args, **kwargs)


def extra_groups(unit: nn.Module) -> list[ParamGroupModule]:
    """The modules of the extra param groups of ``unit``."""
    return [child for child in unit.children() if isinstance(child, ParamGroupModule)]


def install_param_groups(model: nn.Module) -> None:
    """Let the extra param groups in ``model`` be called around the forwards of their units."""
    for module in list(model.modules()):
        for group in extra_groups(module):
            if group.around is None:
                ForwardStack.of(module).push(ForwardSlot.PARAM_GROUPS, GroupedForward(group))


def separate_unit(unit: nn.Module, owners: list[nn.Module], **options: Any) -> None:
    """Make the parameters of ``owners``, which were added after ``unit`` was sharded, an extra param group of it.

    Args:
        unit: a sharded module.
        owners: modules below it that hold the parameters.
        options: of ``fully_shard``.
    """
    group = ParamGroupModule()
    members = list(dict.fromkeys(p for owner in owners for p in owner.parameters()))
    # Below the group during the call only, so that their names in the model stay.
    for index, owner in enumerate(owners):
        group.add_module(str(index), owner)
    ignored = options.get("ignored_params") or ()
    shard = options.pop("fully_shard_fn", fully_shard)
    shard_counting(shard, group, [p for p in members if p not in ignored], **options)
    for index in range(len(owners)):
        delattr(group, str(index))
    unit.add_module(_NAME.format(len(extra_groups(unit))), group)
    ForwardStack.of(unit).push(ForwardSlot.PARAM_GROUPS, GroupedForward(group))


def shard_unit(
    modules: nn.Module | list[nn.Module], own_dtype: Iterable[nn.Parameter] = (), agree: bool = False, **options: Any
) -> None:
    """Like ``fully_shard(modules, **options)``, for parameters of any dtypes.

    :func:`install_param_groups` completes it.

    Args:
        modules: one module, or several that form one unit.
        own_dtype: parameters that compute in their stored dtype under every policy.
        agree: the ranks agree on the parameters that have a gradient, see :mod:`.unused_gradients`.
        options: of ``fully_shard``; ``mp_policy`` is that of all other parameters. ``fully_shard_fn`` is called in its
            place.

    Raises:
        UnsupportedError: a parameter is tied between modules of one unit, and its dtype differs from the unit's.
    """
    roots = modules if isinstance(modules, list) else [modules]
    ignored = set(options.pop("ignored_params", None) or ())
    policy: MixedPrecisionPolicy = options.pop("mp_policy", None) or MixedPrecisionPolicy()
    shard = options.pop("fully_shard_fn", fully_shard)
    own = {id(p) for p in own_dtype}

    def shard_group(target: Any, members: list[nn.Parameter], others: set[nn.Parameter]) -> None:
        group_policy = _policy_of(members[0], own, policy) if members else policy
        group_options = {"ignored_params": others or None, "mp_policy": group_policy, **options}
        if agree:
            shard_counting(shard, target, members, **group_options)
        else:
            shard(target, **group_options)

    managed = _managed(roots, ignored)
    shared = {key for key, entry in managed.items() if len(entry.roots) > 1}
    main, extra = _groups([entry.parameter for entry in managed.values()], own, policy, shared)
    made: list[tuple[nn.Module, ParamGroupModule]] = []
    # The extra groups first: fully_shard of the unit takes every parameter that is left.
    for members in extra:
        for root, own_members in _by_root([managed[id(p)] for p in members]).items():
            group = ParamGroupModule()
            # FSDP2 looks below the module that it is given. The unit is below its group during the call only, so that
            # the names of its parameters stay.
            group.add_module("unit", root)
            parameters = [entry.parameter for entry in own_members]
            shard_group(group, parameters, ignored | {e.parameter for e in managed.values()} - set(parameters))
            del group.unit
            made.append((root, group))
            # Now sharded, so other objects than before.
            ignored |= {entry.owner._parameters[entry.name] for entry in own_members}  # type: ignore[misc]
    shard_group(modules, main, ignored)
    for root, group in made:
        root.add_module(_NAME.format(len(extra_groups(root))), group)
    if len(roots) > 1:
        for root in roots:
            root.register_forward_hook(_unshard_in_backward)


@torch.compiler.disable
def _unshard_in_backward(module: FSDPModule, _: Any, output: Any) -> None:  # type: ignore[misc]
    """Output hook of each module of a unit of several: unshard the unit where the output is differentiated.

    FSDP2 (torch 2.11 to 2.13) hooks only the output of the module that runs last. Final norm and head are such a unit.
    Suppose the loss of a first forward uses the norm's output without the logits, the loss of a second forward uses the
    logits, and one backward runs for both. The backward of the second forward reshards the unit; then the norm of the
    first reads resharded memory, and the process crashes. Unsharding an unsharded unit costs nothing.
    """

    def unshard(_: torch.Tensor) -> None:
        module.unshard()

    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(unshard)


class _Managed(NamedTuple):
    """A parameter that FSDP2 would manage here: the roots that have it, one owner and the name there."""

    parameter: nn.Parameter
    roots: list[nn.Module]
    owner: nn.Module
    name: str


def _managed(roots: list[nn.Module], ignored: set[nn.Parameter]) -> dict[int, _Managed]:
    """By id, as FSDP2 finds them: below the roots, but not in units further inside."""
    found: dict[int, _Managed] = {}

    def visit(root: nn.Module, module: nn.Module, seen: set[int]) -> None:
        if id(module) in seen or (module is not root and isinstance(module, FSDPModule)):
            return
        seen.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in ignored:
                continue
            entry = found.setdefault(id(parameter), _Managed(parameter, [], module, name))
            if root not in entry.roots:
                entry.roots.append(root)
        for child in module.children():
            visit(root, child, seen)

    for root in roots:
        visit(root, root, set())
    return found


def _by_root(members: list[_Managed]) -> dict[nn.Module, list[_Managed]]:
    """The members of an extra group by the module of the unit that has them."""
    result: dict[nn.Module, list[_Managed]] = {}
    for member in members:
        if len(member.roots) > 1:
            raise UnsupportedError(
                f"a parameter of shape {tuple(member.parameter.shape)} and {member.parameter.dtype} is shared by "
                f"{len(member.roots)} modules that are one FSDP2 unit of another dtype. Store both ends of the model "
                "in one dtype."
            )
        result.setdefault(member.roots[0], []).append(member)
    return result


def _groups(
    parameters: list[nn.Parameter], own: set[int], policy: MixedPrecisionPolicy, shared: set[int]
) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """The parameters of the unit itself, and the extra groups; only trainable ones have to agree in dtype in a group.

    Parameters that modules of the unit share (tied ends) belong to the unit itself, which is unsharded for the first of
    the modules that runs.
    """
    groups: dict[tuple[bool, torch.dtype], list[nn.Parameter]] = {}
    frozen: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        keeps = id(parameter) in own and policy.param_dtype not in (None, parameter.dtype)
        if parameter.requires_grad:
            groups.setdefault((keeps, parameter.dtype), []).append(parameter)
        else:
            frozen.setdefault(keeps, []).append(parameter)
    for keeps, members in frozen.items():
        like = [key for key in groups if key[0] == keeps]
        home = max(like, key=lambda key: sum(p.numel() for p in groups[key])) if like else (keeps, members[0].dtype)
        groups[home] = groups.get(home, []) + members
    # First the group with tied parameters, else the largest of those that follow the policy, so that FSDP2 casts the
    # unit's inputs as the policy says.
    order = sorted(
        groups,
        key=lambda key: (
            not any(id(p) in shared for p in groups[key]),
            key[0],
            -sum(p.numel() for p in groups[key]),
        ),
    )
    ordered = [groups[key] for key in order]
    return (ordered[0], ordered[1:]) if ordered else ([], [])


def _policy_of(parameter: nn.Parameter, own: set[int], policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """``policy``, or one that computes and reduces in the stored dtype if ``parameter`` is of those."""
    if id(parameter) not in own or policy.param_dtype in (None, parameter.dtype):
        return policy
    return dataclasses.replace(
        policy, param_dtype=None, reduce_dtype=None, output_dtype=None, cast_forward_inputs=False
    )


def own_dtype_parameters(model: nn.Module, param_dtype: torch.dtype | None) -> list[str]:
    """Names of the parameters of ``model`` that should not be cast to ``param_dtype`` for compute.

    Those that the model's class lists as kept in float32; and, in a model that is stored in ``param_dtype``, vectors
    outside of matrix layers that are stored in a wider dtype nevertheless (a norm, an ``A_log``, a routing bias). In
    one process neither the model's code nor autocast would cast them. Not adapters: PEFT keeps them in float32 for the
    optimizer.
    """
    if param_dtype is None:
        return []
    view = ModelView.of(model)
    inner, prefix = view.inner, view.prefix
    kept = compat.names_kept_in_float32(inner, param_dtype)
    tuner_type, matrix_types = (
        compat.peft_tuner_layer_type(),
        (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    )
    adapters: set[int] = set()
    for layer in model.modules() if tuner_type is not None else ():
        if isinstance(layer, tuner_type):  # type: ignore[arg-type]
            adapters.update(id(p) for name, p in layer.named_parameters() if not name.startswith("base_layer."))
    base = [p for p in model.parameters() if id(p) not in adapters]
    stored_low = any(p.dtype == param_dtype for p in base)
    names = []
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if (
                parameter is None
                or not parameter.is_floating_point()
                or parameter.dtype.itemsize <= param_dtype.itemsize
            ):
                continue
            name = f"{module_name}.{key}" if module_name else key
            listed = kept is not None and kept.search(plan_name(name, prefix)) is not None
            vector = parameter.ndim == 1 and not isinstance(module, matrix_types) and id(parameter) not in adapters
            if listed or (stored_low and vector):
                names.append(name)
    return names


def wider_parameters(model: nn.Module, param_dtype: torch.dtype | None, components: Iterable[str]) -> list[str]:
    """Names of parameters stored in a wider dtype than ``param_dtype``, with one of ``components`` in their path."""
    wanted = set(components)
    return [
        name
        for name, parameter in model.named_parameters()
        if param_dtype is not None
        and parameter.is_floating_point()
        and parameter.dtype.itemsize > param_dtype.itemsize
        and not wanted.isdisjoint(name.split("."))
    ]


def fully_shard_by_dtype(
    module: nn.Module,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    fp32_compute_module_names: Iterable[str] = (),
    **options: Any,
) -> nn.Module:
    """Like ``fully_shard``, in place, for a module whose parameters have several dtypes.

    Args:
        module: the module; its ``forward`` is wrapped where it needs more than one group.
        mesh: the data-parallel mesh, 1-D or (replicate, shard).
        mp_policy: policy of all parameters but those that keep their dtype; None computes in the stored dtypes.
        offload_policy: as for ``fully_shard``.
        fp32_compute_module_names: parameters in whose names one of these occurs compute in the dtype they are stored
        in.
        options: further arguments of ``fully_shard`` (``reshard_after_forward``, ``shard_placement_fn``,
            ``ignored_params``).

    Returns:
        ``module``.
    """
    names = tuple(fp32_compute_module_names)
    own = [p for name, p in module.named_parameters() if any(part in name for part in names)]
    shard_unit(module, own, mesh=mesh, mp_policy=mp_policy, offload_policy=offload_policy or OffloadPolicy(), **options)
    install_param_groups(module)
    return module
