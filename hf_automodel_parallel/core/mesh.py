"""Named mesh axes: the sub-meshes of tensor parallelism and FSDP2, and the ranks that hold the same model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..errors import ConfigError

#: Mesh axes in the order in which Accelerate lays them out; each has a ``<axis>_size`` field.
AXES = ("dp_replicate", "dp_shard", "cp", "sp", "tp")


@dataclass(frozen=True)
class MeshAxes:
    """The names of the axes of a mesh.

    Attributes:
        replicate: axis over which the FSDP shards are replicated (HSDP).
        shard: axis over which FSDP2 shards. The default is the flattened axis of ``dp_shard`` and ``cp``; in a mesh
            without an axis of that name it means ``dp_shard``, flattened with ``cp`` if the mesh has both.
        tp: axis of tensor parallelism.
        cp: axis of context parallelism.
        pipeline: axis of pipeline stages. It is only read, to find the ranks that hold the same model.
    """

    replicate: str = "dp_replicate"
    shard: str = "dp_shard_cp"
    tp: str = "tp"
    cp: str = "cp"
    pipeline: str = "pp"

    def tensor_parallel(self, mesh: DeviceMesh) -> DeviceMesh | None:
        """The tp axis of ``mesh`` (1-D), or None if it has no such axis or only one rank on it.

        Raises:
            ConfigError: an axis that was named explicitly does not exist.
        """
        names = mesh.mesh_dim_names or ()
        if self.tp not in names:
            if self.tp != MeshAxes.tp:
                raise _missing("tp_mesh_name", self.tp, mesh)
            return None
        axis = mesh[self.tp]
        return axis if axis.size() > 1 else None

    def context_parallel(self, mesh: DeviceMesh) -> DeviceMesh | None:
        """The cp axis of ``mesh`` (1-D), or None if it has no such axis or only one rank on it."""
        return mesh[self.cp] if self.cp in (mesh.mesh_dim_names or ()) and mesh[self.cp].size() > 1 else None

    def data_parallel(self, mesh: DeviceMesh) -> DeviceMesh:
        """The mesh for ``fully_shard``: 1-D (shard), or 2-D (replicate, shard) for HSDP.

        Raises:
            ConfigError: the axis to shard over, or one that was named explicitly, does not exist.
        """
        names = mesh.mesh_dim_names or ()
        if self.replicate not in names and self.replicate != MeshAxes.replicate:
            raise _missing("dp_replicate_mesh_name", self.replicate, mesh)
        shard = self._shard_axis(mesh)
        if self.replicate in names and mesh[self.replicate].size() > 1:
            return compat.slice_mesh(mesh, (self.replicate, shard))
        return compat.slice_mesh(mesh, (shard,))

    def check(self, mesh: DeviceMesh) -> None:
        """Raise if an axis of ``mesh`` with several ranks is not used.

        Nothing is reduced over an unused axis, so the replicas along it would diverge.

        Raises:
            ConfigError: an axis with more than one rank has none of the names here.
        """
        names = mesh.mesh_dim_names or ()
        data, tp = self.data_parallel(mesh), self.tensor_parallel(mesh)
        if data.size() * (1 if tp is None else tp.size()) * self.pipeline_size(mesh) == compat.root_mesh(mesh).size():
            return
        used = {*(data.mesh_dim_names or ()), self.replicate, self.shard, self.tp, self.pipeline}
        spare = [f"{name} ({mesh[name].size()} ranks)" for name in names if name not in used and mesh[name].size() > 1]
        raise ConfigError(
            f"the device mesh has axes that nothing would be reduced over: {', '.join(spare) or ', '.join(names)}. Say "
            f"which axes are meant by dp_replicate_mesh_name={self.replicate!r}, dp_shard_cp_mesh_name={self.shard!r} "
            f"and tp_mesh_name={self.tp!r}."
        )

    def _shard_axis(self, mesh: DeviceMesh) -> str:
        """The name of the axis to shard over. If that is ``dp_shard`` x ``cp``, flatten them under this name first."""
        names = mesh.mesh_dim_names or ()
        if self.shard in names:
            return self.shard
        # A cp axis of one rank does not count: then dp_shard itself is the axis, and no process group is made.
        parts = [name for name in ("dp_shard", self.cp) if name in names] if self.shard == MeshAxes.shard else []
        if parts and all(mesh[name].size() == 1 for name in parts[1:]):
            return parts[0]
        if compat.has_joined_axis(mesh, self.shard):
            return self.shard
        if len(parts) == 2:
            compat.join_axes(mesh, tuple(parts), self.shard)
            return self.shard
        raise _missing("dp_shard_cp_mesh_name", self.shard, mesh)

    def pipeline_size(self, mesh: DeviceMesh) -> int:
        """Number of pipeline stages, 1 without such an axis. ``mesh`` may be a sub-mesh; its root mesh is read."""
        root = compat.root_mesh(mesh)
        names = getattr(root, "mesh_dim_names", None) or ()
        return root[self.pipeline].size() if self.pipeline in names else 1

    def holders(self, mesh: DeviceMesh) -> dist.ProcessGroup | None:
        """The process group of the ranks that hold the same model: all of ``mesh`` except other pipeline stages.

        None means all processes. Collective if torch has to make the group.
        """
        names = tuple(name for name in mesh.mesh_dim_names or () if name != self.pipeline)
        part = mesh if len(names) == mesh.ndim else compat.slice_mesh(mesh, names)
        if part.size() == dist.get_world_size():
            return None
        return part.get_group() if part.ndim == 1 else compat.join_axes(mesh, names, "_holders").get_group()


def _missing(field: str, name: str, mesh: DeviceMesh) -> ConfigError:
    return ConfigError(
        f"{field}={name!r}: the device mesh has no such axis, only "
        f"{', '.join(mesh.mesh_dim_names or ()) or 'unnamed ones'}. Give the name that the mesh was built with "
        "(init_device_mesh(..., mesh_dim_names=...))."
    )


#: Names of the flattened axes that Accelerate makes; a mesh may have some of them.
JOINED_AXES = ("dp", "dp_shard_cp", "dp_cp")


def inherit_timeouts(mesh: DeviceMesh) -> None:
    """Give the groups of all axes of ``mesh``, flattened ones included, the timeout of the default process group."""
    compat.inherit_timeout(mesh)
    for name in JOINED_AXES:
        if compat.has_joined_axis(mesh, name):
            compat.inherit_timeout(compat.slice_mesh(mesh, (name,)))
