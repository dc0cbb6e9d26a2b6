"""Writing DCP directories whose content does not depend on how the ranks share a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..core.checkpoint_ranks import agreed, from_dcp
from ..core.shard_layout import LocalShard
from .files import naming

#: Path of a value in the nested dictionary that a reader gets back.
Path_ = tuple[str | int, ...]


class _NamingFileSystem(FileSystem):
    """torch's file system with the path in each error."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with naming(path), super().create_stream(path, mode) as stream:
            yield stream


class ChunkSavePlanner(DefaultSavePlanner):
    """Writes each piece of a :class:`LocalShard` at its place in the whole tensor, and other values as they are.

    Whole plain tensors and other values are written by rank 0, equal pieces of several ranks by one of them.

    Args:
        paths: key -> path in the nested dictionary that stock readers restore.
    """

    def __init__(self, paths: Mapping[str, Path_]) -> None:
        super().__init__(flatten_state_dict=True, flatten_sharded_tensors=False)
        self.paths = dict(paths)

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Called by DCP first; the state dict is flat already."""
        self.state_dict = state_dict
        self.mappings = self.paths
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """One item per piece."""
        items: list[WriteItem] = []
        for key, value in self.state_dict.items():
            if not isinstance(value, LocalShard):
                if self.is_coordinator:
                    items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
                continue
            if value.everywhere and not self.is_coordinator:
                continue
            properties = TensorProperties.create_from_tensor(value.data)
            for number, piece in enumerate(value.pieces):
                offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.sizes)
                data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, value.size)
                items.append(WriteItem(MetadataIndex(key, offsets, number), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Rank 0: without duplicates; an index hint is one into the list of all pieces, which only now is known."""
        plans = [dataclasses.replace(plan, items=[_without_hint(item) for item in plan.items]) for plan in all_plans]
        return super().create_global_plan(plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The piece, or the value, to write."""
        value = self.state_dict[index.fqn]
        return value.view(index.offset) if isinstance(value, LocalShard) else value


def _without_hint(item: WriteItem) -> WriteItem:
    return dataclasses.replace(item, index=MetadataIndex(item.index.fqn, item.index.offset))


def save_chunks(
    state: dict[str, Any], paths: Mapping[str, Path_], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a flat state dict (key -> :class:`LocalShard`, or a plain value that ``weights_only`` can read) to
    ``folder``.

    Collective over ``group``, whose backend has to work on the CPU if this runs in a thread.

    Raises:
        CheckpointError: on all ranks, naming the file that could not be written.
    """
    with agreed(f"saving to {folder}", group):
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        writer = FileSystemWriter(folder)
        writer.fs = _NamingFileSystem()
    try:
        dcp.save(
            state,
            storage_writer=writer,
            planner=ChunkSavePlanner(paths),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as error:
        raise from_dcp(error, f"saving to {folder}") from error
