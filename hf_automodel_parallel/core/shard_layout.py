"""The chunks of a full tensor that a rank holds, and the local shard that consists of them.

Tensor parallelism slices full parameters with it, loading reads ranges of files into shards, checkpoints write and read
chunks at global offsets. A placement becomes a list of index ranges for each dimension of the full tensor, in the order
of the local shard. A chunk is one combination of these ranges. A plain ``Shard`` gives one chunk; a packed projection
(``[gate; up]`` in one matrix) gives one chunk for each of its blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .. import compat
from ..errors import UnsupportedError
from .sharding_spec import ParameterSpec

#: Half-open index ranges along one dimension of the full tensor, in the order of the local shard.
Ranges = list[tuple[int, int]]


class Chunk(NamedTuple):
    """A block that is rectangular both in the full tensor and in the local shard.

    Attributes:
        offsets: first index in the full tensor, for each dimension.
        sizes: shape.
        local: first index in the local shard, for each dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: tuple[int, ...]

    def of_full(self, full: torch.Tensor) -> torch.Tensor:
        """This chunk as a view of the ``full`` tensor."""
        return _view(full, self.offsets, self.sizes)

    def of_local(self, local: torch.Tensor) -> torch.Tensor:
        """This chunk as a view of the ``local`` shard."""
        return _view(local, self.local, self.sizes)

    @property
    def region(self) -> tuple[tuple[int, int], ...]:
        """``(offset, size)`` in the full tensor, for each dimension."""
        return tuple(zip(self.offsets, self.sizes, strict=True))


def _view(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    return tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]


# ---- from a placement to chunks ------------------------------------------------------------------------------------


def chunks_of(tensor: torch.Tensor) -> list[Chunk]:
    """Return the chunks of ``tensor`` that this rank holds.

    Args:
        tensor: a DTensor on any mesh, or a plain tensor, which each rank holds in full. On any device, meta included.

    Returns:
        One chunk, or one for each packed block; empty if the local shard is empty or this rank is not in the mesh.

    Raises:
        UnsupportedError: a placement whose layout is unknown here, or a local shard of another shape.
    """
    if not isinstance(tensor, DTensor):
        return _chunks([[(0, size)] for size in tensor.shape])
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    chunks, shape = _chunks_at(tensor, coordinate)
    # Several mesh axes may shard one dimension, in either order. A wrong order would put values into wrong rows.
    if shape != tuple(tensor.to_local().shape):
        raise UnsupportedError(
            f"a tensor of shape {tuple(tensor.shape)} placed as {tensor.placements} should have a local shard of shape "
            f"{shape} here, but it has {tuple(tensor.to_local().shape)}; values would go to wrong offsets."
        )
    return chunks


def chunks_at(tensor: DTensor, coordinate: Sequence[int]) -> list[Chunk]:
    """Return the chunks of ``tensor`` that the rank at ``coordinate`` of its mesh holds, see :func:`chunks_of`."""
    return _chunks_at(tensor, coordinate)[0]


