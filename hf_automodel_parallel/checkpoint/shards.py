"""A tensor's local shard in the form that torch.distributed.checkpoint (DCP) reads and writes.

DCP assumes that the local tensor of a DTensor is one contiguous chunk of the full tensor. A shard of a packed
projection is not: it has a slice of gate and one of up. But DCP's file format holds any list of chunks at global
offsets, and its planners ask a value for its chunks if it has the methods of ``torch.distributed._checkpointable``.
:class:`LocalShard` has them. So files depend only on the full tensors, and load on any mesh and in one process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ..core.shard_layout import Chunk, chunks_of


@dataclass
class LocalShard:
    """The chunks of one tensor on this rank.

    Not torch's ``LocalShardsWrapper`` in a DTensor: ``DTensor.from_local`` moves its shards to the device of the mesh,
    and the copies of an asynchronous save have to stay on the CPU.

    Attributes:
        shape: of the full tensor.
        local: the local shard, a plain tensor of any dtype; shares memory with the parameter unless it is a copy.
        chunks: offsets and sizes, in the full tensor, of the chunks in ``local``.
        replicated: the value is a plain tensor, which every rank holds in full.
    """

    shape: torch.Size
    local: torch.Tensor
    chunks: list[Chunk]
    replicated: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LocalShard:
        """The local shard of ``tensor``, a DTensor or a plain tensor."""
        local = tensor.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        return cls(tensor.shape, local, chunks_of(tensor), not isinstance(tensor, DTensor))

    def copied(self) -> LocalShard:
        """A copy on the CPU, which later training steps do not change."""
        local = torch.empty(self.local.shape, dtype=self.local.dtype, device="cpu")
        return LocalShard(self.shape, local.copy_(self.local), self.chunks, self.replicated)

    def fill_from(self, full: torch.Tensor) -> None:
        """Copy this rank's chunks of the ``full`` tensor into ``local``, converting dtype and device."""
        for chunk in self.chunks:
            chunk.of_local(self.local).copy_(chunk.of_full(full))

    # ---- the methods that DCP's planners call ----------------------------------------------------------------------

    def size(self) -> torch.Size:
        """Shape of the full tensor, which DCP compares with the one in the file."""
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in self.chunks]

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """The chunk at the global offset of ``index``, as a view of the local shard."""
        chunk = next(chunk for chunk in self.chunks if chunk.offsets == tuple(index.offset or ()))
        return chunk.of_local(self.local)
