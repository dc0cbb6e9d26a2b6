"""Private names of DTensor, meshes, FSDP2 and megatron-fsdp; their table is :mod:`.names`."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import UnsupportedError
from .names import PRIVATE_NAMES, REPLACED
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
    """Tell torch before 2.13 that packed blocks are meant literally in the specs of these (FSDP-sharded) DTensors.

    torch 2.11 takes every ``_StridedShard`` for its own notation of a shard order and refuses to gather one that is
    not; 2.13 falls back to the literal meaning by itself. The spec object is shared with FSDP2, so gradients follow.
    """
    if torch_version() >= (2, 13):
        return
    for parameter in parameters:
        spec = getattr(parameter, "_spec", None)
        if spec is not None and is_strided_shard(spec.placements[-1]):
            spec.use_strided_shard_as_shard_order = False
            spec.shard_order = spec.compute_default_shard_order(spec.placements)


def is_strided_shard(placement: object) -> bool:
    """True for the placement made by :func:`strided_shard`."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def slice_mesh(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """The axes ``names`` of ``mesh``, also joined ones, which torch (2.11 to 2.13) wants to be asked for differently
    one day.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return mesh[names if len(names) > 1 else names[0]]


def has_joined_axis(mesh: DeviceMesh, name: str) -> bool:
    """True if an axis ``name`` was made of axes of ``mesh`` before (``_flatten``)."""
    try:
        slice_mesh(mesh, (name,))
    except (KeyError, RuntimeError):
        return False
    return True


def join_axes(mesh: DeviceMesh, names: tuple[str, ...], name: str) -> DeviceMesh:
    """One axis ``name`` of the axes ``names`` of ``mesh``; collective where torch has to make its process group."""
    joined = slice_mesh(mesh, names)._flatten(name)
    inherit_timeout(joined)
    return joined


def set_timeout(timeout: Any, group: Any = None) -> None:
    """Bound the collectives of ``group``, by default the process group, by ``timeout`` (a timedelta)."""
    if torch_version() >= (2, 14):
        dist.set_timeout(timeout, group)  # type: ignore[attr-defined]  # mypy may see an older torch
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def inherit_timeout(mesh: DeviceMesh) -> None:
    """Give the process groups of the axes of ``mesh`` (1-D or more) the timeout of the process group.

    torch makes them with its default, so that ``ddp_timeout`` or ``InitProcessGroupKwargs(timeout=...)`` would not
    bound the collectives of tp and dp_shard, which are nearly all: a lost node would stop the others after half an hour
    (gloo).
    """
    world = dist.group.WORLD
    groups = [group for group in mesh.get_all_groups() if group is not world]
    if world is None or not groups:
        return
    options = world._get_backend(torch.device(mesh.device_type)).options
    if options is None:  # a fake process group, which waits for nobody
        return
    for group in groups:
        set_timeout(options._timeout, group)


def root_mesh(mesh: Any) -> Any:
    """The mesh that ``mesh`` is a part of; a stand-in that has none is its own."""
    root = getattr(mesh, "_get_root_mesh", None)
    return root() if callable(root) else mesh


class _ExpectedRedistribution(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("While redistributing from")


def silence_redistribution_hints() -> None:
    """Drop torch's hint that gathering over two mesh axes takes two collectives (torch 2.13 logs it on every rank).

    A parameter on dp_shard x tp is gathered in two steps whenever a norm is clipped or a state dict saved; nothing can
    be done about it, and each rank would say so at each kind of step. Other messages of that logger pass.
    """
    hints = logging.getLogger("torch.distributed.tensor._redistribute")
    if not any(isinstance(f, _ExpectedRedistribution) for f in hints.filters):
        hints.addFilter(_ExpectedRedistribution())


def initialize_fsdp(model: nn.Module) -> None:
    """Let FSDP2 look at the units below ``model`` now, with ``model`` as their root, as its first forward would.

    Before that has happened, a unit that is called on its own takes itself for a root and finds no streams to gather
    on.
    """
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator,union-attr]


def before_reduction(unit: Any, function: Callable[[], None]) -> None:
    """Call ``function`` in each backward when the gradients of an FSDP2 unit are complete, before they are reduced."""

    def call(post_backward: Callable[..., None], *args: Any) -> None:
        function()
        post_backward(*args)

    for group in _fsdp_groups(unit._get_fsdp_state()):
        group.post_backward = functools.partial(call, group.post_backward)


def group_of(unit: Any, parameter: nn.Parameter) -> Any:
    """The FSDP2 group of ``unit`` that manages the module that holds ``parameter``; None if there is none."""
    state = unit._get_fsdp_state()
    groups = _fsdp_groups(state)
    _check_names(state, *groups)
    _check_names(*(p for group in groups for p in group.fsdp_params[:1]))
    return next((group for group in groups if any(p.sharded_param is parameter for p in group.fsdp_params)), None)


def _check_names(*parts: Any) -> None:
    """Fail while the model is sharded, not in the middle of a backward, where FSDP2 lacks a name that the table lists
    for it.
    """
    for part in parts:
        kind = type(part)
        for _, attribute, _ in PRIVATE_NAMES:
            holder, _, name = attribute.partition(".")
            if holder != kind.__name__ or torch_version() >= REPLACED.get(attribute, (99, 0)):
                continue
            if not hasattr(part, name) and name not in kind.__annotations__:  # some are only set by the first forward
                raise UnsupportedError(
                    f"FSDP2 of torch {torch.__version__} has no {attribute}, which sharding needs here. Use torch 2.11 "
                    "to 2.15."
                )