def _chunks_at(tensor: DTensor, coordinate: Sequence[int]) -> tuple[list[Chunk], tuple[int, ...]]:
    """The chunks, and the shape of the local shard."""
    ranges: list[Ranges] = [[(0, size)] for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if compat.is_strided_shard(placement):
            dim, blocks = placement.dim, placement.split_factor  # type: ignore[attr-defined]
        elif type(placement) is Shard:
            dim, blocks = placement.dim, 1
        else:
            raise UnsupportedError(f"a tensor that is placed as {placement!r} on a mesh axis has no known chunks.")
        ranges[dim] = _shard(ranges[dim], blocks, tensor.device_mesh.size(axis), coordinate[axis])
    return _chunks(ranges), tuple(sum(stop - start for start, stop in dim) for dim in ranges)


def tp_chunks(shape: Sequence[int], spec: ParameterSpec, rank: int, size: int) -> list[Chunk]:
    """Return the chunks of a full tensor of ``shape`` on ``rank`` of ``size`` tp ranks, placed as in ``spec``."""
    ranges: list[Ranges] = [[(0, length)] for length in shape]
    if spec.dim is not None:
        ranges[spec.dim] = _shard(ranges[spec.dim], spec.blocks, size, rank)
    return _chunks(ranges)


def _shard(ranges: Ranges, blocks: int, parts: int, index: int) -> Ranges:
    """Chunk ``index`` of ``parts`` of each of the ``blocks``, concatenated."""
    return [item for block in range(blocks) for item in _chunk(_chunk(ranges, blocks, block), parts, index)]


def _chunk(ranges: Ranges, parts: int, index: int) -> Ranges:
    """Chunk ``index`` of the concatenated ``ranges``, split into ``parts`` with the sizes of ``torch.chunk``."""
    total = sum(stop - start for start, stop in ranges)
    size = -(-total // parts)
    begin, end = min(index * size, total), min((index + 1) * size, total)
    taken, at = [], 0
    for start, stop in ranges:
        low, high = max(begin - at, 0), min(end - at, stop - start)
        if low < high:
            taken.append((start + low, start + high))
        at += stop - start
    return taken


def _merged(ranges: Ranges) -> Ranges:
    # Adjacent ranges become one, so that values that are contiguous in the full tensor are one chunk.
    merged: Ranges = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _chunks(ranges: list[Ranges]) -> list[Chunk]:
    per_dimension = []
    for dim in map(_merged, ranges):
        starts = itertools.accumulate((stop - start for start, stop in dim), initial=0)
        per_dimension.append([(start, stop - start, at) for (start, stop), at in zip(dim, starts, strict=False)])
    chunks = []
    for combination in itertools.product(*per_dimension):
        offsets, sizes, local = (
            (tuple(values) for values in zip(*combination, strict=True)) if combination else ((), (), ())
        )
        chunks.append(Chunk(offsets, sizes, local))
    return chunks


# ---- the local shard of a full tensor ------------------------------------------------------------------------------


def local_slice(full: torch.Tensor, spec: ParameterSpec, rank: int, size: int) -> torch.Tensor:
    """Return the local shard of ``full`` on ``rank`` of ``size`` tp ranks.

    Args:
        full: a parameter, an activation or a gradient, of any shape, dtype and device.
        spec: its placement on the tp axis.
        rank: rank on the tp axis.
        size: number of ranks on the tp axis.

    Returns:
        A contiguous copy of the shard; ``full`` itself if the placement is ``Replicate``.
    """
    if spec.dim is None:
        return full
    # More ranks than rows leave some ranks without a chunk; torch.cat needs at least one tensor.
    chunks = [chunk.of_full(full) for chunk in tp_chunks(full.shape, spec, rank, size)]
    return torch.cat(chunks or [full.narrow(spec.dim, 0, 0)], spec.dim).contiguous()


def placement_of(spec: ParameterSpec) -> Placement:
    """The DTensor placement on the tp axis that ``spec`` describes."""
    if spec.dim is None:
        return Replicate()
    return Shard(spec.dim) if spec.blocks == 1 else compat.strided_shard(spec.dim, spec.blocks)


def shard_parameter(
    parameter: nn.Parameter, spec: ParameterSpec, mesh: DeviceMesh, device: torch.device
) -> nn.Parameter:
    """Return a new parameter: a DTensor of the full shape with this rank's shard of ``parameter``.

    All ranks must hold equal values; nothing is communicated. The result keeps ``requires_grad`` and the attributes
    that a library has set on the parameter object.

    Args:
        parameter: the full parameter, of any dtype. One on the meta device stays there.
        spec: its placement on the tp axis.
        mesh: the tp axis (1-D).
        device: device of the local shard.
    """
    device = parameter.device if parameter.device.type == "meta" else device
    with torch.no_grad():
        local = local_slice(parameter.detach(), spec, mesh.get_local_rank(), mesh.size()).to(device).contiguous()
        tensor = DTensor.from_local(
            local,
            mesh,
            [placement_of(spec)],
            run_check=False,
            # Given, because from_local would infer them from equal shards: wrong if size does not divide the dimension.
            shape=parameter.shape,
            stride=torch.empty(parameter.shape, device="meta").stride(),
        )
    result = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    result.__dict__.update(parameter.__dict__)
    return result
