"""The two forms of a saved state: a DCP directory, of which each rank reads chunks, and a file that rank 0 reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..core.ranks import broadcast_object, communication_device, rank
from ..errors import CheckpointError
from .files import load_plain
from .manifest import Manifest
from .reader import METADATA_FILE, SafeFileSystemReader, SafeLoadPlanner, read_metadata
from .shards import LocalShard
from .steps import checkpoint_step, from_dcp
from .writer import Path_


class Entry(NamedTuple):
    """One value of a saved state.

    Attributes:
        size: shape of the full tensor; None for a value that is not a tensor.
        dtype: dtype of the tensor; None for a value that is not a tensor.
        one_chunk: the tensor was saved as one chunk.
    """

    size: torch.Size | None = None
    dtype: torch.dtype | None = None
    one_chunk: bool = True


class Source(Protocol):
    """A saved state to load from.

    Attributes:
        name: its path, for messages.
        group: the process group that reads it; None for all ranks.
    """

    name: str
    group: Any

    @property
    def entries(self) -> Mapping[Path_, Entry]:
        """Path -> entry of each saved value."""

    def read(self, shards: Mapping[Path_, LocalShard | None]) -> dict[Path_, Any]:
        """Fill the local shards in place, and return the values of paths whose shard is None; collective."""


class DcpSource:
    """A directory of torch.distributed.checkpoint.

    Args:
        folder: the directory.
        root: the first element of each path ("model", "optimizer"); :attr:`entries` omits it.
        manifest: of the checkpoint, to verify the files while they are read; None to skip that.
        group: the process group that reads it; None for all ranks.

    Raises:
        CheckpointError: on all ranks: the metadata is missing or damaged, or holds another state.
    """

    def __init__(self, folder: Path, root: str, manifest: Manifest | None = None, group: Any = None) -> None:
        self.name, self.folder, self.group = str(folder), folder, group
        checksums = {} if manifest is None else manifest.checksums_below(folder.name)
        with checkpoint_step(f"reading {folder}", group):
            metadata = read_metadata(folder, checksums.get(METADATA_FILE))
            self._reader = SafeFileSystemReader(folder, metadata, checksums)
            paths = metadata.planner_data or {}
            self._keys: dict[Path_, str] = {}
            self.entries: dict[Path_, Entry] = {}
            for key, described in metadata.state_dict_metadata.items():
                path = tuple(paths.get(key, tuple(key.split(".", 1))))
                if path[0] != root:
                    raise CheckpointError(f"{folder} holds {key!r}, which does not belong to {root!r}.")
                self._keys[path[1:]] = key
                self.entries[path[1:]] = (
                    Entry(described.size, described.properties.dtype, len(described.chunks) == 1)
                    if isinstance(described, TensorStorageMetadata)
                    else Entry()
                )

    def read(self, shards: Mapping[Path_, LocalShard | None]) -> dict[Path_, Any]:
        """Read this rank's chunks from the files that hold them; see :meth:`Source.read`."""
        state = {self._keys[path]: shard for path, shard in shards.items()}
        try:
            dcp.load(
                state,  # type: ignore[arg-type]
                storage_reader=self._reader,
                planner=SafeLoadPlanner(),
                process_group=self.group,
                # DCP loads without a process group, too: one process may read any checkpoint.
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            raise from_dcp(error, f"reading {self.folder}") from error
        return {path: state[self._keys[path]] for path, shard in shards.items() if shard is None}


class FileSource:
    """A file of ``torch.save``. Only rank 0 reads it; it broadcasts each tensor, and every rank keeps its chunks.

    Rank 0 holds the tensors of a verified file in memory until they are broadcast, as it did for the save. A file
    without checksums is mapped.

    Args:
        path: the file.
        depth: levels of nested dictionaries (and lists) in it: 1 for weights, 3 for an optimizer.
        manifest: of the checkpoint, to verify the file while it is read; None to skip that.
        group: the process group that reads it; None for all ranks.

    Raises:
        CheckpointError: on all ranks: the file is missing or damaged.
    """

    def __init__(self, path: Path, depth: int, manifest: Manifest | None = None, group: Any = None) -> None:
        self.name, self.group = str(path), group
        self._values: dict[Path_, Any] = {}
        entries: dict[Path_, Entry] = {}
        with checkpoint_step(f"reading {path}", group):
            if rank(group) == 0:
                checksums = None if manifest is None else manifest.checksums(path.name)
                self._values = dict(_flat(load_plain(path, mmap=True, checksums=checksums), depth))
                for key, value in self._values.items():
                    entries[key] = Entry(value.shape, value.dtype) if isinstance(value, torch.Tensor) else Entry()
        # All ranks check keys and shapes, so that all of them raise the same error.
        self.entries: Mapping[Path_, Entry] = broadcast_object(entries, group)

    def read(self, shards: Mapping[Path_, LocalShard | None]) -> dict[Path_, Any]:
        """One broadcast per tensor: ranks other than 0 need memory for the largest full tensor only."""
        plain = broadcast_object({p: self._values.get(p) for p, shard in shards.items() if shard is None}, self.group)
        for path, shard in shards.items():
            if shard is None:
                continue
            if not dist.is_initialized():
                shard.fill_from(self._values[path])
                continue
            entry, device = self.entries[path], communication_device()
            # pop: rank 0 frees each tensor once it was broadcast.
            full = (
                self._values.pop(path).to(device).contiguous()
                if rank(self.group) == 0
                else torch.empty(entry.size or (), dtype=entry.dtype, device=device)
            )
            dist.broadcast(full, group=self.group, group_src=0)
            shard.fill_from(full)
        return plain


def _flat(value: Any, depth: int, path: Path_ = ()) -> list[tuple[Path_, Any]]:
    items: list[tuple[Any, Any]] | None = None
    if depth and isinstance(value, Mapping):
        items = list(value.items())
    elif depth and isinstance(value, list):
        items = list(enumerate(value))
    if items is None:
        if not path:
            raise CheckpointError("the file does not hold a dictionary.")
        return [(path, value)]
    return [found for key, item in items for found in _flat(item, depth - 1, (*path, key))]


def nested(state: Mapping[Path_, Any]) -> dict[str, Any]:
    """Nested dictionaries and lists from flat paths; integer keys make a list."""
    root: dict[Any, Any] = {}
    for path, value in state.items():
        holder = root
        for key in path[:-1]:
            holder = holder.setdefault(key, {})
        holder[path[-1]] = value
    return _lists(root)


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, int) for key in value):
        return [_lists(value[key]) for key in sorted(value)]
    return {key: _lists(item) for key, item in value.items()}
