"""Private names of DTensor, meshes, FSDP2 and megatron-fsdp; :mod:`.names` lists them.

A *group* is an ``FSDPParamGroup`` of FSDP2, an ``fsdp_param`` is one of its ``FSDPParam``.
"""

from __future__ import annotations

import functools
import logging
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import UnsupportedError
from .names import PRIVATE_NAMES, REPLACED, TESTED_UP_TO
from .tensors import torch_version

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def strided_shard(dim: int, split_factor: int) -> Any:
    """Return the placement that shards ``dim`` inside each of its ``split_factor`` equal blocks.

    Example: a fused ``[gate; up]`` weight with ``split_factor=2`` gives every rank a slice of gate and one of up.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim=dim, split_factor=split_factor)


def mark_packed_placements(parameters: Any) -> None:
    """Make torch before 2.13 read ``_StridedShard`` of these FSDP-sharded DTensors as blocks, not as a shard order.

    torch 2.11 reads each ``_StridedShard`` as its encoding of a shard order and cannot gather one that is not. 2.13
    falls back to the literal meaning. FSDP2 shares the spec object, so the gradients get the same reading.
    """
    if torch_version() >= (2, 13):
        return
    for parameter in parameters:
        spec = getattr(parameter, "_spec", None)
        if spec is not None and is_strided_shard(spec.placements[-1]):
            spec.use_strided_shard_as_shard_order = False
            spec.shard_order = spec.compute_default_shard_order(spec.placements)


def dtensor_like(local: torch.Tensor, parameter: Any) -> Any:
    """Return ``local`` as the DTensor of the mesh, placements and full shape of ``parameter``.

    With the spec object of ``parameter``, as FSDP2 does for its gradients: a fifth of the time of
    ``DTensor.from_local``, and no communication.
    """
    from torch.distributed.tensor import DTensor

    spec = getattr(parameter, "_spec", None)
    if spec is None:
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    return DTensor(local, spec, requires_grad=False)


def is_strided_shard(placement: object) -> bool:
    """True for the placement made by :func:`strided_shard`."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def slice_mesh(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """Return the sub-mesh of the axes ``names``, flattened axes included.

    torch 2.11 to 2.13 warns that slicing a flattened axis is deprecated; the warning is filtered.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return mesh[names if len(names) > 1 else names[0]]


def has_joined_axis(mesh: DeviceMesh, name: str) -> bool:
    """True if ``_flatten`` has already made an axis ``name`` of axes of ``mesh``."""
    try:
        slice_mesh(mesh, (name,))
    except (KeyError, RuntimeError):
        return False
    return True


def join_axes(mesh: DeviceMesh, names: tuple[str, ...], name: str) -> DeviceMesh:
    """Flatten the axes ``names`` of ``mesh`` to one axis ``name``. Collective if torch has to make a process group."""
    joined = slice_mesh(mesh, names)._flatten(name)
    inherit_timeout(joined)
    return joined


def set_timeout(timeout: Any, group: Any = None) -> None:
    """Set the timeout (a timedelta) of the collectives of ``group``; None means the default process group."""
    if torch_version() >= (2, 14):
        dist.set_timeout(timeout, group)  # type: ignore[attr-defined]  # mypy may see an older torch
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def inherit_timeout(mesh: DeviceMesh) -> None:
    """Give the process groups of all axes of ``mesh`` (1-D or more) the timeout of the default process group.

    torch makes them with its default timeout. Without this, ``ddp_timeout`` or ``InitProcessGroupKwargs(timeout=...)``
    would not apply to the collectives of tp and dp_shard, which are nearly all collectives: after the loss of a node
    the others would wait for half an hour (gloo).
    """
    world = dist.group.WORLD
    groups = [group for group in mesh.get_all_groups() if group is not world]
    if world is None or not groups:
        return
    options = world._get_backend(torch.device(mesh.device_type)).options
    if options is None:  # a fake process group, which never waits
        return
    for group in groups:
        set_timeout(options._timeout, group)


def root_mesh(mesh: Any) -> Any:
    """Return the root mesh of ``mesh``; ``mesh`` itself if it is a test double without a root."""
    root = getattr(mesh, "_get_root_mesh", None)
    return root() if callable(root) else mesh


