"""FSDP2 along a module tree: the items of every list of modules become FSDP units.

This is the reference API's way, for code that shards a model by itself. ``Accelerator.prepare`` shards by the layers
of the model (:mod:`.shard`), and gives embedding and head units of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy

from ..core.mesh import MeshAxes
from ..core.model_structure import all_frozen
from .dtype_groups import install_param_groups, shard_unit
from .options import ShardingOptions
from .shard import set_prefetch

#: Children that do not run in a forward without their modality. If they are entirely frozen they stay with the root,
#: because each rank runs the root's all-gather in every forward.
OPTIONAL_TOWERS = ("audio_tower",)


def apply_fsdp2_sharding_recursively(
    module: nn.Module,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
    enable_fsdp2_prefetch: bool = True,
    fsdp2_backward_prefetch_depth: int = 2,
    fsdp2_forward_prefetch_depth: int = 1,
    reshard_after_forward: bool | None = None,
    fully_shard_fn: Callable[..., Any] | None = None,
) -> None:
    """Make the modules in every ``ModuleList`` and ``ModuleDict`` below ``module`` FSDP2 units, in place.

    A list inside of a list is entered, because a list has no forward of its own. Parameters outside of all lists are
    left for the root, which the caller shards afterwards: ``fully_shard(model, mesh=mesh, mp_policy=mp_policy)``.
    A unit may have parameters of several dtypes. The last module of a list is not resharded after forward, because
    its backward comes next.

    Args:
        module: where to begin; a module, or a stand-in with ``named_children``.
        mesh: the data-parallel mesh. A ``pp`` axis of its root mesh means pipeline parallelism.
        mp_policy: dtypes, None to compute in those of the parameters.
        offload_policy: where shards are kept, None for the device.
        enable_fsdp2_prefetch: all-gather the next modules of a list while one computes.
        fsdp2_backward_prefetch_depth: number of them in backward.
        fsdp2_forward_prefetch_depth: number of them in forward.
        reshard_after_forward: for all units; None: reshard all but the last module of each list, and none under
            pipeline parallelism, which would all-gather them for each micro-batch.
        fully_shard_fn: called in place of ``torch.distributed.fsdp.fully_shard``, with its arguments.
    """
    pipelined = MeshAxes().pipeline_size(mesh) > 1
    common: dict[str, Any] = {"mesh": mesh, "mp_policy": mp_policy, "offload_policy": offload_policy or OffloadPolicy()}
    if fully_shard_fn is None:
        shard: Callable[..., Any] = functools.partial(shard_unit, **common)
    else:
        shard = functools.partial(fully_shard_fn, **common)
    depths = ShardingOptions(
        forward_prefetch=fsdp2_forward_prefetch_depth, backward_prefetch=fsdp2_backward_prefetch_depth
    )
    for group in _lists(module):
        for index, unit in enumerate(group):
            last = index == len(group) - 1
            reshard = (not pipelined and not last) if reshard_after_forward is None else reshard_after_forward
            shard(unit, reshard_after_forward=reshard)
        if enable_fsdp2_prefetch and not pipelined and reshard_after_forward is not False:
            set_prefetch([unit for unit in group if isinstance(unit, FSDPModule)], True, depths)
    if fully_shard_fn is None:
        # A stand-in has no modules(); its units do.
        for root in [module] if isinstance(module, nn.Module) else [unit for group in _lists(module) for unit in group]:
            install_param_groups(root)


def _lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The items of each list below ``module``, or of ``module`` itself if it is a list; inner lists first."""
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    units = []
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or not is_list:
            if not (name in OPTIONAL_TOWERS and all_frozen(child)):
                yield from _lists(child)
        else:
            units.append(child)
    if units:
        yield units