def owner_of(fsdp_param: Any) -> nn.Module:
    """The module that holds a parameter of a group."""
    return fsdp_param._module_info.module


def around_group(
    group: Any, forward: Callable[[], None], reduction: Callable[[], None], start: Callable[[], None]
) -> None:
    """Call ``forward`` before each forward of an FSDP2 group, ``reduction`` before its gradients are reduced or
    accumulated, and ``start`` before FSDP2 looks at the dtypes of its parameters, at the first forward."""

    def call(function: Callable[[], None], original: Callable[..., Any], *args: Any) -> Any:
        function()
        return original(*args)

    group.pre_forward = functools.partial(call, forward, group.pre_forward)
    group.post_backward = functools.partial(call, reduction, group.post_backward)
    group.lazy_init = functools.partial(call, start, group.lazy_init)


def backward_reached(group: Any) -> bool:
    """True if the running backward has come to the output of this FSDP2 group."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    return group._training_state == TrainingState.PRE_BACKWARD


def trained_when_gathered(fsdp_param: Any) -> bool:
    """True if the gathered form of a parameter of an FSDP2 group exists and takes a gradient."""
    gathered = getattr(fsdp_param, "_unsharded_param", None)
    return gathered is not None and gathered.requires_grad


def has_gathered_gradient(fsdp_param: Any) -> bool:
    """True if there is something to reduce for a parameter of an FSDP2 group."""
    return fsdp_param.unsharded_accumulated_grad is not None or fsdp_param._unsharded_param.grad is not None


def give_gathered_gradient(fsdp_param: Any, values: torch.Tensor | None) -> None:
    """Let the gathered form of a parameter of an FSDP2 group have the gradient ``values``, None for zeros."""
    gathered = fsdp_param._unsharded_param
    dtype = gathered.grad_dtype or gathered.dtype  # since torch 2.15 the gradient may have the reduce dtype, or any
    gathered.grad = torch.zeros_like(gathered, dtype=dtype) if values is None else values.to(gathered.device, dtype)


def unify_gathered_gradients(fsdp_params: list[Any]) -> None:
    """Bring the unsharded gradients of an FSDP2 group to its reduce dtype, where one was accumulated in it without a
    reduction.

    torch before 2.15 accumulates beside ``.grad``, and reduce-scatters gradients of one dtype alone. Since 2.15 it
    accumulates in ``.grad``, and the copy into the reduce-scatter casts each gradient.
    """
    if torch_version() < (2, 15) and any(p.unsharded_accumulated_grad is not None for p in fsdp_params):
        for fsdp_param in fsdp_params:
            if fsdp_param.unsharded_accumulated_grad is None:  # FSDP2 adds .grad to it later; the call would replace it
                fsdp_param.to_accumulated_grad_if_needed()


def reduce_all_but(units: Any) -> None:
    """Let every FSDP2 unit below the first of ``units`` reduce its gradients that has not done so, apart from
    ``units``.

    A unit whose inputs need no gradient is left to the end of the backward, where FSDP2 comes to it after the root.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    states = [unit._get_fsdp_state() for unit in units]
    for state in reversed(states[0]._state_ctx.all_states):
        if not any(state is own for own in states):
            for group in reversed(_fsdp_groups(state)):
                if group._training_state != TrainingState.POST_BACKWARD:
                    group.post_backward()


def _fsdp_groups(state: Any) -> list[Any]:
    """The groups of parameters of an FSDP2 unit: one in an attribute in torch 2.11, a list in one of almost that name
    in 2.13.
    """
    value = next((value for name, value in vars(state).items() if name.startswith("_fsdp_param_group")), None)
    return [group for group in (value if isinstance(value, list) else [value]) if group is not None]


def keep_gathered_after_forward(unit: Any) -> Callable[[], None]:
    """Let the FSDP2 unit keep its parameters after forward; the result takes that back.

    The public ``set_reshard_after_forward`` sets it, but nothing tells what was set before (torch 2.11 to 2.13).
    """
    state = unit._get_fsdp_state()
    automatic = state._auto_reshard_after_forward
    before = [(group, group.post_forward_mesh_info) for group in _fsdp_groups(state)]
    unit.set_reshard_after_forward(False, recurse=False)

    def undo() -> None:
        state._auto_reshard_after_forward = automatic
        for group, value in before:
            # What torch decides by itself for a root, when it learns from the first forward that it is one.
            group.post_forward_mesh_info = None if automatic and state._is_root else value

    return undo


def forget_unfinished_forward(units: list[Any]) -> None:
    """After an exception left the forward of FSDP2 units: let the next one begin anew, and :meth:`reshard` free
    parameters.

    torch 2.13 has ``reset_iter_state`` for this, which also drops gradients that were accumulated before.
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
    """Let a DTensor say that its local tensor is placed on ``mesh`` as ``placements`` say; nothing is moved."""
    old = parameter._spec
    parameter._spec = type(old)(mesh, placements, tensor_meta=old.tensor_meta)


def show_raw_parameters(wrapper: Any) -> None:
    """Let a ``MegatronFSDP`` (megatron-fsdp 0.5 and 0.6) put the parameters to compute with into the module tree."""
    wrapper._replace_param_with_raw_if_needed()
