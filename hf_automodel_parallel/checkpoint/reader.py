"""Reading DCP directories without running code from them.

torch pickles a checkpoint's ``.metadata`` and the values that are not tensors, and its reader unpickles them without
restriction. Here an unpickler that allows only the classes of metadata reads the former, and ``weights_only`` the
latter.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from ..compat.checkpoint_metadata import METADATA_CLASSES
from ..errors import CheckpointError, without_stop
from .checksums import Checksums, VerifiedReader
from .files import load_plain
from .shards import LocalShard

METADATA_FILE = ".metadata"


class _MetadataUnpickler(pickle.Unpickler):
    """Allows only the classes of metadata, and refuses every other global before anything is called."""

    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self.path} asks for {module}.{name}, which the metadata of a checkpoint has no use for. Nothing of it "
            f"was run. Do not use this checkpoint unless you know who wrote it."
        )


def read_metadata(folder: str | Path, checksums: Checksums | None = None) -> Metadata:
    """The metadata of a DCP directory: names, shapes, dtypes and offsets of all values. Needs no process group.

    Args:
        folder: a directory with a ``.metadata`` file, such as ``checkpoint-10/pytorch_model_fsdp_0``.
        checksums: of the ``.metadata`` file, to verify it while it is read.

    Raises:
        CheckpointError: the file is missing, damaged, contains more than metadata, or points outside of its directory.
    """
    path = Path(folder) / METADATA_FILE
    try:
        with path.open("rb") if checksums is None else VerifiedReader(path, checksums) as stream:
            metadata = _MetadataUnpickler(stream, path).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {without_stop(error)}.") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
        raise CheckpointError(f"{path} does not hold the metadata of a checkpoint.")
    # torch joins these names to the directory; `../` would read any file of the machine.
    for index, place in metadata.storage_data.items():
        name = str(getattr(place, "relative_path", ""))
        if not name or Path(name).name != name:
            raise CheckpointError(
                f"{path} says that {getattr(index, 'fqn', index)!r} is in the file {name!r}; the files of a checkpoint "
                f"are in its own directory. It was not read."
            )
    return metadata


class _VerifyingFileSystem(FileSystem):
    """torch's file system that verifies files with checksums while it reads them."""

    def __init__(self, checksums: Mapping[str, Checksums]) -> None:
        self.checksums = checksums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        known = self.checksums.get(Path(path).name)
        with super().create_stream(path, mode) if known is None else VerifiedReader(Path(path), known) as stream:
            yield stream


class SafeFileSystemReader(FileSystemReader):
    """torch's reader of DCP directories with :func:`read_metadata`; use it with :class:`SafeLoadPlanner`.

    Args:
        path: the directory.
        metadata: from :func:`read_metadata`; None to read it when it is needed.
        checksums: file name -> checksums, to verify the files while they are read.

    Raises:
        CheckpointError: naming the file that cannot be read, or was changed.
    """

    def __init__(
        self, path: str | Path, metadata: Metadata | None = None, checksums: Mapping[str, Checksums] | None = None
    ) -> None:
        super().__init__(path)
        self.fs = _VerifyingFileSystem(checksums or {})
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, from the restricted unpickler."""
        return read_metadata(Path(self.path)) if self._metadata is None else self._metadata

    def read_data(self, plan: LoadPlan, planner: Any) -> Any:
        """Like torch's reader, but it reads each saved chunk once, and errors name the file."""
        by_file: dict[str, dict[MetadataIndex, list[ReadItem]]] = {}
        for item in plan.items:
            chunks = by_file.setdefault(self.storage_data[item.storage_index].relative_path, {})
            chunks.setdefault(item.storage_index, []).append(item)
        # File by file, so that an error belongs to one file. The empty plan only yields torch's finished future.
        result: Any = super().read_data(LoadPlan([]), planner)
        for name, requests in by_file.items():
            once = _ReadOnce(planner, requests)
            items = sorted(once.items, key=lambda item: self.storage_data[item.storage_index].offset)
            try:
                super().read_data(LoadPlan(items), once)  # type: ignore[arg-type]
            except CheckpointError:
                raise
            except OSError as error:
                raise CheckpointError(f"cannot read {Path(self.path) / name}: {error.strerror or error}.") from error
            except Exception as error:
                raise CheckpointError(
                    f"{Path(self.path) / name} is damaged or not a part of this checkpoint: {type(error).__name__}: "
                    f"{without_stop(error)}."
                ) from error
        return result


