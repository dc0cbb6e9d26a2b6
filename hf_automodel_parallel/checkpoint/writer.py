"""Writes DCP directories whose content does not depend on the mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta

from ..core.ranks import rank
from .checksums import create, renamed
from .files import naming
from .shards import LocalShard
from .steps import checkpoint_step, from_dcp

#: Path of a value in the nested dictionary that DCP's readers restore.
Path_ = tuple[str | int, ...]


class _ChecksumFileSystem(FileSystem):
    """torch's file system that computes checksums of written files and names the path in each error."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with naming(path), create(path) if mode == "wb" else super().create_stream(path, mode) as stream:
            yield stream

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        renamed(path, new_path)


class FlatSavePlanner(DefaultSavePlanner):
    """torch's save planner for a state dict that is flat already, with :class:`LocalShard` values.

    Args:
        paths: key -> path in the nested dictionary that DCP's readers restore.
    """

    def __init__(self, paths: Mapping[str, Path_]) -> None:
        super().__init__()
        self.paths = dict(paths)

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Set state dict and paths. DCP calls it first; torch's version would flatten the state dict."""
        self.state_dict, self.mappings, self.is_coordinator = state_dict, self.paths, is_coordinator

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The chunk or the value to write. torch's version looks up chunks in tensors only."""
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, LocalShard) else value


def save_chunks(
    state: dict[str, Any], paths: Mapping[str, Path_], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a flat state dict to the DCP directory ``folder``; collective over ``group``.

    Rank 0 writes replicated tensors and plain values. DCP removes duplicates of chunks that several ranks hold.

    Args:
        state: key -> :class:`LocalShard`, or a plain value that ``weights_only`` can read.
        paths: key -> path in the nested dictionary that DCP's readers restore.
        folder: the directory; it is created.
        group: None for all ranks. In a background thread its backend has to support CPU tensors.

    Raises:
        CheckpointError: on all ranks, naming the file that could not be written.
    """
    with checkpoint_step(f"saving to {folder}", group):
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        writer = FileSystemWriter(folder)
        writer.fs = _ChecksumFileSystem()
        if rank(group) != 0:  # DCP would spread replicated values over the ranks, and they may differ
            state = {key: v for key, v in state.items() if isinstance(v, LocalShard) and not v.replicated}
    try:
        dcp.save(
            state,
            storage_writer=writer,
            planner=FlatSavePlanner(paths),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as error:
        raise from_dcp(error, f"saving to {folder}") from error
