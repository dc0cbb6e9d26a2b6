"""The mesh for megatron-fsdp: one axis to shard over, one for tp, and with HSDP one of replicas. An axis over which
gradients would not be reduced is refused.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...errors import ConfigError

#: Axes whose ranks have other shards of the sequence or other samples, so gradients must be reduced over them.
CONTEXT, REPLICAS = "cp", "dp_replicate"

#: Axes whose ranks hold different parameters, so no gradient is reduced over them.
INDEPENDENT = ("pp",)


@dataclass(frozen=True)
class Layout:
    """The mesh for megatron-fsdp, and the names of its axes.

    Attributes:
        mesh: the mesh for megatron-fsdp.
        shard: axis to shard over, which includes context-parallel ranks.
        tp: tp axis, which the mesh always has.
        replicas: axis of replicas (HSDP), or None.
        reducing: group of all ranks that reduce gradients together (replicas x shard), None without replicas.
    """

    mesh: DeviceMesh
    shard: str
    tp: str
    replicas: str | None = None
    reducing: dist.ProcessGroup | None = None

    @property
    def shard_size(self) -> int:
        """Number of ranks to shard over."""
        return self.mesh[self.shard].size()

    @property
    def data_size(self) -> int:
        """Number of ranks that reduce gradients together."""
        return self.shard_size * (self.mesh[self.replicas].size() if self.replicas else 1)

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """The tp axis, None when it has one rank."""
        return self.mesh[self.tp] if self.mesh[self.tp].size() > 1 else None


@dataclass(frozen=True)
class Axes:
    """The role of each axis of a user's mesh.

    Attributes:
        shard: axes to shard over.
        tp: axis of tensor parallelism, or None.
        replicas: axis of replicas, or None.
    """

    shard: tuple[str, ...]
    tp: str | None
    replicas: str | None

    def data_size(self, mesh: DeviceMesh) -> int:
        """Number of ranks that reduce gradients together."""
        sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
        return math.prod(sizes[name] for name in (*self.shard, *filter(None, [self.replicas])))

    def layout(self, mesh: DeviceMesh) -> Layout:
        """The mesh for megatron-fsdp: the user's if it has the right form, else a new one (then collective)."""
        if self.replicas is None and len(self.shard) == 1 and self.tp is not None:
            return Layout(mesh, self.shard[0], self.tp)
        return _new_layout(mesh, self.shard, self.tp, self.replicas)


def find_axes(mesh: DeviceMesh, dp_shard_dim: str = "dp", tp_dim: str | None = "tp") -> Axes:
    """Find the axes in ``mesh``.

    Args:
        mesh: the user's mesh with named axes.
        dp_shard_dim: axis to shard over, or a flattened one such as ``dp_cp``.
        tp_dim: axis of tensor parallelism, None if there is none.

    Returns:
        The axes. Ranks of a ``cp`` axis shard and reduce together with those of ``dp_shard_dim``, even if
        ``dp_shard_dim`` does not include them, because each has the gradients of one sequence shard. A
        ``dp_replicate`` axis makes replicas (HSDP).

    Raises:
        ConfigError: an axis does not exist, or gradients would not be reduced over an axis of the mesh.
    """
    names = tuple(mesh.mesh_dim_names or ())
    if tp_dim is not None and tp_dim not in names:
        raise ConfigError(
            f"tp_dim={tp_dim!r} is not an axis of the device mesh. Its axes: {', '.join(names) or 'unnamed'}."
        )
    covered = _axes_of(mesh, dp_shard_dim, tp_dim)
    sizes = dict(zip(names, mesh.shape, strict=True))
    if CONTEXT in names and CONTEXT not in covered and CONTEXT != tp_dim:
        covered = tuple(name for name in names if name in covered or name == CONTEXT)
    replicas = REPLICAS if REPLICAS in names and REPLICAS not in covered and sizes[REPLICAS] > 1 else None
    left = [name for name in names if name not in (*covered, tp_dim, replicas, *INDEPENDENT) and sizes[name] > 1]
    if left:
        raise ConfigError(
            f"the device mesh has an axis {left[0]!r} of {sizes[left[0]]} ranks that is neither "
            f"dp_shard_dim={dp_shard_dim!r} nor tp_dim={tp_dim!r}: gradients would not be reduced over it. Name it, or "
            "use a mesh without it."
        )
    return Axes(tuple(name for name in covered if sizes[name] > 1) or covered[:1], tp_dim, replicas)


def _axes_of(mesh: DeviceMesh, name: str, tp_dim: str | None) -> tuple[str, ...]:
    """The axes of ``mesh`` called ``name``: one axis, or those that were flattened into it."""
    names = tuple(mesh.mesh_dim_names or ())
    if name in names:
        if name == tp_dim:
            raise ConfigError(
                f"dp_shard_dim and tp_dim are both {name!r}; give them different axes of the device mesh."
            )
        return (name,)
    try:
        ranks = mesh[name].mesh.flatten().tolist()
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"dp_shard_dim={name!r} is not an axis of the device mesh. Its axes: {', '.join(names) or 'unnamed'}."
        ) from error
    # A flattened mesh does not list its axes, so find the axes that have the same ranks.
    others = [axis for axis in names if axis != tp_dim]
    coordinate = mesh.get_coordinate()
    for count in range(2, len(others) + 1):
        for axes in itertools.combinations(others, count):
            index = tuple(
                slice(None) if axis in axes else coordinate[i]  # type: ignore[index]
                for i, axis in enumerate(names)
            )
            if mesh.mesh[index].flatten().tolist() == ranks:
                return axes
    raise ConfigError(
        f"dp_shard_dim={name!r}: cannot tell which axes of the device mesh ({', '.join(names)}) it consists of."
    )


def _new_layout(mesh: DeviceMesh, shard: tuple[str, ...], tp_dim: str | None, replicas: str | None) -> Layout:
    names = tuple(mesh.mesh_dim_names or ())
    used = [*([replicas] if replicas else []), *shard, *([tp_dim] if tp_dim else [])]
    rest = [name for name in names if name not in used]
    ranks = mesh.mesh.permute([names.index(name) for name in (*rest, *used)])
    sizes = dict(zip(names, mesh.shape, strict=True))

    shape = [
        math.prod(sizes[axis] for axis in axes if axis is not None) for axes in (rest, [replicas], shard, [tp_dim])
    ]
    name = "_".join(shard)
    ranks = ranks.reshape(shape)
    tp = tp_dim or "tp"
    if replicas is None:
        return Layout(DeviceMesh(mesh.device_type, ranks[:, 0], mesh_dim_names=("rest", name, tp)), name, tp)
    made = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("rest", replicas, name, tp))
    # One group for each tp coordinate, with all replicas and shards.
    together = ranks.permute(0, 3, 1, 2).reshape(shape[0] * shape[3], shape[1] * shape[2])
    reducing = DeviceMesh(mesh.device_type, together, mesh_dim_names=("others", "data"))["data"].get_group()
    return Layout(made, name, tp, replicas, reducing)
