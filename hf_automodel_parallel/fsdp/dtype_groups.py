"""FSDP2 units whose parameters differ in dtype.

FSDP2 gathers and reduces all parameters of a unit in one dtype. A unit that mixes them (a float32 ``A_log`` or router
bias among bfloat16 weights, trainable adapters of another precision) becomes several FSDP2 groups here, one per dtype,
that are gathered and freed together: the largest belongs to the unit itself, each of the others to a
:class:`ParamGroupModule`, a module without parameters of its own that is called around the unit's forward. So it does
not matter which module owns a parameter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from .. import compat
from ..core.model_view import ModelView, plan_name
from ..errors import UnsupportedError
from .unused_gradients import shard_counting

_NAME = "companion_{}"


class ParamGroupModule(nn.Module):
    """The FSDP2 unit of parameters of another unit that cannot belong to it: of another dtype, or added later.

    Its forward is the other's.

    FSDP2 looks for the owners of parameters below the modules it is given, so while this one is sharded the unit is its
    child; afterwards it is a child of the unit (without parameters, so no name changes), where FSDP2 finds it for
    ``no_sync``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.around: Callable[..., Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the unit's own forward, between this module's gathering and freeing."""
        return self.around(*args, **kwargs)  # type: ignore[misc]


class GroupedForward:
    """A forward that is called through a companion."""

    def __init__(self, companion: ParamGroupModule, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # first: it copies the attributes of a forward that is an object, too
        companion.around = forward
        self.companion = companion

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.companion(*args, **kwargs)

    @property
    def inside(self) -> Callable[..., Any]:
        """The forward that is called."""
        return self.companion.around  # type: ignore[return-value]

    def put_inside(self, forward: Callable[..., Any]) -> GroupedForward:
        """Call ``forward`` instead; returns self."""
        self.companion.around = forward
        return self


def companions(unit: nn.Module) -> list[ParamGroupModule]:
    """The companions of ``unit``."""
    return [child for child in unit.children() if isinstance(child, ParamGroupModule)]


def install_param_groups(model: nn.Module) -> None:
    """Let the companions in ``model`` be called around the forwards of their units; the last step, outside of all
    others.
    """
    for module in list(model.modules()):
        for companion in companions(module):
            if companion.around is None:
                module.forward = GroupedForward(companion, module.forward)  # type: ignore[method-assign]


def separate_unit(unit: nn.Module, owners: list[nn.Module], **options: Any) -> None:
    """Make the parameters of ``owners``, modules below ``unit``, an FSDP2 unit that is called around the forward of
    ``unit``.

    For parameters that come after ``unit`` itself was sharded, and so cannot belong to it.

    Args:
        unit: a sharded module.
        owners: the modules that hold the parameters.
        options: of ``fully_shard``.
    """
    companion = ParamGroupModule()
    members = list(dict.fromkeys(p for owner in owners for p in owner.parameters()))
    for index, owner in enumerate(owners):
        companion.add_module(str(index), owner)
    ignored = options.get("ignored_params") or ()
    shard_counting(
        options.pop("fully_shard_fn", fully_shard), companion, [p for p in members if p not in ignored], **options
    )
    for index in range(len(owners)):
        delattr(companion, str(index))
    unit.add_module(_NAME.format(len(companions(unit))), companion)
    unit.forward = GroupedForward(companion, unit.forward)  # type: ignore[method-assign]


def shard_unit(
    modules: nn.Module | list[nn.Module], own_dtype: Iterable[nn.Parameter] = (), agree: bool = False, **options: Any
) -> None:
    """Like ``fully_shard(modules, **options)``, for parameters of any dtypes. :func:`install_param_groups` completes
    it.

    Args:
        modules: one module, or several that form one unit.
        own_dtype: parameters that compute in the dtype they are stored in, whatever the policy says.
        agree: the ranks agree on the parameters that have a gradient, see :mod:`.unused_gradients`.
        options: of ``fully_shard``; ``mp_policy`` is that of all other parameters. ``fully_shard_fn`` is called in its
            place.

    Raises:
        UnsupportedError: modules of one unit share a parameter that differs from the unit's dtype.
    """
    roots = modules if isinstance(modules, list) else [modules]
    ignored = set(options.pop("ignored_params", None) or ())
    policy: MixedPrecisionPolicy = options.pop("mp_policy", None) or MixedPrecisionPolicy()
    shard = options.pop("fully_shard_fn", fully_shard)
    own = {id(p) for p in own_dtype}
    places = _places(roots, ignored)
    shared = {key for key, (_, owners, _) in places.items() if len(owners) > 1}
    main, others = _groups([places[key][0] for key in places], own, policy, shared)
    made: list[tuple[nn.Module, ParamGroupModule]] = []
    for group in others:
        per_root: dict[nn.Module, set[nn.Parameter]] = {}
        for parameter in group:
            owners = places[id(parameter)][1]
            if len(owners) > 1:
                raise UnsupportedError(
                    f"a parameter of shape {tuple(parameter.shape)} and {parameter.dtype} is shared by {len(owners)} "
                    f"modules that are one FSDP2 unit of another dtype. Store both ends of the model in one dtype."
                )
            per_root.setdefault(owners[0], set()).add(parameter)
        for root, members in per_root.items():
            companion = ParamGroupModule()
            companion.add_module("unit", root)
            rest = {entry[0] for entry in places.values()} - members
            unit: dict[str, Any] = {
                "ignored_params": ignored | rest,
                "mp_policy": _policy_of(group[0], own, policy),
                **options,
            }
            if agree:
                shard_counting(shard, companion, list(members), **unit)
            else:
                shard(companion, **unit)
            del companion.unit
            made.append((root, companion))
            sharded = {places[id(p)][2] for p in members}
            ignored |= {owner._parameters[name] for owner, name in sharded}  # type: ignore[misc]
    main_policy = _policy_of(main[0], own, policy) if main else policy
    options = {"ignored_params": ignored or None, "mp_policy": main_policy, **options}
    if agree:
        shard_counting(shard, modules, main, **options)
    else:
        shard(modules, **options)
    for root, companion in made:
        root.add_module(_NAME.format(len(companions(root))), companion)


def _places(
    roots: list[nn.Module], ignored: set[nn.Parameter]
) -> dict[int, tuple[nn.Parameter, list[nn.Module], tuple[nn.Module, str]]]:
    """What FSDP2 would manage here: ``id -> (parameter, the roots that have it, one owner and the name there)``."""
    found: dict[int, tuple[nn.Parameter, list[nn.Module], tuple[nn.Module, str]]] = {}

    def visit(root: nn.Module, module: nn.Module, seen: set[int]) -> None:
        if id(module) in seen or (module is not root and isinstance(module, FSDPModule)):
            return
        seen.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in ignored:
                continue
            entry = found.setdefault(id(parameter), (parameter, [], (module, name)))
            if root not in entry[1]:
                entry[1].append(root)
        for child in module.children():
            visit(root, child, seen)

    for root in roots:
        visit(root, root, set())
    return found


def _groups(
    parameters: list[nn.Parameter], own: set[int], policy: MixedPrecisionPolicy, shared: set[int]
) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """The parameters of the unit itself, and the other groups. Only trainable ones have to agree in dtype within a
    group.

    What modules of the unit share (tied ends) belongs to the unit itself, which is gathered for the first of them that
    runs.
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
    # Else the largest of those that follow the policy, so that the unit's inputs are cast as the policy says.
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
    """``policy``, or that of parameters that are computed and reduced in the dtype they are stored in."""
    if id(parameter) not in own or policy.param_dtype in (None, parameter.dtype):
        return policy
    return dataclasses.replace(
        policy, param_dtype=None, reduce_dtype=None, output_dtype=None, cast_forward_inputs=False
    )


def own_dtype_parameters(model: nn.Module, param_dtype: torch.dtype | None) -> list[str]:
    """Names of the parameters of ``model`` that should not be cast to ``param_dtype`` for compute.

    Those that the model's class lists as kept in float32; and, in a model that is stored in ``param_dtype``, vectors
    outside of matrix layers that somebody stored in a wider dtype nevertheless (a norm, an ``A_log``, a routing bias).
    In one process neither the model's code nor autocast would cast them. Adapters are not meant: PEFT keeps them in
    float32 for the optimizer.
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
    """Names of parameters with one of ``components`` in their path that are stored in a wider dtype than
    ``param_dtype``.
    """
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
