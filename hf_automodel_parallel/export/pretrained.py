"""The files of ``PreTrainedModel.save_pretrained``, from tensors that come one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn

from .. import compat
from .gathering import Fetch
from .recording import Recording, storage_identity
from .safetensors_writer import SafetensorsWriter

#: Shape and dtype by name.
Shapes = Mapping[str, tuple[Iterable[int], torch.dtype]]
Progress = Callable[[str, int], None]


def shapes_of(tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Any]:
    """Shapes and dtypes of ``tensors``; those in ``dtypes`` are going to be cast."""
    return {name: (t.shape, (dtypes or {}).get(name, t.dtype)) for name, t in tensors.items()}


def cast(fetch: Fetch, shapes: Shapes) -> Fetch:
    """``fetch``, with the dtypes of ``shapes``."""
    return lambda name: fetch(name).to(shapes[name][1])


def write_pretrained(
    model: nn.Module,
    shapes: Shapes,
    fetch: Fetch,
    directory: Path,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write config, generation config, weights and index of a transformers model into ``directory``.

    Args:
        model: decides about configs, tied weights and conversions; its own values are not read.
        shapes: of the state dict, in its order.
        fetch: gives the whole tensor of a name on the CPU, in the declared dtype.
        directory: exists.
        max_shard_size: bytes, or text such as ``"5GB"``.
        variant: ``model.<variant>.safetensors``.
        save_original_format: with the names that the files of this architecture have.
        progress: called with the name and the bytes of each tensor that is written.
    """
    write_configs(model, directory, next((d for _, d in shapes.values() if d.is_floating_point), None))
    recording = Recording()
    state = {name: recording.leaf(name, shape, dtype) for name, (shape, dtype) in shapes.items()}
    with recording:
        for name in compat.names_not_saved(model):
            state.pop(name, None)
        state = compat.without_tied_duplicates(model, state)
        if save_original_format:
            state = compat.as_in_files(model, state)
    name = "model.safetensors" if variant is None else f"model.{variant}.safetensors"
    index = write_weights(recording, state, fetch, directory, name, max_shard_size, progress)
    if index is not None:
        index["metadata"] = {"total_parameters": model.num_parameters(), **index["metadata"]}  # type: ignore[operator]
        file = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
        write_json(directory / file, index)


def write_weights(
    recording: Recording,
    state: Mapping[str, torch.Tensor],
    fetch: Fetch,
    directory: Path,
    name: str,
    max_shard_size: int | str,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Write ``state``, made by ``recording``, as safetensors files.

    Returns:
        The content of the index, None for one file.
    """
    split = split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=storage_identity,
        filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    order = [(file, tensor) for file, tensors in split.filename_to_tensors.items() for tensor in tensors]
    recording.expect(state[tensor] for _, tensor in order)
    with _writers(directory, split.filename_to_tensors, state) as writer:
        for file, tensor in order:
            value = recording.compute(state[tensor], fetch)
            writer(file).write(tensor, value)
            if progress is not None:
                progress(tensor, value.nbytes)
            del value
    if not split.is_sharded:
        return None
    return {"metadata": dict(split.metadata), "weight_map": split.tensor_to_filename}


@contextmanager
def _writers(
    directory: Path, files: Mapping[str, list[str]], state: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[str], SafetensorsWriter]]:
    """Writers by file name; a file is open from its first tensor to its last."""
    opened: dict[str, SafetensorsWriter] = {}

    def writer(file: str) -> SafetensorsWriter:
        for name in [name for name, other in opened.items() if name != file and not other.missing]:
            opened.pop(name).close()
        if file not in opened:
            tensors = {name: (state[name].shape, state[name].dtype) for name in files[file]}
            opened[file] = SafetensorsWriter(directory / file, tensors, {"format": "pt"})
        return opened[file]

    try:
        yield writer
        for other in opened.values():
            other.close()
    except BaseException:
        for other in opened.values():
            other.abandon()
        raise


def write_configs(model: nn.Module, directory: Path, dtype: torch.dtype | None) -> None:
    """What ``save_pretrained`` writes beside the weights: configs, and the code of a model that is not part of
    transformers.
    """
    cls: Any = type(model)  # past what is bound on the instance
    with _quiet():
        cls.save_pretrained(model, directory, state_dict={})
    path = directory / "config.json"
    if dtype is not None and path.exists():
        # The masters of trained parameters may be float32 while the files are in the dtype that the user loaded.
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("dtype") not in (None, str(dtype).removeprefix("torch.")):
            config["dtype"] = str(dtype).removeprefix("torch.")
            write_json(path, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a progress bar over no weights."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def write_json(path: Path, content: Any) -> None:
    """Write as transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