class _ReadOnce:
    """A planner that reads each saved chunk once, although ``planner`` requests several slices of it.

    torch reads a saved chunk again for each request. A rank requests two slices of a packed projection that was saved
    as one chunk.

    Attributes:
        items: one request per saved chunk: the only one, or the bounding box of several.
    """

    def __init__(self, planner: Any, requests: Mapping[MetadataIndex, list[ReadItem]]) -> None:
        self._planner, self._requests = planner, requests
        self.items = [_bounding_box(parts) for parts in requests.values()]

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        """Read a value that is not a tensor."""
        self._planner.load_bytes(item, value)

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        """The tensor that torch copies into: the destination of a single request, or a buffer for a bounding box."""
        target = self._planner.resolve_tensor(self._requests[item.storage_index][0])
        if len(self._requests[item.storage_index]) == 1:
            return target
        return torch.empty(item.lengths, dtype=target.dtype)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """Copy the requested slices out of the bounding box."""
        parts = self._requests[item.storage_index]
        for part in parts:
            if len(parts) > 1:
                target = self._planner.resolve_tensor(part).detach()
                starts = [at - first for at, first in zip(part.storage_offsets, item.storage_offsets, strict=True)]
                target.copy_(tensor[tuple(slice(s, s + n) for s, n in zip(starts, part.lengths, strict=True))])
            self._planner.commit_tensor(part, tensor)


def _bounding_box(parts: list[ReadItem]) -> ReadItem:
    if len(parts) == 1:
        return parts[0]
    first = torch.Size(map(min, zip(*(part.storage_offsets for part in parts), strict=True)))
    ends = [map(sum, zip(part.storage_offsets, part.lengths, strict=True)) for part in parts]
    last = map(max, zip(*ends, strict=True))
    lengths = torch.Size(end - start for start, end in zip(first, last, strict=True))
    return dataclasses.replace(parts[0], storage_offsets=first, lengths=lengths)


class SafeLoadPlanner(DefaultLoadPlanner):
    """torch's load planner with :class:`LocalShard` values; values that are not tensors are read with ``weights_only``.

    The state dict is flat: key in the file -> :class:`LocalShard`, plain tensor or DTensor (filled in place), or any
    other value (replaced).

    Raises:
        CheckpointError: from the load, on all ranks: names all keys that the checkpoint lacks or has in other shapes.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Set the state dict, with its tensors as :class:`LocalShard`. DCP calls it first."""
        self.original_state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.state_dict = {
            key: LocalShard.of(value) if isinstance(value, torch.Tensor) else value for key, value in state_dict.items()
        }

    def create_local_plan(self) -> LoadPlan:
        """torch's plan, after :func:`check_keys`."""
        shapes = {key: value.shape if isinstance(value, LocalShard) else None for key, value in self.state_dict.items()}
        check_keys(shapes, self.metadata.state_dict_metadata)  # type: ignore[union-attr]
        return super().create_local_plan()

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The view of the local shard that a chunk is read into."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value that is not a tensor, with ``weights_only``."""
        key = read_item.dest_index.fqn
        self.state_dict[key] = self.original_state_dict[key] = load_plain(value, f"the value of {key!r}")


def check_keys(wanted: Mapping[str, torch.Size | None], known: Mapping[str, Any], name: str = "the checkpoint") -> None:
    """Raise :class:`CheckpointError` unless ``known`` has all ``wanted`` keys, with the wanted shapes.

    Args:
        wanted: key -> shape, None for values that are not tensors.
        known: key -> object with a ``size``, which is None (or missing) for values that are not tensors.
        name: of the checkpoint, for the message.
    """
    missing = [key for key in wanted if key not in known]
    if missing:
        unused = [key for key in known if key not in wanted]
        raise CheckpointError(
            f"{name} has no {some(missing)}"
            + (f"; it has {some(unused)}, which the model does not ask for" if unused else "")
            + ". It was saved from another model, another adapter or other trainable parameters."
        )
    wrong = [
        f"{key} ({saved if saved is None else tuple(saved)} in the checkpoint, {size if size is None else tuple(size)} "
        "here)"
        for key, size in wanted.items()
        if (saved := getattr(known[key], "size", None)) != size
    ]
    if wrong:
        raise CheckpointError(
            f"{name} has other shapes than the model: {some(wrong)}. It was saved from another model."
        )


def some(items: list[str], count: int = 4) -> str:
    """The first ``count`` of ``items``, and how many more there are."""
    return ", ".join(items[:count]) + (f" (and {len(items) - count} others)" if len(items) > count else "")
