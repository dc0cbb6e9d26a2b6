"""Reads the weights of a training checkpoint as full tensors, one at a time, in one process without process group."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import ExportError, without_stop
from .commit import status
from .files import load_plain
from .reader import METADATA_FILE, SafeFileSystemReader, SafeLoadPlanner, read_metadata

#: Names that Accelerate and the Trainer give to the weights of the first (or only) model of a run.
_SHARDED, _WHOLE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"


class ShardedWeights:
    """The weights in a DCP directory.

    Attributes:
        shapes: name in the model's state dict -> (shape, dtype).
    """

    def __init__(self, folder: Path) -> None:
        metadata = read_metadata(folder)
        self._reader = SafeFileSystemReader(folder, metadata)  # the metadata is not read again for each tensor
        self._keys: dict[str, str] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        paths = metadata.planner_data or {}
        for key, described in metadata.state_dict_metadata.items():
            path = [str(part) for part in paths.get(key) or key.split(".", 1)]
            if path[0] == "model" and len(path) > 1 and isinstance(described, TensorStorageMetadata):
                name = ".".join(path[1:])
                self._keys[name] = key
                self.shapes[name] = (described.size, described.properties.dtype)

    def fetch(self, name: str) -> torch.Tensor:
        """The full tensor ``name`` on the CPU, assembled from the chunks of all ranks."""
        shape, dtype = self.shapes[name]
        tensor = torch.empty(shape, dtype=dtype)
        dcp.load({self._keys[name]: tensor}, storage_reader=self._reader, planner=SafeLoadPlanner(), no_dist=True)
        return tensor


class FullWeights:
    """The weights in one file of ``torch.save``, mapped into memory: pages are read on access."""

    def __init__(self, path: Path) -> None:
        content = load_plain(path, mmap=True)
        if not isinstance(content, dict):
            raise ExportError(f"{path} holds no state dict.")
        self._tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        self.shapes = {name: (value.shape, value.dtype) for name, value in self._tensors.items()}

    def fetch(self, name: str) -> torch.Tensor:
        """The tensor ``name``, a view of the mapped file."""
        return self._tensors[name]


class SafetensorsWeights:
    """The weights in one safetensors file, or in several with an index.

    Args:
        folder: a directory with ``<stem>.safetensors``, or with ``<stem>.safetensors.index.json`` and its files.
        stem: "model" or "adapter_model".
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        import json

        from safetensors import safe_open

        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.exists():
            files: Iterable[str] = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        elif single.exists():
            files = [single.name]
        else:
            raise ExportError(f"{folder} has neither {single.name} nor {index.name}; other formats are not read.")
        self._open: dict[str, Any] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for file in files:
            if Path(file).name != file:
                raise ExportError(f"{index} names {file!r}, which is outside of its directory. It was not read.")
            try:
                handle = safe_open(folder / file, framework="pt")
            except Exception as error:
                raise ExportError(f"cannot read {folder / file}: {without_stop(error)}.") from error
            for name in handle.keys():
                mapped = handle.get_slice(name)[...]  # a view of the mapped file: its pages are not read
                self._open[name] = handle
                self.shapes[name] = (mapped.shape, mapped.dtype)

    def fetch(self, name: str) -> torch.Tensor:
        """The tensor ``name``."""
        return self._open[name].get_tensor(name)


Weights = ShardedWeights | FullWeights | SafetensorsWeights


def open_checkpoint(path: Path) -> tuple[Weights, Path]:
    """Find the weights of a training checkpoint.

    Args:
        path: a Trainer's ``checkpoint-N``, a directory of ``accelerator.save_state``, or the DCP directory in one of
            them.

    Returns:
        The weights, and the directory in which configs and tokenizer files may be.

    Raises:
        ExportError: there are no weights, or the save was interrupted.
        CheckpointError: a file is damaged or malicious.
    """
    if not path.exists():
        raise ExportError(
            f"{path} does not exist. Give a Trainer's checkpoint-N or a directory of accelerator.save_state."
        )
    if (path / METADATA_FILE).exists():
        return ShardedWeights(path), path.parent
    if path.is_dir():
        found = status(path)
        if found.kind in ("incomplete", "damaged") and found.reason != "it is empty":
            raise ExportError(f"{path} is not complete: {without_stop(found.reason)}.")
        if (path / _SHARDED / METADATA_FILE).exists():
            return ShardedWeights(path / _SHARDED), path
        if (path / _WHOLE).exists():
            return FullWeights(path / _WHOLE), path
        for stem in ("adapter_model", "model"):
            if (path / f"{stem}.safetensors").exists() or (path / f"{stem}.safetensors.index.json").exists():
                return SafetensorsWeights(path, stem), path
    raise ExportError(
        f"{path} holds no weights: neither {_SHARDED}/ with a {METADATA_FILE} (SHARDED_STATE_DICT) nor {_WHOLE} "
        f"(FULL_STATE_DICT), which Accelerate and the Trainer write."
    )
