"""Which contiguous pieces of a whole tensor a rank holds, and where they lie in its local part.

torch.distributed.checkpoint takes the local part of a DTensor for one contiguous piece, which packed projections are
not (gate and up in one matrix: two rows of blocks). Its format, though, holds any list of pieces at global offsets.
With one entry per piece a file depends on nothing but the whole tensors, so that it loads on every mesh and in one
process.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import compat
from ..errors import UnsupportedError
from .sharding_spec import ParameterSpec


def local_slice(full: torch.Tensor, spec: ParameterSpec, rank: int, size: int) -> torch.Tensor:
    """This rank's part of ``full``: the whole, a slice of one dim, or a slice of each of its packed blocks
    (contiguous).
    """
    if spec.dim is None:
        return full
    blocks = full.chunk(spec.blocks, dim=spec.dim)
    width = blocks[0].shape[spec.dim] // size
    parts = [block.narrow(spec.dim, rank * width, width) for block in blocks]
    return (parts[0].clone() if len(parts) == 1 else torch.cat(parts, dim=spec.dim)).contiguous()


def shard_of(value: torch.Tensor, spec: ParameterSpec, rank: int, size: int) -> torch.Tensor:
    """The part of ``value`` (any shape and dtype) that ``rank`` of ``size`` holds."""
    if spec.dim is None:
        return value
    parts = [block.chunk(size, spec.dim)[rank] for block in value.chunk(spec.blocks, spec.dim)]
    return torch.cat(parts, spec.dim)


#: Half-open ranges of indices along one dimension of the whole tensor, in the order in which the local part holds them.
Ranges = list[tuple[int, int]]


class Chunk(NamedTuple):
    """A block of a tensor that is contiguous in the whole and in the local part.

    Attributes:
        offsets: its place in the whole tensor, one number per dimension.
        sizes: its shape.
        local: its place in the local part.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: tuple[int, ...]


@dataclass
class LocalShard:
    """What this rank holds of one tensor, as checkpoints see it.

    Attributes:
        size: shape of the whole tensor.
        data: the local part, any dtype; a plain tensor that shares memory with the parameter unless it is a copy.
        pieces: where ``data`` belongs in the whole tensor.
        everywhere: every rank holds all of it, as a plain tensor.
    """

    size: torch.Size
    data: torch.Tensor
    pieces: list[Chunk]
    everywhere: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LocalShard:
        """The part of ``tensor`` (a DTensor, or a plain tensor, which is whole on every rank) on this rank."""
        local = tensor.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        return cls(tensor.shape, local, chunks_of(tensor), not isinstance(tensor, DTensor))

    def copied(self) -> LocalShard:
        """The same part with memory of its own on the CPU, which later training steps do not change."""
        data = torch.empty(self.data.shape, dtype=self.data.dtype, device="cpu")
        return LocalShard(self.size, data.copy_(self.data), self.pieces, self.everywhere)

    def view(self, offsets: Any) -> torch.Tensor:
        """The piece at the global ``offsets``, as a view of the local part."""
        piece = next(piece for piece in self.pieces if piece.offsets == tuple(offsets))
        return self.cut(piece)

    def cut(self, piece: Chunk) -> torch.Tensor:
        """``piece`` as a view of the local part."""
        return self.data[tuple(slice(at, at + size) for at, size in zip(piece.local, piece.sizes, strict=True))]

    def fill_from(self, whole: torch.Tensor) -> None:
        """Copy this rank's pieces out of the ``whole`` tensor, converting dtype and device as needed."""
        for piece in self.pieces:
            cut = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))
            self.cut(piece).copy_(whole[cut])


def chunks_of(tensor: torch.Tensor) -> list[Chunk]:
    """The pieces of ``tensor`` on this rank; none where its part is empty.

    Raises:
        UnsupportedError: a placement whose layout is not known here.
    """
    if not isinstance(tensor, DTensor):
        return _blocks([[(0, size)] for size in tensor.shape])
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    ranges: list[Ranges] = [[(0, size)] for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        parts, mine = tensor.device_mesh.size(axis), coordinate[axis]
        if compat.is_strided_shard(placement):
            dim, factor = placement.dim, placement.split_factor  # type: ignore[attr-defined]
            blocks = [_chunk(ranges[dim], factor, block) for block in range(factor)]
            ranges[dim] = [item for block in blocks for item in _chunk(block, parts, mine)]
        elif type(placement) is Shard:
            ranges[placement.dim] = _chunk(ranges[placement.dim], parts, mine)
        else:
            raise UnsupportedError(f"a checkpoint cannot hold a tensor that is placed as {placement!r} on a mesh axis.")
    shape = tuple(sum(stop - start for start, stop in dim) for dim in ranges)
    if shape != tuple(tensor.to_local().shape):
        raise UnsupportedError(
            f"a tensor of shape {tuple(tensor.shape)} placed as {tensor.placements} should have a part of shape "
            f"{shape} here, but it has {tuple(tensor.to_local().shape)}; a checkpoint of it would be wrong."
        )
    return _blocks(ranges)


def _chunk(ranges: Ranges, parts: int, index: int) -> Ranges:
    """Part ``index`` of the concatenated ``ranges`` cut into ``parts``, as ``torch.chunk`` cuts."""
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
    merged: Ranges = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _blocks(ranges: list[Ranges]) -> list[Chunk]:
    per_dimension = []
    for dim in map(_merged, ranges):
        starts = itertools.accumulate((stop - start for start, stop in dim), initial=0)
        per_dimension.append([(start, stop - start, at) for (start, stop), at in zip(dim, starts, strict=False)])
    blocks = []
    for combination in itertools.product(*per_dimension):
        offsets, sizes, local = (
            (tuple(values) for values in zip(*combination, strict=True)) if combination else ((), (), ())
        )
        blocks.append(Chunk(offsets, sizes, local))
    return blocks
