"""The files of ``Accelerator.save_model``: a state dict as it is, with all of its names."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .gathering import Fetch
from .pretrained import Shapes, write_json, write_weights
from .recording import Recording


def write_state(
    shapes: Shapes, fetch: Fetch, directory: Path, max_shard_size: int | str, safe_serialization: bool = True
) -> None:
    """Write weights and index.

    Args:
        shapes: of the state dict, each tensor once.
        fetch: gives whole tensors on the CPU.
        directory: exists.
        max_shard_size: bytes, or text such as ``"5GB"``.
        safe_serialization: False for ``torch.save``, which takes a whole file at once.
    """
    recording = Recording()
    state = {name: recording.leaf(name, shape, dtype) for name, (shape, dtype) in shapes.items()}
    if safe_serialization:
        index = write_weights(recording, state, fetch, directory, "model.safetensors", max_shard_size)
        if index is not None:
            write_json(directory / "model.safetensors.index.json", index)
        return
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="pytorch_model{suffix}.bin",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        torch.save({name: fetch(name) for name in names}, directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / "pytorch_model.bin.index.json", index)
