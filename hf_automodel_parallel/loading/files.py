"""The safetensors files of a model: found like transformers finds them, and checked before anything relies on them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core.lazy_graph import Leaf, Node, Region
from ..errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.ckpt.index",
    "tf_model.h5",
    "flax_model.msgpack",
)


class TensorFile:
    """One safetensors file, mapped into memory while it is read."""

    def __init__(self, path: str) -> None:
        """Open ``path`` and check its header against its size.

        Raises:
            CheckpointError: it is missing, truncated, or not a safetensors file.
        """
        self.path = path
        self._open: Any = None
        try:
            status = os.stat(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}). Is the checkpoint complete? Download or copy the file "
                "again."
            ) from error
        self._status = (status.st_size, status.st_mtime_ns)
        try:
            self.keys = list(self._file().keys())
            self.digest = _header_digest(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} ({status.st_size} bytes): truncated, or no safetensors file ({error}). Download or copy it "
                "again."
            ) from error

    def _file(self) -> Any:
        if self._open is None:
            self._open = safe_open(self.path, framework="pt")
        return self._open

    def close(self) -> None:
        """Unmap the file; the next read opens it again."""
        self._open = None

    def check_unchanged(self) -> None:
        """Raise :class:`CheckpointError` if size or modification time differ from when the file was opened."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: has disappeared since the model was loaded from it ({error.strerror})."
            ) from error
        if (status.st_size, status.st_mtime_ns) != self._status:
            raise CheckpointError(
                f"{self.path}: has changed since the model was loaded from it ({self._status[0]} bytes then, "
                f"{status.st_size} now). Load the model again."
            )

    def tensor(self, key: str) -> FileTensor:
        """The tensor ``key`` as a leaf of the lazy graph. Reads none of its pages."""
        mapped = self.read(key, ())
        return FileTensor(mapped.shape, mapped.dtype, self, key)

    def read(self, key: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of tensor ``key`` as a view of the mapped file; without ``slices`` the full tensor.

        Raises:
            CheckpointError: the tensor cannot be read.
        """
        try:
            source = self._file().get_slice(key)
            return source[slices or ...]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {key} cannot be read ({error}).") from error


@dataclass(eq=False)
class FileTensor(Leaf):
    """A tensor of a safetensors file, as a leaf of the lazy graph."""

    file: TensorFile
    key: str

    def read(self, region: Region) -> torch.Tensor:
        """The elements of ``region``, (first, count) per dimension, as a view of the mapped file."""
        return self.file.read(self.key, tuple(slice(first, first + count) for first, count in region))


def file_tensors(node: Node) -> list[FileTensor]:
    """The file tensors that ``node`` is computed from."""
    return [leaf for leaf in node.subgraph() if isinstance(leaf, FileTensor)]


def _header_digest(path: str) -> str:
    """SHA-256 of the header (names, shapes, dtypes, offsets): ranks compare files without reading their values."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()


def resolve_files(path: str, variant: str | None, named: str | None, hub: dict[str, Any]) -> list[TensorFile]:
    """The files of a model, in the order of their names.

    Args:
        path: a local directory, or the name of a repository.
        variant: of file names, as in ``model.<variant>.safetensors``.
        named: the file that the model's config names (``transformers_weights``); None for the usual names.
        hub: ``subfolder``, ``revision``, ``cache_dir`` and so on, as in ``from_pretrained``.

    Raises:
        CheckpointError: there are no safetensors files; one is missing, truncated, or lacks a tensor that the index
            names.
    """
    names = [named] if named else [_with_variant(_SINGLE, variant), _with_variant(_INDEX, variant)]
    found = next((file for name in names if (file := _find(path, name, hub)) is not None), None)
    if found is None:
        raise _without_safetensors(path, names, variant, hub)
    if not found.endswith(".json"):
        return [TensorFile(found)]
    index = _read_index(found)
    shards = sorted(set(index.values()))
    folder = Path(found).parent
    if not os.path.isdir(path):
        for name in shards:
            _find(path, name, hub)  # downloads into the cache, beside the index
    files = {}
    for name in shards:
        # Names in an index are input from others: only files beside it are opened.
        shard = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not name.endswith(".safetensors"):
            raise CheckpointError(f"{found}: names {name!r}, which is not a safetensors file beside it.")
        if not shard.exists():
            count = sum(other == name for other in index.values())
            raise CheckpointError(
                f"{shard}: missing; {Path(found).name} says that it holds {count} tensors. Download or copy it again."
            )
        files[name] = TensorFile(str(shard))
    held = {name: set(file.keys) for name, file in files.items()}
    for key, name in index.items():
        if key not in held[name]:
            raise CheckpointError(
                f"{folder / name}: tensor {key} is missing, which {Path(found).name} says is in it. The shards belong "
                f"to different checkpoints, or the file was written anew; download or save all of them again."
            )
    return list(files.values())


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _find(path: str, name: str, hub: dict[str, Any]) -> str | None:
    if os.path.isdir(path):
        # Absolute, because prepare reads the files, and the script may change its working directory before.
        local = os.path.abspath(os.path.join(path, hub.get("subfolder") or "", name))
        return local if os.path.isfile(local) else None
    from transformers.utils import cached_file

    return cached_file(path, name, **hub, _raise_exceptions_for_missing_entries=False)


def _read_index(path: str) -> dict[str, str]:
    try:
        index = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(key, str) and isinstance(name, str) for key, name in index.items()):
            raise TypeError("weight_map is not a map of names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: no index of a sharded checkpoint ({error!r}). Download or copy it again."
        ) from error
    return index


def _without_safetensors(path: str, names: list[str], variant: str | None, hub: dict[str, Any]) -> CheckpointError:
    pickled = [name for name in _PICKLES if os.path.isdir(path) and _find(path, name, hub) is not None]
    if pickled:
        return CheckpointError(
            f"{os.path.join(path, pickled[0])}: only safetensors files are read in slices, and no pickle is opened. "
            "Convert it once, in one process: model = AutoModel....from_pretrained(path); "
            "model.save_pretrained(new_path)."
        )
    place = os.path.join(path, hub.get("subfolder") or "")
    return CheckpointError(
        f"{place}: has neither {' nor '.join(names)} (variant={variant!r}). Check path, subfolder and variant."
    )