class _ExpectedRedistribution(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("While redistributing from")


def silence_redistribution_hints() -> None:
    """Filter torch's hint that a redistribution over two mesh axes takes two collectives (2.13 logs it on all ranks).

    A parameter on dp_shard x tp needs two all-gathers for a state dict and for the norm of its gradient; this cannot be
    avoided. Other messages of that logger pass.
    """
    hints = logging.getLogger("torch.distributed.tensor._redistribute")
    if not any(isinstance(f, _ExpectedRedistribution) for f in hints.filters):
        hints.addFilter(_ExpectedRedistribution())


def initialize_fsdp(model: nn.Module) -> None:
    """Run FSDP2's lazy initialisation now, with ``model`` as the root; otherwise the first forward runs it.

    Before the initialisation, an FSDP unit that is called on its own would initialise itself as a root, and has no
    streams to all-gather on.
    """
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator,union-attr]


def state_without_units(_: nn.Module) -> Any:
    """Return in the place of ``FSDPModule._get_fsdp_state`` what ``register_fsdp_forward_method`` calls.

    Scripts wrap ``generate`` with it.
    """
    return types.SimpleNamespace(
        _pre_forward=lambda _, args, kwargs: (args, kwargs), _post_forward=lambda _, args, output: output
    )


def apply_without_units(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call ``_apply`` (``Module.to`` and its kind) of the class below ``FSDPModule``, which asks for units."""
    from torch.distributed.fsdp import FSDPModule

    return super(FSDPModule, module)._apply(*args, **kwargs)  # type: ignore[misc]


def before_reduction(unit: Any, function: Callable[[], None], only_if_reducing: bool = False) -> None:
    """Call ``function`` in each backward when the gradients of an FSDP unit are complete, before their reduction.

    With ``only_if_reducing`` not in backwards that FSDP2 was told not to reduce after (``no_sync``).
    """

    def call(group: Any, post_backward: Callable[..., None], *args: Any) -> None:
        if group.reduce_grads or not only_if_reducing:
            function()
        post_backward(*args)

    for group in _fsdp_groups(unit._get_fsdp_state()):
        group.post_backward = functools.partial(call, group, group.post_backward)


def group_of(unit: Any, parameter: nn.Parameter) -> Any:
    """Return the param group of the FSDP unit ``unit`` that manages the sharded ``parameter``; None without one.

    Raises:
        UnsupportedError: this version of FSDP2 lacks a private name that the package needs.
    """
    state = unit._get_fsdp_state()
    groups = _fsdp_groups(state)
    _check_names(state, *groups)
    _check_names(*(p for group in groups for p in group.fsdp_params[:1]))
    return next((group for group in groups if any(p.sharded_param is parameter for p in group.fsdp_params)), None)


def _check_names(*parts: Any) -> None:
    """Raise if an object of FSDP2 lacks a listed private name: while the model is sharded, not later in a backward."""
    for part in parts:
        kind = type(part)
        for _, attribute, _ in PRIVATE_NAMES:
            holder, _, name = attribute.partition(".")
            if holder != kind.__name__ or torch_version() >= REPLACED.get(attribute, (99, 0)):
                continue
            if not hasattr(part, name) and name not in kind.__annotations__:  # some are only set by the first forward
                raise UnsupportedError(
                    f"FSDP2 of torch {torch.__version__} has no {attribute}, which sharding needs here; this version "
                    f"was tested up to torch {'.'.join(map(str, TESTED_UP_TO['torch']))}. Use torch 2.11 or newer, up "
                    f"to that."
                )


def owner_of(fsdp_param: Any) -> nn.Module:
    """Return the module in which a parameter of a group is registered."""
    return fsdp_param._module_info.module


def around_group(
    group: Any, forward: Callable[[], None], reduction: Callable[[], None], start: Callable[[], None]
) -> None:
    """Insert callbacks into an FSDP2 param group, which has no public hooks at these points.

    Args:
        group: the param group.
        forward: called before each forward.
        reduction: called in backward, before the gradients are reduced or accumulated.
        start: called once before the first forward, before FSDP2 reads the dtypes of the parameters.
    """

    def call(function: Callable[[], None], original: Callable[..., Any], *args: Any) -> Any:
        function()
        return original(*args)

    group.pre_forward = functools.partial(call, forward, group.pre_forward)
    group.post_backward = functools.partial(call, reduction, group.post_backward)
    group.lazy_init = functools.partial(call, start, group.lazy_init)


def backward_reached(group: Any) -> bool:
    """True if the running backward has reached the output of this param group."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    return group._training_state == TrainingState.PRE_BACKWARD


def trained_when_gathered(fsdp_param: Any) -> bool:
    """True if the unsharded parameter exists and requires a gradient."""
    gathered = getattr(fsdp_param, "_unsharded_param", None)
    return gathered is not None and gathered.requires_grad


def has_gathered_gradient(fsdp_param: Any) -> bool:
    """True if the unsharded parameter has a gradient to reduce."""
    return fsdp_param.unsharded_accumulated_grad is not None or fsdp_param._unsharded_param.grad is not None


def give_gathered_gradient(fsdp_param: Any, values: torch.Tensor | None) -> None:
    """Set the gradient of the unsharded parameter to ``values`` (full shape), or to zeros for None."""
    gathered = fsdp_param._unsharded_param
    dtype = gathered.grad_dtype or gathered.dtype  # since torch 2.15 the gradient may have the reduce dtype, or any
    gathered.grad = torch.zeros_like(gathered, dtype=dtype) if values is None else values.to(gathered.device, dtype)


def unify_gathered_gradients(fsdp_params: list[Any]) -> None:
    """Cast the unsharded gradients of a param group to its reduce dtype, if one has been accumulated in this dtype.

    Before 2.15 torch accumulates unreduced gradients outside of ``.grad``, in the reduce dtype, and its reduce-scatter
    needs gradients of a single dtype. Since 2.15 it accumulates in ``.grad`` and casts each gradient when it copies it
    for the reduce-scatter.
    """
    if torch_version() < (2, 15) and any(p.unsharded_accumulated_grad is not None for p in fsdp_params):
        for fsdp_param in fsdp_params:
            if fsdp_param.unsharded_accumulated_grad is None:  # FSDP2 adds .grad to it later; the call would replace it
                fsdp_param.to_accumulated_grad_if_needed()


def reduce_all_but(units: Any) -> None:
    """Run the post-backward, with the reduction, of all FSDP units that have not run it yet, except of ``units``.

    A unit whose inputs need no gradient has no post-backward hook. FSDP2 reduces it at the end of the backward, after
    the root. ``units[0]`` is any unit of the model.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    states = [unit._get_fsdp_state() for unit in units]
    for state in reversed(states[0]._state_ctx.all_states):
        if not any(state is own for own in states):
            for group in reversed(_fsdp_groups(state)):
                if group._training_state != TrainingState.POST_BACKWARD:
                    group.post_backward()


def _fsdp_groups(state: Any) -> list[Any]:
    """Return the param groups of an FSDP unit: torch 2.11 has one in ``_fsdp_param_group``, 2.13 a list with a similar
    name.
    """
    value = next((value for name, value in vars(state).items() if name.startswith("_fsdp_param_group")), None)
    return [group for group in (value if isinstance(value, list) else [value]) if group is not None]


def keep_gathered_after_forward(unit: Any) -> Callable[[], None]:
    """Make an FSDP unit keep its parameters unsharded after forward. Returns a function that restores the setting.

    The public ``set_reshard_after_forward`` only sets the value; torch 2.11 to 2.13 has no getter.
    """
    state = unit._get_fsdp_state()
    automatic = state._auto_reshard_after_forward
    before = [(group, group.post_forward_mesh_info) for group in _fsdp_groups(state)]
    unit.set_reshard_after_forward(False, recurse=False)

    def undo() -> None:
        state._auto_reshard_after_forward = automatic
        for group, value in before:
            # torch's own choice for a root, made in the first forward: that may have happened since `before` was read.
            group.post_forward_mesh_info = None if automatic and state._is_root else value

    return undo


def forget_unfinished_forward(units: list[Any]) -> None:
    """Reset the state of FSDP units after an exception in their forward, so that ``reshard`` and a new forward work.

    torch 2.13 has ``reset_iter_state`` for this, but it also drops gradients that were accumulated before.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    for state in (unit._get_fsdp_state() for unit in units):
        if state._state_ctx.iter_forward_root is None:
            continue
        for part in (state, *_fsdp_groups(state)):
            if part._training_state is TrainingState.FORWARD:
                part._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
    for unit in units:
        unit._get_fsdp_state()._state_ctx.iter_forward_root = None


def describe_on(parameter: Any, mesh: DeviceMesh, placements: tuple[Any, ...]) -> None:
    """Replace mesh and placements in the spec of a DTensor; the local tensor stays as it is."""
    old = parameter._spec
    parameter._spec = type(old)(mesh, placements, tensor_meta=old.tensor_meta)


def show_raw_parameters(wrapper: Any) -> None:
    """Make a ``MegatronFSDP`` (megatron-fsdp 0.5, 0.6) register its compute parameters in the module tree."""
    wrapper._replace_param_with_raw_if_needed()
